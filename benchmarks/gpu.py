"""Time one part of what runs on a GPU: `python -m benchmarks.gpu linear --out linear.csv`; benchmarks/gpu.sh runs all.

Parts: linear, decode, backward, gated, routed (one layer each, as CUDA graphs where a graph can hold them) and model.
Rows go to the CSV after each case, and a case that is there already, for this commit and device, is not measured again.
Then a table, and rows for docs/gpu-status.md. `--device cpu --tiny` runs it without a GPU; its times mean nothing.
"""

import argparse
import itertools
import re
from pathlib import Path

import torch

from fastlora import backends

from . import gpu_layers, gpu_model, machine, table
from .measure import CALLS, measure

CALLS[gpu_layers.GpuCase] = gpu_layers.calls
CALLS[gpu_model.ModelCase] = gpu_model.calls
PARTS = (*gpu_layers.PARTS, "model")
STATUS = Path(__file__).parents[1] / "docs" / "gpu-status.md"
# Which ops of docs/gpu-status.md a part's rows speak of.
OPS = {"linear": ("lora_linear_forward",), "decode": ("lora_linear_forward",), "backward": ("lora_linear_backward",)}


def main(argv=None):
    args = _parse(argv)
    made = gpu_model if args.part == "model" else gpu_layers
    cases = made.cases(args.tiny) if args.part == "model" else made.cases(args.part, args.tiny)
    facts = machine.facts(args.device)
    for case in cases:
        if any(row["case"] == case.name and _same_run(row, facts) for row in table.read(args.out)):
            continue
        if args.device == "cuda":
            torch.cuda.empty_cache()
        methods = [method for method in made.methods(case) if method not in args.without]
        rows = measure(case, args.device, methods, args.seconds)
        table.update(args.out, [{**row, **facts} for row in rows])
        print(table.line(case.name, rows), flush=True)
    names, here = [case.name for case in cases], (facts["device"], facts["commit"])
    rows = [r for r in table.read(args.out) if r["case"] in names and (r["device"], r["commit"]) == here]
    print(show(rows))
    if args.device == "cuda" and not args.tiny:
        print(patch(args.part, rows, names, facts["commit"], architecture()))


def _parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes at which a CPU runs it")
    parser.add_argument("--without", nargs="*", default=[], metavar="METHOD")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each method of a case, on a CPU")
    return parser.parse_args(argv)


def _same_run(row, facts):
    return row["device"] == facts["device"] and row["commit"] == facts["commit"] and not facts["commit"].endswith("+")


def architecture():
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def show(rows):
    """Times over the base layer's; its own in microseconds. Cells stay empty where the base was left out."""
    names = list(dict.fromkeys(r["case"] for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "base"))
    found = {(r["case"], r["method"]): r for r in rows}
    lines = ["| case | base, µs | " + " | ".join(methods) + " |", "|---|" + "---|" * (len(methods) + 1)]
    for name in names:
        ratios = [found[name, m]["vs_base"] if (name, m) in found else "" for m in methods]
        base = f"{found[name, 'base']['p50_us']:.1f}" if (name, "base") in found else ""
        lines.append(f"| {name} | {base} | {' | '.join('' if r == '' else f'{r:.2f}' for r in ratios)} |")
    peaks = [
        f"{r['case']}: {r['method']} {r['peak_mb']:.0f} MB" for r in rows if "training" in r["case"] and r["peak_mb"]
    ]
    return "\n".join([*lines, *peaks])


def patch(part, rows, names, commit, sm):
    """Lines for docs/gpu-status.md and csrc/cuda.h: for how many rows the kernels beat the composed form.

    `names` are the part's cases: without a time of both forms in each of them, nothing is proposed.
    """
    if part not in OPS:
        return "docs/gpu-status.md: no row speaks of this part"
    found, faster = {(r["case"], r["method"]): r["p50_us"] for r in rows}, {}
    missing = [name for name in names if not {(name, "fastlora"), (name, "fastlora_kernels")} <= found.keys()]
    if missing:
        why = backends.cuda_missing() or f"not timed by the kernels and the composed form: {', '.join(missing)}"
        return f"docs/gpu-status.md: nothing to change, {why}"
    for name in names:
        m = int(re.search(r"/m(\d+)/", name)[1])
        faster[m] = faster.get(m, True) and found[name, "fastlora_kernels"] < found[name, "fastlora"]
    # the longest run of measured sizes without a slower one between them
    runs = [[m for m, _ in run] for yes, run in itertools.groupby(sorted(faster.items()), lambda item: item[1]) if yes]
    run = max(runs, key=len, default=[])
    if not run:
        said = f"{', '.join(OPS[part])}, CUDA C++, part {part}: run, not faster, sm_{sm}, {commit}"
        return f"docs/gpu-status.md: no row changes; as a comment: <!-- {said} -->"
    said, lines = f"sm_{sm}, {run[0]} to {run[-1]} rows, {commit}", []
    for line in STATUS.read_text().splitlines():
        if "CUDA C++" in line and any(f"`{op}`" in line for op in OPS[part]):
            lines += [f"-{line}", f"+{line.rsplit('|', 2)[0]}| {said} |"]
    return "\n".join([*lines, f"csrc/cuda.h: {', '.join(OPS[part])}: {sm}, {run[0]}, {run[-1]}"])


if __name__ == "__main__":
    main()
