"""Every instruction set that this CPU has, and the composed form, each in a process pinned by FASTLORA_CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora import backends

HERE = Path(__file__).parent
PROBE = "import torch, fastlora; fastlora.lora_linear(*[torch.ones(s) for s in ((1, 2), (3, 2), (1, 2), (3, 1))])"


@pytest.mark.skipif(backends.native()[0] is None, reason="fastlora._C is not built")
@pytest.mark.parametrize("form", ["portable", "avx2", "avx512", "avx512_bf16", "amx", "composed"])
def test_form(form):
    env = {**os.environ, "FASTLORA_CPU": form}
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=env)
    if probe.returncode and "lacks it" in probe.stderr:
        pytest.skip(f"no {form} here")
    assert probe.returncode == 0, probe.stderr[-2000:]
    pytest_script = Path(sys.executable).with_name("pytest")
    files = [str(HERE / name) for name in ("test_linear.py", "test_halves.py", "test_dropout.py")]
    command = [pytest_script, "-q", "-x", "-k", "native or mask", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-4000:]
