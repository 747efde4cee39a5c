"""y and z of few tokens in one launch: K is split, and every part applies b to its own part of z.

The update is linear in z, so no part waits for another. W is the tall side of the product: few tokens waste little.
"""

from functools import lru_cache

import torch

import triton
import triton.language as tl

from . import config, tile


@triton.jit
def _decode_kernel(
    x, w, a, b, g, column_scale, bias, u, y, z, planes, counters, scale,
    M, N, K, R, xm, xk, wn, wk, ar, ak, bn, br, gm, gr, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, SPLITS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """BN columns of y from columns split·chunk … of x and w; the last part to arrive adds all in their order."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows, ranks = tl.arange(0, BM).to(tl.int64)[None, :], tl.arange(0, RP)[:, None]
    cols = (block * BN + tl.arange(0, BN))[:, None]
    row_in, rank_in, col_in = rows < M, ranks < R, cols < N
    z_in = row_in & (ranks < tl.where(block == 0, R, 0))  # one block of columns stores z
    to: tl.constexpr = y.dtype.element_ty
    acc = tl.zeros((BN, BM), tl.float32)
    zt = tl.zeros((RP, BM), tl.float32)
    start, stop = split * chunk, min(K, (split + 1) * chunk)
    # As in the shrink: ptxas waits for every wgmma otherwise.
    tl.assume(start < stop)
    for first in range(start, stop, BK):
        k = first + tl.arange(0, BK)
        down, across = k[:, None], k[None, :]
        x_in = row_in if EVEN_K else row_in & (down < K)
        w_in = col_in if EVEN_K else col_in & (across < K)
        a_in = rank_in if EVEN_K else rank_in & (across < K)
        xt = tl.load(x + rows * xm + down * xk, mask=x_in, other=0.0)
        wt = tl.load(w + cols.to(tl.int64) * wn + across.to(tl.int64) * wk, mask=w_in, other=0.0)
        at = tl.load(a + ranks * ar + across * ak, mask=a_in, other=0.0)
        acc = tl.dot(wt, xt, acc, input_precision="ieee")
        zt = tl.dot(at.to(to), xt, zt, input_precision="ieee")
    gated = zt * scale
    if g is not None:
        gated *= tl.load(g + rows * gm + ranks * gr, mask=row_in & rank_in, other=0.0).to(tl.float32)
    across = tl.arange(0, RP)[None, :]
    bt = tl.load(b + cols * bn + across * br, mask=col_in & (across < R), other=0.0)
    # A part of z may be much larger than z: it is not rounded before the sum over the parts.
    acc = tl.dot(bt.to(tl.float32), gated, acc, input_precision="ieee")
    # z has the columns beyond N of a part's plane.
    width = N + R
    mine, mine_z = rows * width + cols, rows * width + N + ranks
    if SPLITS > 1:
        tl.store(planes + split * M * width + mine, acc, mask=row_in & col_in)
        tl.store(planes + split * M * width + mine_z, zt, mask=z_in)
        # Every thread's stores come before the one thread that takes the ticket; no program waits for another.
        tl.debug_barrier()
        last = tl.atomic_add(counters + block, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            acc *= 0.0
            zt *= 0.0
            for part in range(SPLITS):
                # From the L2 cache: this multiprocessor's L1 may hold what another program has written over.
                plane = planes + part * M * width
                acc += tl.load(plane + mine, mask=row_in & col_in, other=0.0, cache_modifier=".cg")
                zt += tl.load(plane + mine_z, mask=z_in, other=0.0, cache_modifier=".cg")
            tl.store(counters + block, 0)
    else:
        last = True
    if last:
        tl.store(z + rows * R + ranks, zt, mask=z_in)
        place = rows * N + cols
        if column_scale is not None:
            tl.store(u + place, acc.to(to), mask=row_in & col_in)
            acc *= tl.load(column_scale + cols, mask=col_in, other=0.0).to(tl.float32)
        if bias is not None:
            acc += tl.load(bias + cols, mask=col_in, other=0.0).to(tl.float32)
        tl.store(y + place, acc.to(to), mask=row_in & col_in)


@lru_cache(maxsize=4096)
def _plan(M, N, K, R, itemsize, device):
    """(columns of K in a part, grid, constants and options) of one shape."""
    RP = config.rank_block(R)
    c = config.decode(M, itemsize, RP, K % 8 == 0)
    blocks, steps = config.cdiv(N, c.BN), config.cdiv(K, c.BK)
    count = config.splits(blocks, steps, device.sms)
    chunk = config.cdiv(steps, count) * c.BK
    return chunk, (blocks, count), dict(
        BM=c.BM, BN=c.BN, BK=c.BK, RP=RP, SPLITS=count, EVEN_K=K % c.BK == 0,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


def fits(M, K, N, R):
    """Whether one launch does it all: few tokens, and the rank in one tile."""
    return 0 < M <= config.FEW and 0 < R <= 32 and N > 0 and K > 0


def decode(x, w, a, b, g, z, shape, column_scale, bias):
    """(y = c ⊙ u + bias, u = x wᵀ + (z ⊙ g) bᵀ or, without c, None) of this shape; z (M, R) is filled with x aᵀ."""
    (M, K), (N, R) = x.shape, b.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    u = None if column_scale is None else torch.empty_like(y)
    chunk, grid, options = _plan(M, N, K, R, x.element_size(), tile.device_of(x.device))
    planes = counters = None
    if grid[1] > 1:
        planes, counters = z.new_empty(grid[1] * M * (N + R)), tile.tickets(grid[0], x)
    tile.launch(
        _decode_kernel, grid, x,
        x, w, a, b, g.rows, column_scale, bias, u, y, z, planes, counters, g.scale,
        M, N, K, R, *x.stride(), *w.stride(), *a.stride(), *b.stride(), g.gm, g.gr, chunk, **options,
    )  # fmt: skip
    return y, u
