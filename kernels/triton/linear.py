"""y = c ⊙ (x Wᵀ + (z ⊙ g) b) + bias, z = D(x) aᵀ, and its gradients."""

from . import tile
from .expand import expand_backward
from .product import product
from .shrink import lora_shrink, shrink_backward


def lora_linear_forward(x, weight, lora_A, lora_B, scaling, bias, gates, ranks, column_scale, dropout_p, seed):
    """(y, z before the gate, u = y before column_scale and bias); two launches."""
    x2, z, b = tile.rows_of(x), lora_shrink(x, lora_A, dropout_p, seed), tile.join(lora_B, 1).t()
    column_scale = None if column_scale is None else column_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    g, shape = tile.gate(scaling, gates, ranks, z), (*x.shape[:-1], weight.shape[0])
    y, u = product(x2, weight.t(), tile.rows_of(z), b, g, shape, column_scale=column_scale, bias=bias)
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
