"""Which implementations exist, which one runs a call, and why the others do not.

`reference` (plain torch), `native` (C++: vectorised on a CPU, ATen calls or CUDA C++ on CUDA) and `triton`. The first
in a device's order that has no objection runs. Where `_C` is built its kernels on the CPU and CUDA keys are `native`:
they run without asking here, unless another back-end is pinned.
"""

import contextlib
import functools
import importlib
import os
import warnings
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

NAMES = ("reference", "native", "triton")
BUILD = "python -m fastlora build   (or: pip install --no-build-isolation <the source folder of fastlora-kernels>)"
_ORDER = ("native", "reference")
# a Triton kernel stands here only once docs/gpu-status.md lists it as run and faster, or verified where it runs
_EARLIER = {("lora_dropout", "cuda"): ("triton", "reference")}

# op -> its plain-torch form, with its signature
references = {}
# (op, back-end) -> verify(implementation, *args), None or a sentence: one more objection; it caches what it can
verifications = {}
_pinned = None
_noticed = False


@functools.cache
def native():
    """(`fastlora._C` or None, None or the sentence that says why it is missing)."""
    try:
        module = importlib.import_module("fastlora._C")
    except ImportError as error:
        return None, f"fastlora._C is not there ({error}); build it with: {BUILD}"
    built, running = (version.split("+")[0] for version in (module.torch_version(), torch.__version__))
    if built != running:
        return None, f"fastlora._C was built for torch {built} and this is {running}; build it again with: {BUILD}"
    module.register_ops()
    return module, None


@functools.cache
def cuda_missing():
    """None, or why the library of CUDA kernels is not there; the first call opens it."""
    module, missing = native()
    path = Path(os.environ.get("FASTLORA_CUDA_LIBRARY") or Path(__file__).with_name("_cuda.so"))
    if missing or not path.exists():
        return missing or f"{path.name} was not built; on a machine with nvcc: FASTLORA_CUDA=1 {BUILD}"
    return module.load_cuda(str(path.resolve())) or None


def gpu_form(op, args):
    """What `native` runs an op by on a GPU, and why; None where it has no choice."""
    module, op = native()[0], f"{op}_forward" if f"{op}_forward" in references else op
    row = next((row for row in module.cuda_statuses() if row[0] == op), None) if module else None
    if not row or _device(args) != "cuda":
        return None
    x = args[op in ("lora_linear_backward", "lora_shrink_backward")]
    sizes = [x.shape[:-1].numel(), *(n for t in tree_leaves(args) if isinstance(t, torch.Tensor) for n in t.shape)]
    why = cuda_missing() or _lies_otherwise(op, x, args)
    if not why:
        major, minor = torch.cuda.get_device_capability(x.device)
        why = module.cuda_objection(row, sizes, x.dtype in (torch.bfloat16, torch.float16), 10 * major + minor, None)
    return f"composed of ATen calls; {why}" if why else f"CUDA C++: {row[1]}"


def _lies_otherwise(op, x, args):
    """Why the CUDA kernels do not read these tensors, or None; csrc/cuda.cpp decides."""
    weight = {"lora_linear_forward": 1, "lora_linear_backward": 2}.get(op)
    if weight and 1 not in args[weight].stride():
        return "weight: neither rows nor columns lie together"
    if op == "lora_routed_forward":
        A, pages = args[2], args[10]
        lie = pages and all(t.dtype == x.dtype and t.stride(-1) == 1 and t.numel() for t in pages[:2])
        lie = lie and pages[2].shape[1]
        if A or not lie or pages[0].shape[1] > 8:
            return "the kernels read adapters from pages of x's type, whose rank rows lie together, of at most 8 slices"
    return None if x.numel() else "x is empty"


def _triton(op):
    try:
        kernels = importlib.import_module("fastlora.kernels")
    except ImportError as error:
        sentence = f"Triton's kernels cannot be imported: {error}"
        return None, lambda *args: sentence
    if not hasattr(kernels, op):
        return None, lambda *args: f"there is no Triton kernel for {op}"
    return getattr(kernels, op), getattr(kernels, f"{op}_objection", kernels.objection)


def _native(op):
    def objection(*args):
        missing = native()[1]
        if missing:
            return missing
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(_device(args))
        has = key and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{op}", key)
        return None if has else f"native has no {op} for {_device(args)} tensors"

    return getattr(torch.ops.fastlora, op).default, objection


def _device(args):
    return next(a.device.type for a in args if isinstance(a, torch.Tensor))


@functools.cache
def _implementation(op, backend):
    """(the back-end's form of the op, objection(*args): None or a sentence)"""
    if backend == "native":
        return _native(op)
    if f"{op}_forward" in references:
        # in every back-end written in Python it is that one's first result
        whole, object_ = _implementation(f"{op}_forward", backend)
        return lambda *args: whole(*args)[0], object_
    return _triton(op) if backend == "triton" else (references[op], lambda *args: None)


def objection(op, backend, *args):
    """None if the back-end takes this call, else a sentence."""
    implementation, object_ = _implementation(op, backend)
    why = object_(*args)
    verify = verifications.get((op, backend))
    return verify(implementation, *args) if why is None and verify else why


def order(op, *args):
    return (_pinned,) if _pinned else _EARLIER.get((op, _device(args)), _ORDER)


def passed_over():
    """Why a back-end without objection is not asked."""
    if _pinned:
        return f"{_pinned} is pinned"
    return "no default here: docs/gpu-status.md does not list it as run and faster; use_backend() pins it"


def kernel(op, check=None):
    """The op's kernel where no C++ one runs: it checks the arguments and runs the first back-end without objection."""

    def run(*args):
        global _noticed
        # where no C++ formula refuses it: the formulas in Python drop tangents without a word
        if torch.autograd.forward_ad._current_level >= 0:
            raise NotImplementedError("fastlora: forward-mode AD (jvp) is not implemented")
        if check:
            check(*args)
        passed = []
        for backend in order(op, *args):
            why = objection(op, backend, *args)
            if why is None:
                if passed and not _noticed:
                    _noticed, slower = True, f"{op} runs on the slower back-end {backend!r}. {'; '.join(passed)}"
                    warnings.warn(f"fastlora: {slower}", stacklevel=2)
                return _implementation(op, backend)[0](*args)
            passed.append(f"{backend}: {why}")
        raise NotImplementedError(f"fastlora::{op}: no back-end takes this call. {'; '.join(passed)}")

    return run


def _pin(name, source=None):
    global _pinned
    if source and name not in NAMES:
        raise ValueError(f"fastlora: {source}: got {name!r}, expected one of {NAMES}")
    _pinned = name
    if native()[0]:
        native()[0].pin_elsewhere(name not in (None, "native"))


@contextlib.contextmanager
def use_backend(name):
    """Pin a back-end ("reference", "native", "triton") for the whole process while the block runs.

    A pinned back-end that objects to a call raises NotImplementedError with its sentence; it does not fall back. The
    environment variable FASTLORA_BACKEND pins one from the start. Raises ValueError for another name.
    """
    before = _pinned
    _pin(name, "backend")
    try:
        yield
    finally:
        _pin(before)


def pin_from_environment():
    """Honour FASTLORA_BACKEND and FASTLORA_GPU; called once the ops are declared."""
    if native()[0]:
        cuda_missing()
        native()[0].pin_gpu(os.environ.get("FASTLORA_GPU", ""))
    if os.environ.get("FASTLORA_BACKEND"):
        _pin(os.environ["FASTLORA_BACKEND"], "FASTLORA_BACKEND")
