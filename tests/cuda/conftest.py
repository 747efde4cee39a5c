"""The tests of this folder share harness.py."""

import sys
from pathlib import Path

import pytest
import torch
from exactness import poison

from fastlora import backends

sys.path.append(str(Path(__file__).parent))

import harness  # noqa: E402


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors are small here: waking a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=harness.MODES)
def emulated(request):
    """The emulator's library, in which CUDA kernels run on CPU tensors; `launches()` counts since it was asked last."""
    library, native = harness.build(request.param), backends.native()[0]
    assert native.load_cuda(str(library)) == ""
    native.pin_gpu("kernels")
    count, before = harness.Library(library).library.emulate_launches, 0

    def launches():
        nonlocal before
        seen, before = count() - before, count()
        return seen

    launches()
    with poison():
        yield launches
    native.pin_gpu("")
    assert "cannot open shared object file" in native.load_cuda("/nowhere")


@pytest.fixture
def capability(emulated):
    """Sets the emulated GPU's compute capability, 86 at first."""
    libraries = [harness.Library(harness.build(mode)).library for mode in harness.MODES]

    def to(asked):
        for library in libraries:
            library.emulate_capability(asked)

    to(86)
    yield to
    to(80)
