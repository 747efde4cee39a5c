"""The CSV of results: reading, replacing rows, and the summary figures that are computed from them."""

import csv
import statistics
from pathlib import Path

TIMES = ("p20_us", "p50_us", "p80_us", "vs_base", "vs_fastlora", "peak_mb")
NUMBERS = ("value", *TIMES, "calls", "samples", "dropped", "runs")
PLACE = ("device", "cpu", "threads", "allocator", "fastlora_cpu", "commit")
VERSIONS = ("python", "torch", "triton", "loralib", "peft", "transformers")
COLUMNS = ("case", "method", *NUMBERS, *PLACE, *VERSIONS)

# What the project asks of itself, on the CPUs that it is developed on.
BARS = {
    ("forward-over-base", "fastlora"): ("<=", 0.82),
    ("forward-worst-over-base", "fastlora"): ("<=", 1.15),
    ("forward-over-fastlora", "loralib"): (">=", 1.5),
    ("forward-small-over-fastlora", "loralib"): (">=", 2.2),
    ("forward-over-fastlora", "peft"): (">=", 1.65),
    ("forward-small-over-fastlora", "peft"): (">=", 2.7),
    ("training-over-fastlora", "loralib"): (">=", 1.2),
    **{(f"merged-training-m{m}-over-fastlora", "loralib"): (">=", 2.0) for m in (1, 64, 512)},
    ("embedding-training-m4096-over-fastlora", "loralib"): (">=", 1.5),
    **{(f"tasks-{mode}-m1-over-fastlora", "fastlora_8"): ("<=", 2.0) for mode in ("forward", "training")},
    **{(f"tasks-{mode}-m256-over-fastlora", "fastlora_8"): ("<=", 1.5) for mode in ("forward", "training")},
    **{(f"mixture-gated-forward-{d}-m256-over-base", "fastlora"): ("<=", 1.45) for d in ("fp32", "bf16")},
    **{(f"mixture-gated-training-{d}-m256-over-fastlora", "peft"): (">=", 1.8) for d in ("fp32", "bf16")},
    ("mixture-gated-forward-bf16-m1-over-fastlora", "peft"): (">=", 5.0),
    ("mixture-gated-forward-fp32-m1-over-fastlora", "peft"): (">=", 3.0),
    ("mixture-xlora-forward-fp32-m256-over-fastlora", "peft"): (">=", 1.7),
    ("mixture-generate-forward-fp32-m256-over-fastlora", "peft"): (">=", 7.0),
    **{(f"smollm2-decode-{d}-b{b}-over-base", "fastlora"): ("<=", 0.95) for d in ("fp32", "bf16") for b in (1, 4)},
    **{(f"smollm2-decode-{d}-b{b}-over-fastlora", "peft"): (">=", 1.5) for d in ("fp32", "bf16") for b in (1, 4)},
}


def read(path):
    """The rows, numbers as floats."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return [{k: _number(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(column, text):
    if column in NUMBERS and text != "":
        return float(text)
    return text


def update(path, rows):
    """Write the rows, each in the place of an older one of the same case and method."""
    new = {(r["case"], r["method"]): r for r in rows}
    kept = [new.pop((r["case"], r["method"]), r) for r in read(path)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in [*kept, *new.values()]:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def line(name, rows):
    """One case for the terminal."""
    base = rows[0]
    ratios = "  ".join(f"{r['method']} {r['vs_base']:.2f}" for r in rows[1:] if r["vs_base"] != "")
    return f"{name:44} {base['p50_us']:9.1f} us  {ratios}  ({sum(int(r['dropped']) for r in rows)} dropped)"


def figures(rows):
    """The summary rows: {case: figure/…, method, value}."""
    table = {(r["case"], r["method"]): r for r in rows if not r["case"].startswith("figure/")}

    def column(method, prefix, which, keep=lambda shape: True):
        return [
            r[which]
            for (case, m), r in table.items()
            if m == method and case.startswith(prefix) and keep(case.split("/"))
        ]

    found = []

    def figure(name, method, values, reduce):
        if values:
            found.append({"case": f"figure/{name}", "method": method, "value": reduce(values)})

    mean = statistics.geometric_mean
    forward, training = "linear/forward/", "linear/training/"
    figure("forward-over-base", "fastlora", column("fastlora", forward, "vs_base"), mean)
    figure("forward-small-over-base", "fastlora", column("fastlora", forward, "vs_base", _small), mean)
    figure("forward-worst-over-base", "fastlora", column("fastlora", forward, "vs_base"), max)
    figure("training-over-base", "fastlora", column("fastlora", training, "vs_base"), mean)
    for other in ("loralib", "peft", "peft_bf16", "addmm", "compile"):
        figure("forward-over-fastlora", other, column(other, forward, "vs_fastlora"), mean)
        figure("forward-small-over-fastlora", other, column(other, forward, "vs_fastlora", _small), mean)
        figure("training-over-fastlora", other, column(other, training, "vs_fastlora"), mean)
    for case in sorted({case for case, _ in table if not case.startswith("linear/")}):
        short = case.removesuffix("/r16").replace("/", "-")
        row = {m: r for (c, m), r in table.items() if c == case}
        if not case.startswith("embedding/"):
            # a frozen embedding has nothing to differentiate: its base is a forward alone
            figure(f"{short}-over-base", "fastlora", [row["fastlora"]["vs_base"]], mean)
        for other in [m for m in ("loralib", "peft", "fastlora_8") if m in row]:
            figure(f"{short}-over-fastlora", other, [row[other]["vs_fastlora"]], mean)
    return found


def _small(parts):
    """M ≤ 16 with in and out ≤ 1536."""
    return int(parts[4][1:]) <= 16 and max(map(int, parts[2].split("x"))) <= 1536


def show_figures(path):
    """The summary for the terminal, each figure with its bar where it has one."""
    lines = []
    for row in read(path):
        name, method, value = row["case"].removeprefix("figure/"), row["method"], row["value"]
        if name == row["case"]:
            continue
        sign, bar = BARS.get((name, method), (None, None))
        met = value <= bar if sign == "<=" else value >= bar if sign else True
        asked = f"{sign} {bar:<5} {'' if met else 'MISSED'}" if sign else ""
        lines.append(f"{name:36} {method:10} {value:6.3f}  {asked}".rstrip())
    return "\n".join(lines)
