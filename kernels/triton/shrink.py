"""z = D(x) aᵀ and its gradients: dx = D(dz a), da = dzᵀ D(x), the mask made again from the seed."""

import torch

import triton
import triton.language as tl

from . import config, tile
from .gate import NONE
from .product import product


@triton.jit
def _shrink_kernel(
    x, a, z, seed, threshold, keep_scale, M, K, R, xm, xk, ar, ak, chunk,
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
    for first in range(split * chunk, min(K, (split + 1) * chunk), BK):
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
    z, x, da, seed, threshold, keep_scale, g, scale, M, K, R, zm, zr, gm, gr, xm, xk, chunk,
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


def shrink(x, a, dropout_p, seed):
    """z (M, R) fp32 of a matrix x."""
    (M, K), R = x.shape, a.shape[0]
    if not (M and R):
        return torch.empty((M, R), dtype=torch.float32, device=x.device)
    seed, dropped, keep_scale, dropout, aligned = tile.dropout(dropout_p, seed, K)
    RP = config.rank_block(R)
    c = config.shrink(M, x.element_size(), RP, aligned or not dropout)
    blocks, steps = (triton.cdiv(M, c.BM), triton.cdiv(R, RP)), triton.cdiv(K, c.BK)
    count = config.splits(blocks[0] * blocks[1], steps, tile.device_of(x).sms)
    z = tile.partial(count, (M, R), x)
    tile.launch(
        _shrink_kernel, (blocks[0], count, blocks[1]), x,
        x, a, z, seed, dropped, keep_scale, M, K, R, *x.stride(), *a.stride(), triton.cdiv(steps, count) * c.BK,
        warps=c.warps, stages=c.stages,
        BM=c.BM, BK=c.BK, RP=RP, EVEN_K=K % c.BK == 0, DROPOUT=dropout, ALIGNED=aligned,
    )  # fmt: skip
    return tile.total(z, count)


def shrink_backward(z, g, x, dropout_p, seed):
    """da (R, K) fp32 = (z ⊙ g)ᵀ D(x)."""
    (M, K), R = x.shape, z.shape[1]
    if not (M and R and K):
        return torch.zeros((R, K), dtype=torch.float32, device=x.device)
    seed, dropped, keep_scale, dropout, aligned = tile.dropout(dropout_p, seed, K)
    RP = config.rank_block(R)
    c = config.shrink_backward(x.element_size(), aligned or not dropout)
    blocks, steps = (triton.cdiv(K, c.BK), triton.cdiv(R, RP)), triton.cdiv(M, c.BM)
    count = config.splits(blocks[0] * blocks[1], steps, tile.device_of(x).sms)
    da = tile.partial(count, (R, K), x)
    tile.launch(
        _shrink_backward_kernel, (blocks[0], count, blocks[1]), x,
        z, x, da, seed, dropped, keep_scale, g.rows, g.scale, M, K, R, *z.stride(), g.gm, g.gr, *x.stride(),
        triton.cdiv(steps, count) * c.BM, warps=c.warps, stages=c.stages,
        BM=c.BM, BK=c.BK, RP=RP, EVEN_K=K % c.BK == 0, DROPOUT=dropout, ALIGNED=aligned,
    )  # fmt: skip
    return tile.total(da, count)


def lora_shrink(x, lora_A, dropout_p, seed):
    """z (…, R) in fp32."""
    a = tile.join(lora_A, 0)
    return shrink(tile.rows_of(x), a, dropout_p, seed).view(*x.shape[:-1], a.shape[0])


def lora_shrink_backward(dz, x, lora_A, dropout_p, seed, needs):
    """(dx, [dA]) of the outputs that are needed."""
    x2, dz2, a = tile.rows_of(x), tile.rows_of(dz), tile.join(lora_A, 0)
    dx, da = x.new_empty(0), []
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        product(x2[:, :0], a[:0], dz2, a, NONE, dx, dropout_p=dropout_p, seed=seed)
    if needs[1]:
        da = tile.split(shrink_backward(dz2, NONE, x2, dropout_p, seed), lora_A, 0)
    return dx, da


lora_shrink_objection = lora_shrink_backward_objection = tile.objection
