"""Time one part of what runs on a GPU: `python -m benchmarks.gpu linear --out linear.csv`; benchmarks/gpu.sh runs all.

Parts: linear, decode, backward, gated, routed (one layer each, as CUDA graphs where a graph can hold them) and model.
Rows go to the CSV after each case, and a case that is there already, for this commit and device, is not measured again.
Then a table, and rows for docs/gpu-status.md. `--device cpu --tiny` runs it without a GPU; its times mean nothing.
"""

import argparse
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
NEVER = "never run on a GPU"


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
    rows = [row for row in table.read(args.out) if row["case"] in [case.name for case in cases]]
    print(show(rows))
    if args.device == "cuda":
        print(patch(args.part, rows, machine.commit(), architecture()))


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
    """Times over the base layer's; its own in microseconds."""
    names = list(dict.fromkeys(r["case"] for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "base"))
    found = {(r["case"], r["method"]): r for r in rows}
    lines = ["| case | base, µs | " + " | ".join(methods) + " |", "|---|" + "---|" * (len(methods) + 1)]
    for name in names:
        cells = [f"{found[name, m]['vs_base']:.2f}" if (name, m) in found else "" for m in methods]
        lines.append(f"| {name} | {found[name, 'base']['p50_us']:.1f} | {' | '.join(cells)} |")
    peaks = [
        f"{r['case']}: {r['method']} {r['peak_mb']:.0f} MB" for r in rows if "training" in r["case"] and r["peak_mb"]
    ]
    return "\n".join([*lines, *peaks])


def patch(part, rows, commit, sm):
    """Lines for docs/gpu-status.md and csrc/cuda.h: for how many rows the kernels beat the composed form."""
    found = {(r["case"], r["method"]): r["p50_us"] for r in rows}
    ratios = {}
    for case in {case for case, method in found if method == "fastlora_kernels"}:
        m = int(re.search(r"/m(\d+)/", case + "/")[1]) if re.search(r"/m(\d+)/", case) else None
        if m and (case, "fastlora") in found:
            ratios.setdefault(m, []).append(found[case, "fastlora_kernels"] / found[case, "fastlora"])
    faster = sorted(m for m, of in ratios.items() if max(of) < 1)
    said = f"sm_{sm}, {faster[0]} to {faster[-1]} rows, {commit}" if faster else f"sm_{sm}, not faster, {commit}"
    lines = []
    if not ratios:
        return f"docs/gpu-status.md: nothing to change, the kernels did not run ({backends.cuda_missing() or part})"
    for line in STATUS.read_text().splitlines():
        if "CUDA C++" in line and any(f"`{op}`" in line for op in OPS.get(part, ())):
            lines += [f"-{line}", f"+{line.replace(NEVER, said)}"]
    if faster:
        lines.append(f"csrc/cuda.h: {', '.join(OPS[part])}: {sm}, {faster[0]}, {faster[-1]}")
    return "\n".join(lines or ["docs/gpu-status.md: no row speaks of this part"])


if __name__ == "__main__":
    main()
