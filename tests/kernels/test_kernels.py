"""The Triton kernels without a GPU: under Triton's interpreter, and compiled ahead of time.

Each runs in a process of its own: the interpreter is chosen when Triton is imported, and the compiler does not work
beside it. `check_*.py` also run on a GPU as they are: `cd tests/kernels && python -m pytest check_*.py`.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# A folder made by `pip install --no-deps --target FOLDER 'triton==3.6.*'`.
OLDER = os.environ.get("FASTLORA_TRITON_36")
SECOND = [pytest.mark.slow, pytest.mark.skipif(not OLDER, reason="no FASTLORA_TRITON_36")]
VERSIONS = [pytest.param(None, id="installed"), pytest.param(OLDER, id="3.6", marks=SECOND)]


def run(triton, *arguments, **variables):
    """Python in this folder, with the Triton of a folder before the installed one."""
    path = os.pathsep.join(filter(None, [triton, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(autouse=True)
def has_triton():
    pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("triton", VERSIONS)
def test_interpreted(triton):
    def half(checks):
        return run(triton, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *checks, TRITON_INTERPRET="1")

    checks = sorted(file.name for file in HERE.glob("check_*.py"))
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(half, (checks[::2], checks[1::2])):
            assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("triton", VERSIONS)
def test_compiled(triton):
    """Registers, spills, shared memory and pipelining are no worse than kernels/resources.json says."""
    done = run(triton, "aot.py", "--check")
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
