"""z = D(x) lora_Aᵀ, the first half of the update."""

import torch
import torch.nn.functional as F

from fastlora.ops import check
from fastlora.ops.dropout import draw_seed, dropped, wide
from fastlora.ops.library import differentiable


def lora_shrink(x, lora_A, *, dropout_p=0.0, training=False, seed=None):
    """The rank-R image of x: z = D(x) lora_Aᵀ.

    x (..., in); lora_A (R, in), or a sequence of (r_e, in) whose results stand side by side. Returns z (..., R) in
    float32 (float64 for float64 x), before any gate. D is dropout with probability `dropout_p` when `training`; its
    mask is a function of `seed`, a 0-d int64 tensor on x's device, drawn from torch's generator when None.
    Raises ValueError or TypeError that names the argument. Source: Hu et al. 2021, arXiv 2106.09685.
    """
    check.probability(dropout_p)
    if not training or dropout_p == 0:
        dropout_p, seed = 0.0, None
    elif seed is None:
        seed = draw_seed(x)
    return lora_shrink_op(x, check.tensors("lora_A", lora_A), dropout_p, seed)


def join(parts, like, dtype):
    """The adapters' columns side by side, (..., R)."""
    return torch.cat(parts, -1) if parts else like.new_empty((*like.shape[:-1], 0), dtype=dtype)


def flat(t):
    """(..., n) as (M, n)."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def apart(total, adapters, dim):
    """Each adapter's part of one product for all: a lone rank row's own would be a matrix-vector one, less exact."""
    parts = total.split([t.shape[dim] for t in adapters], dim)
    whole = torch.contiguous_format
    return [p.to(t.dtype, copy=True, memory_format=whole) for p, t in zip(parts, adapters, strict=True)]


def lora_shrink_reference(x, lora_A, dropout_p, seed):
    d = dropped(x, dropout_p, seed)
    return join([F.linear(d, a.to(d.dtype)) for a in lora_A], x, d.dtype)


def lora_shrink_backward_reference(dz, x, lora_A, dropout_p, seed, needs):
    """dx = D(dz lora_A), dA = dzᵀ D(x)."""
    need_x, need_A = needs
    parts = dz.to(wide(x)).split([a.shape[0] for a in lora_A], -1)
    dx, dA = x.new_empty(0), []
    if need_x:
        d = sum((g @ a.to(g.dtype) for g, a in zip(parts, lora_A, strict=True)), torch.zeros_like(x, dtype=wide(x)))
        dx = dropped(d, dropout_p, seed).to(x.dtype)
    if need_A:
        dA = apart(flat(dz.to(wide(x))).T @ flat(dropped(x, dropout_p, seed)), lora_A, 0)
    return dx.contiguous(), dA


def _fake(x, lora_A, dropout_p, seed):
    return x.new_empty((*x.shape[:-1], sum(a.shape[0] for a in lora_A)), dtype=wide(x))


_ARGUMENTS = "Tensor x, Tensor[] lora_A, float dropout_p, Tensor? seed"
_REFERENCES = lora_shrink_reference, lora_shrink_backward_reference
lora_shrink_op = differentiable("lora_shrink", _ARGUMENTS, (0, 1), check.shrink, _fake, _REFERENCES)
