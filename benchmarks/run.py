"""Time an op against its baselines: `python -m benchmarks.run --op linear --device cpu`.

First the op's tests run: nothing is timed while they are red. Rows go to benchmarks/results/<device>.csv, in which a
case and method has one row, its latest; the summary figures are rows too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from . import machine, table
from .cases import GATES, OPS, LinearCase, cases, methods
from .measure import measure

RESULTS = Path(__file__).parent / "results"
RERUN_ABOVE = 1.15


def main(argv=None):
    args = _parse(argv)
    torch.manual_seed(0)
    if args.child:
        case = next(c for c in cases(args.op, args.device) if c.name == args.child)
        print(json.dumps(measure(case, args.device, methods(case), args.seconds)))
        return
    _gate(args.op)
    facts = machine.facts(args.device)
    path = args.out or RESULTS / f"{machine.slug(facts['device'])}.csv"
    chosen = [c for c in cases(args.op, args.device) if args.only in c.name]
    if not chosen:
        raise SystemExit(f"no case of {args.op} has {args.only!r} in its name")
    for case in chosen:
        rows = measure(case, args.device, methods(case), args.seconds)
        if args.device == "cpu" and _is_suspect(case, rows):
            rows = _median_of_three(case, rows, args)
        table.update(path, [{**row, **facts} for row in rows])
        print(table.line(case.name, rows), flush=True)
    table.update(path, [{**row, **facts} for row in table.figures(table.read(path))])
    print(table.show_figures(path))


def _parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, default="linear")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases with this in their name")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each method of a case")
    parser.add_argument("--out", type=Path, metavar="CSV")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _gate(op):
    beside = Path(sys.executable).with_name("pytest")
    command = [beside if beside.exists() else "pytest", "-q", "-x", "-m", "not slow", *GATES[op]]
    # The tests pin the back-ends that they need.
    env = {name: value for name, value in os.environ.items() if name != "FASTLORA_BACKEND"}
    done = subprocess.run(command, cwd=RESULTS.parents[1], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-3000:]}\n{op} is not timed: {' '.join(GATES[op])} did not pass")
    print(f"tests of {op}: {done.stdout.strip().splitlines()[-1]}", flush=True)


def _is_suspect(case, rows):
    if not isinstance(case, LinearCase) or case.mode != "forward":
        return False
    return next(r for r in rows if r["method"] == "fastlora")["vs_base"] > RERUN_ABOVE


def _median_of_three(case, rows, args):
    """The case twice more, each in a process of its own, and of every number the middle one."""
    command = [sys.executable, "-m", "benchmarks.run", "--op", args.op, "--device", args.device]
    command += ["--seconds", str(args.seconds), "--child", case.name]
    runs = [rows]
    for _ in range(2):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    middle = []
    for same in zip(*runs, strict=True):
        numbers = {k: statistics.median(r[k] for r in same) for k, v in same[0].items() if isinstance(v, float)}
        middle.append({**same[0], **numbers, "dropped": sum(r["dropped"] for r in same), "runs": 3})
    return middle


if __name__ == "__main__":
    main()
