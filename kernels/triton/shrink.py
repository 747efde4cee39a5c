"""z = D(x) aᵀ and its gradients: dx = D(dz a), da = dzᵀ D(x), the mask made again from the seed."""

from functools import lru_cache

import torch

import triton
import triton.language as tl

from . import config, tile
from .product import product


@triton.jit
def _shrink_kernel(
    x, z, seed, threshold, keep_scale, ar, ak, a, M, K, R, xm, xk, chunk,
    BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
    EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rows × rank block of z from columns split·chunk … of x; part `split` of z."""
    split = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.program_id(2) * RP + tl.arange(0, RP)
    row_in = (rows < M)[:, None]
    rank_in = (ranks < R)[None, :]
    acc = tl.zeros((BM, RP), tl.float32)
    start, stop = split * chunk, min(K, (split + 1) * chunk)
    # No part is empty. Where it might be, acc = 0 around the loop makes ptxas wait for every wgmma in it (C7515).
    tl.assume(start < stop)
    for first in range(start, stop, BK):
        cols = first + tl.arange(0, BK).to(tl.int64)
        x_in = row_in if EVEN_K else row_in & (cols < K)[None, :]
        a_in = rank_in if EVEN_K else rank_in & (cols < K)[:, None]
        xt = tl.load(x + rows[:, None] * xm + cols[None, :] * xk, mask=x_in, other=0.0)
        at = tl.load(a + ranks[None, :] * ar + cols[:, None] * ak, mask=a_in, other=0.0)
        if DROPOUT:
            keep = tile.kept(tl.load(seed), rows, first, K, threshold, BM, BK, ALIGNED)
            xt = tl.where(keep, xt, 0.0).to(xt.dtype)
        acc = tl.dot(xt, at.to(xt.dtype), acc, input_precision="ieee")
    # The scale of dropout is applied to the fp32 sum: x itself is not rounded again.
    place = z + split.to(tl.int64) * M * R + rows[:, None] * R + ranks[None, :]
    tl.store(place, acc * keep_scale, mask=row_in & rank_in)


@triton.jit
def _shrink_backward_kernel(
    x, da, seed, threshold, keep_scale, z, zm, zr, g, gm, gr, scale, M, K, R, xm, xk, chunk,
    BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
    EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Columns × rank block of da = (z ⊙ g)ᵀ D(x) from rows split·chunk … ; part `split`."""
    split = tl.program_id(1)
    first = tl.program_id(0) * BK
    cols = first + tl.arange(0, BK).to(tl.int64)
    ranks = tl.program_id(2) * RP + tl.arange(0, RP)
    col_in = (cols < K)[:, None]
    acc = tl.zeros((BK, RP), tl.float32)
    for start in range(split * chunk, min(M, (split + 1) * chunk), BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        inside = (rows < M)[None, :] if EVEN_K else (rows < M)[None, :] & col_in
        # Columns down: they are the tall side of the product, a tensor core takes 64 of them and 16 ranks.
        xt = tl.load(x + rows[None, :] * xm + cols[:, None] * xk, mask=inside, other=0.0)
        if DROPOUT:
            keep = tile.kept(tl.load(seed), rows, first, K, threshold, BM, BK, ALIGNED)
            xt = tl.where(tl.trans(keep), xt, 0.0).to(xt.dtype)
        zt = tile.load_gated(z, zm, zr, g, gm, gr, scale, rows, ranks, M, R, xt.dtype)
        acc = tl.dot(xt, zt, acc, input_precision="ieee")
    place = da + split.to(tl.int64) * R * K + ranks[None, :].to(tl.int64) * K + cols[:, None]
    tl.store(place, acc * keep_scale, mask=col_in & (ranks < R)[None, :])


@lru_cache(maxsize=4096)
def _plan(backward, M, K, R, itemsize, dropout, device):
    """(parts of the sum, its length in a part, grid, options): z is a sum over K, da one over M."""
    RP, aligned = config.rank_block(R), K % 8 == 0
    choose = config.shrink_backward if backward else config.shrink
    c = choose(M, itemsize, RP, aligned or not dropout)
    rows, cols = config.cdiv(M, c.BM), config.cdiv(K, c.BK)
    (tall, steps, step) = (cols, rows, c.BM) if backward else (rows, cols, c.BK)
    wide = config.cdiv(R, RP)
    count = config.splits(tall * wide, steps, device.sms)
    return count, config.cdiv(steps, count) * step, (tall, count, wide), dict(
        BM=c.BM, BK=c.BK, RP=RP, EVEN_K=K % c.BK == 0, DROPOUT=dropout, ALIGNED=aligned,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


def _run(kernel, x, R, dropout_p, seed, *others):
    """z (M, R) or da (R, K) in fp32, of a matrix x and what else the kernel takes."""
    (M, K), backward = x.shape, kernel is _shrink_backward_kernel
    shape = (R, K) if backward else (M, R)
    if not (M and R and K):
        return x.new_zeros(shape, dtype=torch.float32)
    count, chunk, grid, options = _plan(backward, M, K, R, x.element_size(), dropout_p > 0, tile.device_of(x.device))
    parts, dropout = tile.partial(count, shape, x), tile.dropout(dropout_p, seed)
    tile.launch(kernel, grid, x, x, parts, *dropout, *others, M, K, R, *x.stride(), chunk, **options)
    return tile.total(parts, count)


def lora_shrink(x, lora_A, dropout_p, seed):
    """z (…, R) in fp32."""
    a = tile.join(lora_A, 0)
    return _run(_shrink_kernel, tile.rows_of(x), len(a), dropout_p, seed, *a.stride(), a).view(*x.shape[:-1], len(a))


def shrink_backward(z, g, x, dropout_p, seed):
    """da (R, K) fp32 = (z ⊙ g)ᵀ D(x)."""
    return _run(_shrink_backward_kernel, x, z.shape[1], dropout_p, seed, z, *z.stride(), g.rows, g.gm, g.gr, g.scale)


def lora_shrink_backward(dz, x, lora_A, dropout_p, seed, needs):
    """(dx, [dA]) of the outputs that are needed."""
    x2, dz2, a = tile.rows_of(x), tile.rows_of(dz), tile.join(lora_A, 0)
    dx = x.new_empty(0)
    if needs[0]:
        dx, _ = product(x2[:, :0], a[:0], dz2, a, tile.NO_GATE, x.shape, dropout_p=dropout_p, seed=seed)
    return dx, tile.split(shrink_backward(dz2, tile.NO_GATE, x2, dropout_p, seed), lora_A, 0) if needs[1] else []
