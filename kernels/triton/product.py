"""The GEMM that carries a low-rank update as one more step of its K loop: y = [x | z ⊙ g] · [w ; b]."""

from functools import lru_cache

import torch

import triton
import triton.language as tl

from . import config, tile


@triton.jit
def _product_kernel(
    x, w, z, g, b, column_scale, bias, u, y, seed, threshold, keep_scale, scale,
    M, N, K, R, xm, xk, wk, wn, zm, zr, gm, gr, bn, br,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, ONE: tl.constexpr,
    EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """[x | z ⊙ g] · [w ; b] of w [K, N], b [R, N], then the epilogue; DROPOUT: x w + D((z ⊙ g) b)."""
    pm, pn = tile.grouped(tl.program_id(0), M, N, BM, BN, 8)
    rows = pm.to(tl.int64) * BM + tl.arange(0, BM)
    cols = pn * BN + tl.arange(0, BN)
    row_in = (rows < M)[:, None]
    col_in = (cols < N)[None, :]
    to: tl.constexpr = y.dtype.element_ty
    acc = tl.zeros((BM, BN), tl.float32)
    if DROPOUT:
        # The mask must see the update alone, so the update goes first.
        acc = tile.update(acc, z, zm, zr, g, gm, gr, scale, b, bn, br, rows, cols, M, N, R, to, RP, ONE)
        keep = tile.kept(tl.load(seed), rows, pn * BN, N, threshold, BM, BN, ALIGNED)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    steps = tl.arange(0, BK)
    xp = x + rows[:, None] * xm + steps[None, :] * xk
    wp = w + steps[:, None].to(tl.int64) * wk + cols[None, :].to(tl.int64) * wn
    for k in range(0, K, BK):
        x_in = row_in if EVEN_K else row_in & (steps < K - k)[None, :]
        w_in = col_in if EVEN_K else col_in & (steps < K - k)[:, None]
        acc = tl.dot(tl.load(xp, mask=x_in, other=0.0), tl.load(wp, mask=w_in, other=0.0), acc, input_precision="ieee")
        xp += BK * xk
        wp += tl.cast(BK * wk, tl.int64)
    if RP > 0 and not DROPOUT:
        # After the loop, never a branch in it: that would undo the pipelining of the loads without an error.
        acc = tile.update(acc, z, zm, zr, g, gm, gr, scale, b, bn, br, rows, cols, M, N, R, to, RP, ONE)
    place = rows[:, None] * N + cols[None, :]
    if column_scale is not None:
        tl.store(u + place, acc.to(to), mask=row_in & col_in)
        acc *= tl.load(column_scale + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, acc.to(to), mask=row_in & col_in)


@lru_cache(maxsize=4096)
def _plan(M, N, K, R, itemsize, dropout, device):
    """(grid, constants and options) of one shape."""
    c, RP = config.linear(M, N, itemsize, *device), config.rank_block(R, 32)
    return (config.cdiv(M, c.BM) * config.cdiv(N, c.BN),), dict(
        BM=c.BM, BN=c.BN, BK=c.BK, RP=RP, ONE=R <= RP, EVEN_K=K % c.BK == 0, DROPOUT=dropout, ALIGNED=N % 8 == 0,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


def product(x, w, z, b, g, shape, column_scale=None, bias=None, dropout_p=0.0, seed=None):
    """(y, u = x (M, K) · w (K, N) + (z ⊙ g) (M, R) · b (R, N) or, without column_scale, None) of this shape."""
    (M, K), (R, N) = x.shape, b.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    u = None if column_scale is None else torch.empty_like(y)
    if M and N:
        dropout_p = dropout_p if R else 0.0
        grid, options = _plan(M, N, K, R, x.element_size(), dropout_p > 0, tile.device_of(x))
        tile.launch(
            _product_kernel, grid, x,
            x, w, z, g.rows, b, column_scale, bias, u, y, *tile.dropout(dropout_p, seed), g.scale,
            M, N, K, R, *x.stride(), *w.stride(), *z.stride(), g.gm, g.gr, b.stride(1), b.stride(0), **options,
        )  # fmt: skip
    return y, u
