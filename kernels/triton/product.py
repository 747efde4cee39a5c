"""The GEMM that carries a low-rank update as one more step of its K loop: y = [x | z ⊙ g] · [w ; b]."""

from functools import lru_cache

import torch

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config, tile


@triton.jit
def _put(y, value, place, inside):
    """A tile into y: a pointer, or (inside is None) a descriptor, which knows its edges."""
    if inside is None:
        y.store(place, value)
    else:
        tl.store(y + place, value, mask=inside)


@triton.jit
def _epilogue(acc, column_scale, bias, u, y, place, inside, cols, N, to: tl.constexpr):
    """A finished sum: u, then ⊙ c, + bias, and y."""
    if column_scale is not None:
        _put(u, acc.to(to), place, inside)
        acc *= tl.load(column_scale + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    _put(y, acc.to(to), place, inside)


@triton.jit
def _product_kernel(
    x, w, z, g, b, column_scale, bias, u, y, seed, threshold, keep_scale, scale,
    M, N, K, R, xm, xk, wk, wn, zm, zr, gm, gr, bn, br,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, ONE: tl.constexpr,
    EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """[x | z ⊙ g] · [w ; b] of w [K, N], b [R, N], then the epilogue; DROPOUT: x w + D((z ⊙ g) b)."""
    # 8 rows of tiles at a time, so that neighbours share w and x in the L2.
    pm, pn = tl.swizzle2d(0, tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
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
    _epilogue(acc, column_scale, bias, u, y, place, row_in & col_in, cols, N, to)


@triton.jit
def _product_tma_kernel(
    x, w, z, g, b, column_scale, bias, u, y, scale, M, N, K, R, zm, zr, gm, gr, bn, br,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, ONE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The same without dropout by any number of programs; x, w, u, y are descriptors, TURNED: of w as [N, K]."""
    for pid in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0), flatten=False):
        pm, pn = tl.swizzle2d(0, pid, tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
        rows = pm.to(tl.int64) * BM + tl.arange(0, BM)
        cols = pn * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            # What lies beyond an edge comes as zeros.
            wt = w.load([pn * BN, k]).T if TURNED else w.load([k, pn * BN])
            acc = tl.dot(x.load([pm * BM, k]), wt, acc)
        if RP > 0:
            acc = tile.update(acc, z, zm, zr, g, gm, gr, scale, b, bn, br, rows, cols, M, N, R, y.dtype, RP, ONE)
        _epilogue(acc, column_scale, bias, u, y, (pm * BM, pn * BN), None, cols, N, y.dtype)


@lru_cache(maxsize=4096)
def _plan(M, N, K, R, itemsize, dropout, device):
    """(grid, constants and options) of one shape."""
    c, RP = config.linear(M, N, itemsize, *device), config.rank_block(R, 32)
    return (config.cdiv(M, c.BM) * config.cdiv(N, c.BN),), dict(
        BM=c.BM, BN=c.BN, BK=c.BK, RP=RP, ONE=R <= RP, EVEN_K=K % c.BK == 0, DROPOUT=dropout, ALIGNED=N % 8 == 0,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


def _product_tma(x, w, z, b, g, column_scale, bias, u, y):
    """Whether the persistent form took this call."""
    (M, K), (R, N), turned = x.shape, b.shape, w.stride(0) == 1
    c, stored = config.product_tma(M, N, K, x.element_size(), *tile.device_of(x.device)), w.t() if turned else w
    if not (c and config.describes(x) and config.describes(stored)):
        return False
    programs = min(config.cdiv(M, c.BM) * config.cdiv(N, c.BN), tile.device_of(x.device).sms)
    # The tile of b lies in registers: half as many ranks of it where it is fp32.
    RP = config.rank_block(R, 16 if b.element_size() == 4 else 32)
    blocks = (x, c.BM, c.BK), (stored, *((c.BN, c.BK) if turned else (c.BK, c.BN))), (u, c.BM, c.BN), (y, c.BM, c.BN)
    xd, wd, ud, yd = (t if t is None else TensorDescriptor.from_tensor(tile.rows_of(t), box) for t, *box in blocks)
    tile.launch(
        _product_tma_kernel, (programs,), x, xd, wd, z, g.rows, b, column_scale, bias, ud, yd, g.scale,
        M, N, K, R, *z.stride(), g.gm, g.gr, b.stride(1), b.stride(0),
        BM=c.BM, BN=c.BN, BK=c.BK, RP=RP, ONE=R <= RP, TURNED=turned, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return True


def product(x, w, z, b, g, shape, column_scale=None, bias=None, dropout_p=0.0, seed=None):
    """(y, u = x (M, K) · w (K, N) + (z ⊙ g) (M, R) · b (R, N) or, without column_scale, None) of this shape."""
    (M, K), (R, N) = x.shape, b.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    u = None if column_scale is None else torch.empty_like(y)
    dropout_p = dropout_p if R else 0.0
    tma = tile.FORM == "tma" and not dropout_p
    if M and N and not (tma and _product_tma(x, w, z, b, g, column_scale, bias, u, y)):
        grid, options = _plan(M, N, K, R, x.element_size(), dropout_p > 0, tile.device_of(x.device))
        tile.launch(
            _product_kernel, grid, x,
            x, w, z, g.rows, b, column_scale, bias, u, y, *tile.dropout(dropout_p, seed), g.scale,
            M, N, K, R, *x.stride(), *w.stride(), *z.stride(), g.gm, g.gr, b.stride(1), b.stride(0), **options,
        )  # fmt: skip
    return y, u
