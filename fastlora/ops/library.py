"""The `fastlora` namespace of torch.library: how an op is declared."""

import numbers

import torch
from torch.utils import _pytree as pytree

from fastlora import backends
from fastlora.ops import check

lib = torch.library.Library("fastlora", "FRAGMENT")


def define(name, arguments, returns, fake, check=None, reference=None):
    """Declare fastlora::<name> with its fake, and the overload `.python` that walks the back-ends written in Python.

    C++ kernels take the CPU and CUDA keys where `_C` is built; other devices and pinned back-ends walk. The overload
    `.reference` is for calls that a C++ kernel does not take.
    """
    walk = backends.kernel(name, check)
    kernels = {name: walk, f"{name}.python": walk, **({f"{name}.reference": reference} if reference else {})}
    for overload, kernel in kernels.items():
        lib.define(f"{overload}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        lib.impl(overload, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=lib)
    return getattr(torch.ops.fastlora, name).default


def blanks(given, needs, like):
    """The fake of a backward: fresh tensors as the gradients of `given`, empty ones where none is needed."""

    def blank(t, need):
        if isinstance(t, (list, tuple)):
            return [a.new_empty(a.shape) for a in t] if need else []
        return t.new_empty(t.shape) if need else like.new_empty(0)

    return tuple(blank(t, need) for t, need in zip(given, needs, strict=True))


def autograd_in_python(name, wanted, apart=None):
    """The autograd formula where `_C` is missing, from the op's `_backward`.

    That takes dy, the arguments but the one at `apart`, the results but the first, and which gradients are needed of
    those of the arguments at `wanted`, which it returns. Where the one apart is none of these it gets dy.
    """
    backward_op = getattr(torch.ops.fastlora, f"{name.removesuffix('_forward')}_backward").default

    def setup(ctx, inputs, output):
        more = output[1:] if isinstance(output, tuple) else ()
        ctx.mark_non_differentiable(*more)
        leaves, ctx.spec = pytree.tree_flatten([t for i, t in enumerate((*inputs, *more)) if i != apart])
        ctx.save_for_backward(*(t if isinstance(t, torch.Tensor) else None for t in leaves))
        ctx.others = [None if isinstance(t, torch.Tensor) else t for t in leaves]
        # torch wants a list for a list of tensors, as which it counts an empty one of numbers too
        lists = [isinstance(t, (list, tuple)) and all(isinstance(a, torch.Tensor) for a in t) for t in inputs]
        ctx.none = [[None] * len(t) if several else None for t, several in zip(inputs, lists, strict=True)]

    def backward(ctx, dy, *_):
        saved = [other if t is None else t for t, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        needs = [any(need) if isinstance(need, (list, tuple)) else need for need in ctx.needs_input_grad]
        found = backward_op(dy, *pytree.tree_unflatten(saved, ctx.spec), [needs[i] for i in wanted])
        grads = {apart: dy, **dict(zip(wanted, found, strict=True))}
        return tuple(grads[i] if i in grads and needs[i] else none for i, none in enumerate(ctx.none))

    torch.library.register_autograd(f"fastlora::{name}", backward, setup_context=setup)


def autocast_in_python(name, cast, adapters):
    """Autocast where `_C` is missing: the arguments at `cast`, and what is not float32 in the lists at `adapters`."""
    op = getattr(torch.ops.fastlora, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args, device=device, key=key):
            dtype = torch.get_autocast_dtype(device)
            args = list(args)
            for i in adapters:
                args[i] = [t.to(dtype) if t.dtype in (torch.bfloat16, torch.float16) else t for t in args[i]]
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
