"""y + (z ⊙ g) b, and t = dy bᵀ with db = (z ⊙ g)ᵀ dy from one read of dy."""

from functools import lru_cache

import torch

import triton
import triton.language as tl

from . import config, tile


@triton.jit
def _expand_kernel(
    y, z, g, b, out, scale, M, N, R, start, width, ym, yn, zm, zr, gm, gr, bn, br,
    BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """A tile of y; b's column 0 lies at y's column `start`."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    acc = tl.load(y + rows[:, None] * ym + cols[None, :].to(tl.int64) * yn, mask=inside, other=0.0).to(tl.float32)
    to: tl.constexpr = y.dtype.element_ty
    acc = tile.update(acc, z, zm, zr, g, gm, gr, scale, b, bn, br, rows, cols - start, M, width, R, to, RP, ONE)
    tl.store(out + rows[:, None] * N + cols[None, :], acc.to(to), mask=inside)


@triton.jit
def _expand_backward_kernel(
    dy, z, g, b, t, db, scale, M, N, R, ym, yn, zm, zr, gm, gr, bn, br, chunk,
    BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, NEED_T: tl.constexpr, NEED_DB: tl.constexpr,
):  # fmt: skip
    """Columns split·chunk … of dy: part `split` of t's rows, and this row block's part of db."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    rows = block.to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.program_id(2) * RP + tl.arange(0, RP)
    rank_in = (ranks < R)[None, :]
    to: tl.constexpr = dy.dtype.element_ty
    if NEED_DB:
        zt = tile.load_gated(z, zm, zr, g, gm, gr, scale, rows, ranks, M, R, to)
    acc = tl.zeros((BM, RP), tl.float32)
    for first in range(split * chunk, min(N, (split + 1) * chunk), BN):
        cols = first + tl.arange(0, BN)
        col_in = (cols < N)[:, None]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        dyt = tl.load(dy + rows[:, None] * ym + cols[None, :].to(tl.int64) * yn, mask=inside, other=0.0)
        if NEED_T:
            bt = tl.load(b + cols[:, None] * bn + ranks[None, :] * br, mask=col_in & rank_in, other=0.0)
            acc = tl.dot(dyt, bt.to(to), acc, input_precision="ieee")
        if NEED_DB:
            part = tl.dot(tl.trans(dyt), zt, input_precision="ieee")
            place = db + (block.to(tl.int64) * N + cols[:, None]) * R + ranks[None, :]
            tl.store(place, part, mask=col_in & rank_in)
    if NEED_T:
        place = t + split.to(tl.int64) * M * R + rows[:, None] * R + ranks[None, :]
        tl.store(place, acc, mask=(rows < M)[:, None] & rank_in)


@lru_cache(maxsize=4096)
def _plan(M, N, R, itemsize):
    """(grid, constants and options) of y + (z ⊙ g) b."""
    c, RP = config.expand(M, itemsize), config.rank_block(R)
    options = dict(BM=c.BM, BN=c.BN, RP=RP, ONE=R <= RP, num_warps=c.warps, num_stages=c.stages)
    return (config.cdiv(M, c.BM), config.cdiv(N, c.BN)), options


@lru_cache(maxsize=4096)
def _backward_plan(M, N, R, itemsize, device):
    """(parts of t, parts of db, columns a part, grid, constants and options)."""
    RP = config.rank_block(R)
    c = config.expand_backward(M, itemsize, RP, device.arch)
    tall, wide, steps = config.cdiv(M, c.BM), config.cdiv(R, RP), config.cdiv(N, c.BN)
    count = config.splits(tall * wide, steps, device.sms)
    options = dict(BM=c.BM, BN=c.BN, RP=RP, num_warps=c.warps, num_stages=c.stages)
    return count, tall, config.cdiv(steps, count) * c.BN, (tall, count, wide), options


def expand_backward(dy, z, lora_B, scaling, gates, ranks, needs):
    """(t = dy b (M, R) fp32, the gate of its rows, [dB], dscaling, dgates) of a matrix dy, those that are needed."""
    need_t, need_b, *of_gate = needs
    need_t = need_t or any(of_gate)
    z2, b, g = tile.rows_of(z), tile.join(lora_B, 1), tile.gate(scaling, gates, ranks, z)
    (M, N), R, t, db = dy.shape, b.shape[1], None, None
    if not (M and N and R):
        t, db = dy.new_zeros((M, R), dtype=torch.float32), dy.new_zeros((N, R), dtype=torch.float32)
    elif need_t or need_b:
        count, blocks, chunk, grid, options = _backward_plan(M, N, R, dy.element_size(), tile.device_of(dy))
        t = tile.partial(count, (M, R), dy) if need_t else None
        db = tile.partial(blocks, (N, R), dy) if need_b else None
        tile.launch(
            _expand_backward_kernel, grid, dy,
            dy, z2, g.rows, b, t, db, g.scale, M, N, R, *dy.stride(), *z2.stride(), g.gm, g.gr, *b.stride(), chunk,
            NEED_T=need_t, NEED_DB=need_b, **options,
        )  # fmt: skip
        t, db = tile.total(t, count), tile.total(db, blocks)
    return t, g, tile.split(db, lora_B, 1) if need_b else [], *tile.gate_backward(t, z, scaling, gates, ranks, *of_gate)


def lora_expand(y, z, lora_B, scaling, gates, ranks, columns):
    """A new y with the update added to all columns or to columns [start, stop)."""
    y2, z2, b = tile.rows_of(y), tile.rows_of(z), tile.join(lora_B, 1)
    (M, N), R = y2.shape, z2.shape[1]
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not (M and N and R):
        return out.copy_(y)
    g, (start, stop) = tile.gate(scaling, gates, ranks, z), columns or (0, N)
    grid, options = _plan(M, N, R, y.element_size())
    tile.launch(
        _expand_kernel, grid, y,
        y2, z2, g.rows, b, out, g.scale, M, N, R, start, stop - start,
        *y2.stride(), *z2.stride(), g.gm, g.gr, *b.stride(), **options,
    )  # fmt: skip
    return out


def lora_expand_backward(dy, z, lora_B, scaling, gates, ranks, columns, needs):
    """(dz, [dB], dscaling, dgates) of the outputs that are needed."""
    part = dy[..., columns[0] : columns[1]] if columns else dy
    t, g, *grads = expand_backward(tile.rows_of(part), z, lora_B, scaling, gates, ranks, needs)
    dz = z.new_empty(0)
    if needs[0]:
        dz = (t * g.scale if g.rows is None else t * g.scale * g.rows).to(z.dtype).view(z.shape)
    return dz, *grads
