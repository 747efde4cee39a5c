"""LoraHub on real data: the example runs to its end, with the figures that it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_experts_are_composed_for_another_domain():
    pytest.importorskip("transformers")
    pytest.importorskip("nevergrad")
    done = subprocess.run([sys.executable, ROOT / "examples" / "lorahub.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = dict(re.findall(r"^   (\S.+?)  +((?:\d+\.\d *){3})$", done.stdout, re.MULTILINE))
    found = {name: [float(cell) for cell in cells.split()] for name, cells in rows.items()}
    assert len(found) == 7 and all(100 > value > 45 for values in found.values() for value in values)
    # with 50 texts a composition is at least about as good as none
    composed = [values[-1] for name, values in found.items() if "LoraHub" in name or "sum" in name]
    assert len(composed) == 3 and max(composed) > found["the frozen encoder"][-1] - 2
