"""y = c ⊙ (x Wᵀ + (z ⊙ g) b) + bias, z = D(x) aᵀ, and its gradients."""

import torch

from . import tile
from .decode import decode, fits
from .expand import expand_backward
from .product import product
from .shrink import lora_shrink, shrink_backward


def lora_linear_forward(x, weight, lora_A, lora_B, scaling, bias, gates, ranks, column_scale, dropout_p, seed):
    """(y, z before the gate, u = y before column_scale and bias); one launch for few tokens, else two."""
    x2, b, shape = tile.rows_of(x), tile.join(lora_B, 1), (*x.shape[:-1], weight.shape[0])
    few = not dropout_p and fits(*x2.shape, *b.shape)
    z = x.new_empty((*shape[:-1], b.shape[1]), dtype=torch.float32) if few else lora_shrink(x, lora_A, dropout_p, seed)
    g, z2 = tile.gate(scaling, gates, ranks, z), tile.rows_of(z)
    epilogue = None if column_scale is None else column_scale.contiguous(), None if bias is None else bias.contiguous()
    if few:
        y, u = decode(x2, weight, tile.join(lora_A, 0), b, g, z2, shape, *epilogue)
    else:
        y, u = product(x2, weight.t(), z2, b.t(), g, shape, *epilogue)
    return y, z, x.new_empty(0) if u is None else u


def lora_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, gates, ranks, column_scale, dropout_p, seed, z, u, needs
):  # fmt: skip
    """The gradients that are needed: dy is read once for dz and db, once for dx."""
    need_x, need_w, need_a, need_b, need_scaling, need_bias, need_gates, need_column = needs
    x2, dy2, empty = tile.rows_of(x), tile.rows_of(dy), x.new_empty(0)
    dbias = dy2.sum(0) if need_bias else empty
    dcolumn = (dy2.float() * tile.rows_of(u)).sum(0).to(column_scale.dtype) if need_column else empty
    if column_scale is not None:
        dy2 = (dy2 * column_scale).to(x.dtype)
    half = [need_x or need_a, need_b, need_scaling, need_gates]
    t, g, db, dscaling, dgates = expand_backward(dy2, z, lora_B, scaling, gates, ranks, half)
    dx = empty
    if need_x:
        dx, _ = product(dy2, weight, t, tile.join(lora_A, 0), g, x.shape, dropout_p=dropout_p, seed=seed)
    da = tile.split(shrink_backward(t, g, x2, dropout_p, seed), lora_A, 0) if need_a else []
    return dx, dy2.t() @ x2 if need_w else empty, da, db, dscaling, dbias, dgates, dcolumn
