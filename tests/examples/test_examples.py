"""The examples on real data run to their end, with the figures that they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(name, *arguments):
    pytest.importorskip("transformers")
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def numbers(output, row):
    """The numbers of a table's row."""
    line = re.search(rf"^ +{re.escape(row)} +([\d. ]+)", output, re.MULTILINE)
    assert line, output
    return [float(cell) for cell in line[1].split()]


def test_tasks():
    output = run("tasks.py")
    found = [numbers(output, row) for row in ("a head on the frozen encoder", "four runs", "four tasks of one model")]
    assert [len(values) for values in found] == [5, 5, 5]
    head, four_runs, four_tasks = (values[-1] for values in found)
    assert 90 > four_tasks > head + 2 > 70
    assert abs(four_tasks - four_runs) < 1


def test_dylora(tmp_path):
    plot = tmp_path / "ranks.png"
    output = run("dylora.py", plot)
    one_run, eight_runs = numbers(output, "one DyLoRA run"), numbers(output, "8 LoRA runs")
    assert len(one_run) == len(eight_runs) == 9
    assert min(one_run[:8] + eight_runs[:8]) > 70
    assert plot.read_bytes().startswith(b"\x89PNG")
