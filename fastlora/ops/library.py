"""The `fastlora` namespace of torch.library: how an op is declared."""

import numbers

import torch

from fastlora import backends
from fastlora.ops import check

lib = torch.library.Library("fastlora", "FRAGMENT")


def define(name, arguments, returns, fake, check=None):
    """Declare fastlora::<name> with its fake, and the overload `.python` that walks the back-ends written in Python.

    C++ kernels take the CPU and CUDA keys where `_C` is built; every other device, and every pinned back-end, comes
    through `backends.run`.
    """
    kernel = backends.kernel(name, check)
    for overload in (name, f"{name}.python"):
        lib.define(f"{overload}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        lib.impl(overload, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=lib)
    return getattr(torch.ops.fastlora, name).default


def autocast_in_python(name, cast, adapters):
    """Autocast where `_C` is missing: the arguments at the positions in `cast` get the autocast dtype.

    So do the half tensors of the lists at the positions in `adapters`; float32 masters stay, which the kernels take.
    """
    op = getattr(torch.ops.fastlora, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args, device=device, key=key):
            dtype = torch.get_autocast_dtype(device)
            args = list(args)
            for i in adapters:
                args[i] = [t if t.dtype == torch.float32 else t.to(dtype) for t in args[i]]
            for i in cast:
                if args[i] is not None and args[i].is_floating_point() and args[i].dtype != torch.float64:
                    args[i] = args[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return op(*args)

        lib.impl(name, kernel, key)


def scalar(value):
    """A Python number as a 0-d CPU tensor (every device accepts one), cached by value; a tensor as it is."""
    if isinstance(value, torch.Tensor):
        return value
    if torch.compiler.is_compiling():
        return torch.full((), float(value))
    if type(value) not in (float, int):
        check.kind(isinstance(value, numbers.Real), "scaling", type(value).__name__, "a number or a tensor")
    cached = _scalars.get(value)
    if cached is None:
        if len(_scalars) >= 4096:
            _scalars.clear()
        with torch.inference_mode(False):
            cached = _scalars[value] = torch.tensor(float(value))
    return cached


_scalars = {}
