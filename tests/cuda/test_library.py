"""The library of all CUDA kernels as setup.py makes it: for both architectures, loaded where there is no GPU."""

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys

import harness
import pytest

# test_ptx.py compiles the same sources among the quick tests
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "-q", "build_cuda", "--folder", folder]
    environment = {**os.environ, "FASTLORA_CUDA": "1", "FASTLORA_REQUIRE_EXT": "1"}
    done = subprocess.run(command, cwd=harness.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "_cuda.so"


def test_it_has_every_launcher(built):
    library = ctypes.CDLL(str(built))
    declared = re.findall(r'^extern "C" .*?(\w+)\(', (harness.KERNELS / "params.h").read_text(), re.M)
    assert len(declared) > 3 and all(hasattr(library, name) for name in declared)


def test_it_shows_nothing_else(built):
    """The CUDA runtime in it is its own: neither torch's takes its place, nor the other way round."""
    listed = subprocess.run(["nm", "-D", "--defined-only", built], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    assert names and all(name.startswith(("launch_", "fastlora_")) for name in names), names
    needed = subprocess.run(["ldd", built], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed and "torch" not in needed


def codes(binary):
    """(sm, "ptx" or "cubin") of all that is in nvcc's containers: 16 bytes of head, then entries with heads."""
    at = -1
    while (at := binary.find(struct.pack("<I", 0xBA55ED50), at + 1)) >= 0:
        _, _, head, size = struct.unpack_from("<IHHQ", binary, at)
        entry, end = at + head, at + head + size
        while entry < end:
            kind, _, head, size = struct.unpack_from("<HHIQ", binary, entry)
            yield struct.unpack_from("<I", binary, entry + 28)[0], {1: "ptx", 2: "cubin"}[kind]
            entry += head + size


def test_it_has_code_for_both_architectures(built):
    found, kernels = list(codes(built.read_bytes())), len(list(harness.KERNELS.glob("*.cu")))
    assert [found.count(code) for code in ((80, "cubin"), (90, "cubin"), (90, "ptx"))] == [kernels] * 3
