"""y = c ⊙ (x Wᵀ + (z ⊙ g) b) + bias, z = D(x) aᵀ, and its gradients."""

import torch

from . import tile
from .decode import decode, fits
from .expand import expand_backward
from .gate import gate, gate_backward
from .product import product
from .shrink import shrink, shrink_backward


def lora_linear_forward(x, weight, lora_A, lora_B, scaling, bias, gates, ranks, column_scale, dropout_p, seed):
    """(y, z before the gate, u = y before column_scale and bias); one launch for few tokens, else two."""
    x2, a, b = tile.rows_of(x), tile.join(lora_A, 0), tile.join(lora_B, 1)
    M, (N, R) = len(x2), b.shape
    few = not dropout_p and fits(M, N, R)
    z = x.new_empty((M, R), dtype=torch.float32) if few else shrink(x2, a, dropout_p, seed)
    out = z.view(*x.shape[:-1], R)
    y = torch.empty((*x.shape[:-1], N), dtype=weight.dtype, device=x.device)
    u = y.new_empty(0) if column_scale is None else torch.empty_like(y)
    column_scale = None if column_scale is None else column_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    g, epilogue = gate(scaling, gates, ranks, out), dict(column_scale=column_scale, bias=bias, u=u)
    if few:
        decode(x2, weight, a, b, g, y, z, **epilogue)
    else:
        product(x2, weight.t(), z, b.t(), g, y, **epilogue)
    return y, out, u


def lora_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, gates, ranks, column_scale, dropout_p, seed, z, u, needs
):  # fmt: skip
    """The gradients that are needed: dy is read once for dz and db, once for dx."""
    need_x, need_w, need_a, need_b, need_scaling, need_bias, need_gates, need_column = needs
    x2, dy2, z2 = tile.rows_of(x), tile.rows_of(dy), tile.rows_of(z)
    empty = x.new_empty(0)
    dx = dw = dbias = dcolumn = empty
    da, db = [], []
    if need_bias:
        dbias = dy2.sum(0)
    if need_column:
        dcolumn = (dy2.float() * tile.rows_of(u)).sum(0).to(column_scale.dtype)
    if column_scale is not None:
        dy2 = (dy2 * column_scale).to(x.dtype)
    a, b, g = tile.join(lora_A, 0), tile.join(lora_B, 1), gate(scaling, gates, ranks, z)
    t, db_total = expand_backward(dy2, z2, g, b, need_x or need_a or need_scaling or need_gates, need_b)
    if need_b:
        db = tile.split(db_total, lora_B, 1)
    if need_x:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        product(dy2, weight, t, a, g, dx, dropout_p=dropout_p, seed=seed)
    if need_a:
        da = tile.split(shrink_backward(t, g, x2, dropout_p, seed), lora_A, 0)
    if need_w:
        dw = dy2.t() @ x2
    t = z if t is None else t.view(z.shape)
    dscaling, dgates = gate_backward(t, z, scaling, gates, ranks, need_scaling, need_gates)
    return dx, dw, da, db, dscaling, dbias, dgates, dcolumn
