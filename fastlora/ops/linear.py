"""y = c ⊙ (x Wᵀ + ((D(x) lora_Aᵀ) ⊙ g) lora_Bᵀ) + bias, the one formula.

Backward, with z = D(x) lora_Aᵀ, u = x Wᵀ + (z ⊙ g) lora_Bᵀ, dv = c ⊙ dy and t = dv lora_B:

    dz = t ⊙ g        dx = dv W + D(dz lora_A)        dA = dzᵀ D(x)        dB = dvᵀ (z ⊙ g)
    dg = t ⊙ z        dc = Σ dy ⊙ u                   dbias = Σ dy         dW = dvᵀ x, only if W requires grad
"""

import torch
import torch.nn.functional as F

from fastlora.ops import check
from fastlora.ops.dropout import draw_seed, wide
from fastlora.ops.expand import add_update, expand_gate, lora_expand_backward_reference
from fastlora.ops.library import differentiable, scalar
from fastlora.ops.shrink import flat, lora_shrink_backward_reference, lora_shrink_reference


def lora_linear(
    x, weight, lora_A, lora_B, scaling=1.0, bias=None, *,
    gates=None, ranks=None, column_scale=None, dropout_p=0.0, training=False, seed=None,
):  # fmt: skip
    """A linear layer and its low-rank update in one call: y = c ⊙ (x Wᵀ + ((D(x) lora_Aᵀ) ⊙ g) lora_Bᵀ) + bias.

    x (..., in); weight (out, in); lora_A (R, in) and lora_B (out, R), or sequences of (r_e, in) and (out, r_e), one
    pair per adapter, read in place; any strides. bias (out,). Returns y (..., out) in weight's dtype; sums are kept
    in float32 (float64 for float64). Adapters have x's dtype, or are float32 masters of a bfloat16 or float16 base.

    g: `scaling` (a number, a 0-d or an (E,) tensor) times `gates` (broadcastable to (..., E)). With `ranks`, E
    numbers that sum to R (implied by sequences), adapter e's rows are multiplied by g[..., e]; without, a single pair
    has one gate per rank row, E = R. `column_scale` (out,) is DoRA's c (Liu et al. 2024, arXiv 2402.09353); bias is
    not scaled. D: dropout on the adapter branch with probability `dropout_p` when `training`; its mask is a function
    of `seed`, a 0-d int64 tensor on x's device, drawn from torch's generator when None.

    Differentiable in x, lora_A, lora_B, scaling, gates, column_scale, bias, and weight if it requires grad; double
    backward raises. Errors: ValueError (shapes, devices, ranges) and TypeError (dtypes), naming the argument. Source:
    Hu et al. 2021, arXiv 2106.09685.
    """
    if isinstance(lora_A, torch.Tensor) and isinstance(lora_B, torch.Tensor):
        lora_A, lora_B = (lora_A,), (lora_B,)
    else:
        lora_A, lora_B = check.tensors("lora_A", lora_A), check.tensors("lora_B", lora_B)
        implied = [a.shape[0] for a in lora_A]
        check.value(ranks is None or list(ranks) == implied, "ranks", ranks, f"{implied}, as lora_A")
        ranks = implied
    if not isinstance(scaling, torch.Tensor):
        scaling = scalar(scaling)
    check.probability(dropout_p)
    if not training or dropout_p == 0:
        dropout_p, seed = 0.0, None
    elif seed is None:
        seed = draw_seed(x)
    return lora_linear_op(
        x, weight, lora_A, lora_B, scaling, bias, gates, () if ranks is None else ranks, column_scale, dropout_p, seed
    )


def lora_linear_reference(x, weight, lora_A, lora_B, scaling, bias, gates, ranks, column_scale, dropout_p, seed):
    z = lora_shrink_reference(x, lora_A, dropout_p, seed)
    g = expand_gate(scaling, gates, ranks, x.device, z.dtype)
    v = add_update(F.linear(x, weight).to(z.dtype), z, lora_B, g)
    u = x.new_empty(0)
    if column_scale is not None:
        u, v = v.to(x.dtype), v * column_scale.to(v.dtype)
    if bias is not None:
        v = v + bias.to(v.dtype)
    return v.to(x.dtype).contiguous(), z, u


def lora_linear_backward_reference(
    dy, x, weight, lora_A, lora_B, scaling, gates, ranks, column_scale, dropout_p, seed, z, u, needs
):
    need_x, need_weight, need_A, need_B, need_scaling, need_bias, need_gates, need_column = needs
    dy = dy.to(z.dtype)
    dv = dy if column_scale is None else dy * column_scale.to(z.dtype)
    half = [need_x or need_A, need_B, need_scaling, need_gates]
    dz, dB, dscaling, dgates = lora_expand_backward_reference(dv, z, lora_B, scaling, gates, ranks, (), None, half)
    dx, dA = x.new_empty(0), []
    if need_x or need_A:
        dx, dA = lora_shrink_backward_reference(dz, x.to(z.dtype), lora_A, dropout_p, seed, [need_x, need_A])
    if need_x:
        dx = (dx + (dv.to(x.dtype) @ weight).to(z.dtype)).to(x.dtype).contiguous()
    dweight = (flat(dv).T @ flat(x).to(z.dtype)).to(weight.dtype) if need_weight else x.new_empty(0)
    dbias = flat(dy).sum(0).to(x.dtype) if need_bias else x.new_empty(0)
    dcolumn = flat(dy * u.to(z.dtype)).sum(0).to(column_scale.dtype) if need_column else x.new_empty(0)
    return dx, dweight, dA, dB, dscaling, dbias, dgates, dcolumn


def _fake(x, weight, lora_A, lora_B, scaling, bias, gates, ranks, column_scale, dropout_p, seed):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    z = x.new_empty((*x.shape[:-1], sum(a.shape[0] for a in lora_A)), dtype=wide(x))
    return y, z, x.new_empty(0 if column_scale is None else y.shape)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor? bias, Tensor? gates, "
    "int[] ranks, Tensor? column_scale, float dropout_p, Tensor? seed"
)
lora_linear_op = differentiable(
    "lora_linear", _ARGUMENTS, (0, 1, 2, 3, 4, 5, 6, 8), check.linear, _fake,
    (lora_linear_reference, lora_linear_backward_reference), apart=5, kept=("z", "u"),
)  # fmt: skip
