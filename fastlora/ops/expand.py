"""y + (z ⊙ g) lora_Bᵀ, the second half of the update."""

import torch

from fastlora import backends
from fastlora.ops import check
from fastlora.ops.gate import expand_gate, gate_backward
from fastlora.ops.library import define, scalar
from fastlora.ops.shrink import apart, flat, join


def lora_expand(y, z, lora_B, scaling=1.0, *, gates=None, ranks=None, columns=None):
    """y with the low-rank update added: y + (z ⊙ g) lora_Bᵀ, to all columns or to columns start:stop.

    y (..., out) is never written; z (..., R) from `lora_shrink`; lora_B (stop − start, R), or a sequence, one per
    adapter. `scaling`, `gates`, `ranks` as in `lora_linear`. Returns a new tensor of y's shape and dtype. Serves
    layers whose base is no dense matrix: embeddings, convolutions, quantised or opaque modules. Raises ValueError or
    TypeError that names the argument. Source: Hu et al. 2021, arXiv 2106.09685.
    """
    B = check.tensors("lora_B", lora_B)
    if ranks is None:
        ranks = [] if isinstance(lora_B, torch.Tensor) else [b.shape[1] for b in B]
    return lora_expand_op(y, z, B, scalar(scaling), gates, ranks, () if columns is None else columns)


def _cut(y, columns):
    start, stop = columns or (0, y.shape[-1])
    return y[..., start:stop]


def add_update(y, z, lora_B, g):
    """y + (z ⊙ g) lora_Bᵀ in z's dtype."""
    for zb, b in zip((z * g).split([b.shape[1] for b in lora_B], -1), lora_B, strict=True):
        y = y + zb @ b.T.to(zb.dtype)
    return y


def lora_expand_reference(y, z, lora_B, scaling, gates, ranks, columns):
    g = expand_gate(scaling, gates, ranks, y.device, z.dtype)
    out = y.clone(memory_format=torch.contiguous_format)
    _cut(out, columns).copy_(add_update(_cut(y, columns).to(z.dtype), z, lora_B, g))
    return out


def lora_expand_backward_reference(dy, z, lora_B, scaling, gates, ranks, columns, needs):
    """With t = dy lora_B: dz = t ⊙ g, dB = dyᵀ (z ⊙ g), dg = t ⊙ z."""
    need_z, need_B, need_scaling, need_gates = needs
    dy = _cut(dy, columns).to(z.dtype)
    g = expand_gate(scaling, gates, ranks, dy.device, z.dtype)
    t = join([dy @ b.to(dy.dtype) for b in lora_B], dy, dy.dtype)
    dz = (t * g).contiguous() if need_z else z.new_empty(0)
    dB = apart(flat(dy).T @ flat(z * g), lora_B, 1) if need_B else []
    dscaling, dgates = gate_backward(t * z, scaling, gates, ranks)
    return dz, dB, dscaling if need_scaling else z.new_empty(0), dgates if need_gates else z.new_empty(0)


def _fake(y, z, lora_B, scaling, gates, ranks, columns):
    check.expand(y, z, lora_B, scaling, gates, ranks, columns)
    return y.new_empty(y.shape)


def _backward_fake(dy, z, lora_B, scaling, gates, ranks, columns, needs):
    return (
        z.new_empty(z.shape if needs[0] else (0,)),
        [b.new_empty(b.shape) for b in lora_B] if needs[1] else [],
        scaling.new_empty(scaling.shape) if needs[2] else z.new_empty(0),
        gates.new_empty(gates.shape) if needs[3] else z.new_empty(0),
    )


backends.register("lora_expand", "reference", lora_expand_reference)
backends.register("lora_expand_backward", "reference", lora_expand_backward_reference)
_SHARED = "Tensor z, Tensor[] lora_B, Tensor scaling, Tensor? gates, int[] ranks, int[] columns"
lora_expand_op = define("lora_expand", f"Tensor y, {_SHARED}", "Tensor", _fake, check.expand)
lora_expand_backward_op = define(
    "lora_expand_backward", f"Tensor dy, {_SHARED}, bool[4] needs", "(Tensor, Tensor[], Tensor, Tensor)", _backward_fake
)


def _setup(ctx, inputs, output):
    _, z, lora_B, scaling, gates, ctx.ranks, ctx.columns = inputs
    ctx.save_for_backward(z, scaling, gates, *lora_B)


def _backward(ctx, dy):
    z, scaling, gates, *lora_B = ctx.saved_tensors
    need_y, need_z, _, need_scaling, need_gates = ctx.needs_input_grad[:5]
    needs = [need_z, any(b.requires_grad for b in lora_B), need_scaling, need_gates]
    grads = lora_expand_backward_op(dy, z, lora_B, scaling, gates, ctx.ranks, ctx.columns, needs)
    dz, dB, dscaling, dgates = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    dB = [None] * len(lora_B) if dB is None else dB
    # register_autograd counts an empty list as a list of tensors, one with numbers as a leaf
    return dy if need_y else None, dz, dB, dscaling, dgates, ctx.ranks and None, ctx.columns and None


def register_python_autograd():
    """The autograd formula and autocast where `_C` is missing."""
    torch.library.register_autograd("fastlora::lora_expand", _backward, setup_context=_setup)
