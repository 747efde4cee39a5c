"""The `fastlora` namespace of torch.library: how an op is declared."""

import functools
import numbers

import torch
from torch.utils import _pytree as pytree

from fastlora import backends
from fastlora.ops import check

lib = torch.library.Library("fastlora", "FRAGMENT")
# what `autograd_in_python` takes, of each op
formulas = []


def define(name, arguments, returns, fake, check=None, reference=None):
    """Declare fastlora::<name> with its fake, and the overload `.python` that walks the back-ends written in Python.

    C++ kernels take the CPU and CUDA keys where `_C` is built; other devices and pinned back-ends walk. The overload
    `.reference` is for calls that a C++ kernel does not take.
    """

    def checked_fake(*args):
        if check:
            check(*args)
        return fake(*args)

    walk = backends.kernel(name, check)
    kernels = {name: walk, f"{name}.python": walk}
    if reference:
        backends.references[name] = kernels[f"{name}.reference"] = reference
    for overload, kernel in kernels.items():
        lib.define(f"{overload}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        lib.impl(overload, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", checked_fake, lib=lib)
    return getattr(torch.ops.fastlora, name).default


def differentiable(name, arguments, wanted, check, fake, references, apart=None, kept=()):
    """Declare an op and its `_backward`, of which `references` are the two; returns the op.

    The backward takes dy, the arguments but the one at `apart`, what the forward has `kept`, and which gradients are
    needed of those of the arguments at `wanted`, which it returns; where the one apart is among these it is a bias.
    An op that keeps anything is the first result of its `_forward`, which returns that too.
    """
    results = ", ".join(["Tensor"] * (1 + len(kept)))
    forward = op = define(f"{name}_forward" if kept else name, arguments, f"({results})", fake, check, references[0])
    if kept:
        op = define(name, arguments, "Tensor", lambda *args: fake(*args)[0], check)

    def blank(t, need, like):
        if isinstance(t, (list, tuple)):
            return [a.new_empty(a.shape) for a in t] if need else []
        return t.new_empty(t.shape) if need else like.new_empty(0)

    def blanks(dy, *args):
        """Fresh tensors as the gradients, empty ones where none is needed."""
        *given, needs = args
        if apart is not None:
            given.insert(apart, dy.new_empty(dy.shape[-1]))
        return tuple(blank(given[i], need, args[0]) for i, need in zip(wanted, needs, strict=True))

    given = arguments.split(", ")
    grads = ["Tensor[]" if given[i].startswith("Tensor[]") else "Tensor" for i in wanted]
    rest = [argument for i, argument in enumerate(given) if i != apart] + [f"Tensor {result}" for result in kept]
    schema = ", ".join(["Tensor dy", *rest, f"bool[{len(wanted)}] needs"])
    backward = define(f"{name}_backward", schema, f"({', '.join(grads)})", blanks, reference=references[1])
    formulas.append((op, forward, backward, wanted, apart))
    return op


def autograd_in_python(op, forward, backward_op, wanted, apart):
    """The formula of `differentiable` where `_C` is missing; the one apart gets dy where it is not wanted."""

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

    torch.library.register_autograd(forward, backward, setup_context=setup)
    if op is not forward:
        lib.impl(op, lambda *args: forward(*args)[0], "Autograd")


def autocast_in_python(op):
    """Autocast where `_C` is missing: of x, weight, bias, and of adapters that are not float32."""

    def cast(name, value, dtype):
        if name in ("lora_A", "lora_B"):
            return [t if t.dtype == torch.float32 else cast("x", t, dtype) for t in value]
        chosen = name in ("x", "weight", "bias") and value is not None
        return value.to(dtype) if chosen and value.is_floating_point() and value.dtype != torch.float64 else value

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args, device=device, key=key):
            dtype, arguments = torch.get_autocast_dtype(device), op._schema.arguments
            args = [cast(argument.name, value, dtype) for argument, value in zip(arguments, args, strict=True)]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return op(*args)

        lib.impl(op, kernel, key)


def scalar(value):
    """A Python number as a 0-d CPU tensor, which every device accepts, cached where no mode runs; a tensor as it is."""
    if isinstance(value, torch.Tensor):
        return value
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.full((), float(value), device="cpu")
    if type(value) not in (float, int):
        check.kind(isinstance(value, numbers.Real), "scaling", type(value).__name__, "a number or a tensor")
    return _number(value)


@functools.lru_cache(4096)
def _number(value):
    with torch.inference_mode(False):
        return torch.tensor(float(value), device="cpu")
