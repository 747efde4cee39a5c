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


def test_xlora(tmp_path):
    picture = tmp_path / "gates.png"
    output = run("xlora.py", picture)
    plain, average, mixed = (numbers(output, row) for row in
                             ("the encoder without experts", "the average of the experts", "the mixture"))  # fmt: skip
    assert len(plain) == len(average) == len(mixed) == 5
    assert 90 > mixed[-1] > plain[-1] + 1 > 70
    assert "largest difference of an output 0.0e+00" in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_xlora_smollm2():
    output = run("xlora_smollm2.py")
    plain, mixed = numbers(output, "SmolLM2"), numbers(output, "the mixture")
    assert len(plain) == len(mixed) == 4 and mixed[-1] < plain[-1] - 0.05
    assert "the same tokens: yes" in output


def test_lorahub():
    pytest.importorskip("nevergrad")
    output = run("lorahub.py")
    rows = dict(re.findall(r"^   (\S.+?)  +((?:\d+\.\d *){3})$", output, re.MULTILINE))
    found = {name: [float(cell) for cell in cells.split()] for name, cells in rows.items()}
    assert len(found) == 7 and all(100 > value > 45 for values in found.values() for value in values)
    # with 50 texts a composition is at least about as good as none
    composed = [values[-1] for name, values in found.items() if "LoraHub" in name or "sum" in name]
    assert len(composed) == 3 and max(composed) > found["the frozen encoder"][-1] - 2
