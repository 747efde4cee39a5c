"""y + (z ⊙ g) b, and t = dy bᵀ with db = (z ⊙ g)ᵀ dy from one read of dy."""

from functools import lru_cache

import torch

import triton
import triton.language as tl

from . import config, tile


@triton.jit
def _expand_kernel(
    y, z, g, b, out, ids, scale, M, N, R, V, start, width, ym, yn, zm, zr, gm, gr, bn, br,
    BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """A tile of y; b's column 0 lies at y's column `start`. With ids, z is what they name of the rows of z [V, R]."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    acc = tl.load(y + rows[:, None] * ym + cols[None, :].to(tl.int64) * yn, mask=inside, other=0.0).to(tl.float32)
    to: tl.constexpr = y.dtype.element_ty
    known = rows
    if ids is not None:
        token = tl.load(ids + rows, mask=rows < M, other=-1).to(tl.int64)
        # What names no row of the table reads as a row beyond the last: zeros.
        known = tl.where((token >= 0) & (token < V), rows, M)
        z += token[:, None] * zm
        zm = 0
    acc = tile.update(acc, z, zm, zr, g, gm, gr, scale, b, bn, br, known, cols - start, M, width, R, to, RP, ONE)
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


@triton.jit
def _gate_backward_kernel(
    parts, z, t, dg, starts, M, R, E, zm, zr,
    COUNT: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """t, the sum of its parts, and dg, the sums of t ⊙ z over the rank rows of BE adapters of RP rows or fewer."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    ranks = tl.load(starts + e, mask=e < E, other=0)[:, None] + tl.arange(0, RP)[None, :]
    inside = ranks < tl.load(starts + e + 1, mask=e < E, other=0)[:, None]
    ranks, inside = tl.reshape(ranks, (1, BE * RP)), (rows < M) & tl.reshape(inside, (1, BE * RP))
    tt = tl.load(parts + rows * R + ranks, mask=inside, other=0.0)
    # Unrolled, so that the loads of all parts are on their way together.
    for part in tl.static_range(1, COUNT):
        tt += tl.load(parts + (rows + part * M) * R + ranks, mask=inside, other=0.0)
    if COUNT > 1:
        tl.store(t + rows * R + ranks, tt, mask=inside)
    tt *= tl.load(z + rows * zm + ranks * zr, mask=inside, other=0.0).to(tl.float32)
    tl.store(dg + rows * E + e[None, :], tl.sum(tl.reshape(tt, (BM, BE, RP)), 2), mask=(rows < M) & (e < E)[None, :])


@lru_cache(maxsize=4096)
def _plan(M, N, R, itemsize):
    """(grid, constants and options) of y + (z ⊙ g) b."""
    c, RP = config.expand(M, itemsize), config.rank_block(R, 32)
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


def _gate_backward(parts, count, z, scaling, gates, ranks, needs):
    """(t, dscaling, dgates) from the parts of t and z before the gate; each in its own shape, type and device."""
    dscaling = dgates = z.new_empty(0)
    if not any(needs):
        return tile.total(parts, count), dscaling, dgates
    z2, ranks = tile.rows_of(z), tuple(ranks) or (1,) * z.shape[-1]
    (M, R), E, (_, starts) = z2.shape, len(ranks), tile.rank_rows(ranks, z.device)
    t, dg = parts if count == 1 else parts.new_empty((M, R)), parts.new_empty((*z.shape[:-1], E))
    # 512 elements a program, 64 or more of them in a row.
    RP = triton.next_power_of_2(max((1, *ranks)))
    BE = max(min(triton.next_power_of_2(E), 64 // RP), 1)
    BM = max(512 // (BE * RP), 1)
    sizes = M, R, E, *z2.stride(), count, BM, BE, RP
    tile.launch(_gate_backward_kernel, (config.cdiv(M, BM), config.cdiv(E, BE)), z, parts, z2, t, dg, starts, *sizes)
    if needs[0]:
        every = dg if gates is None else dg * gates
        dscaling = every.sum_to_size(scaling.shape).to(scaling.device, scaling.dtype)
    if needs[1]:
        dgates = (dg * scaling.to(t.device)).sum_to_size(gates.shape).to(gates.dtype)
    return t, dscaling, dgates


def expand_backward(dy, z, lora_B, scaling, gates, ranks, needs):
    """(t = dy b (M, R) fp32, the gate of its rows, [dB], dscaling, dgates) of a matrix dy, those that are needed."""
    need_t, need_b, *of_gate = needs
    need_t = need_t or any(of_gate)
    z2, b, g = tile.rows_of(z), tile.join(lora_B, 1), tile.gate(scaling, gates, ranks, z)
    (M, N), R, t, db, count = dy.shape, b.shape[1], None, None, 1
    if not (M and N and R):
        t, db = dy.new_zeros((M, R), dtype=torch.float32), dy.new_zeros((N, R), dtype=torch.float32)
    elif need_t or need_b:
        count, blocks, chunk, grid, options = _backward_plan(M, N, R, dy.element_size(), tile.device_of(dy.device))
        t = tile.partial(count, (M, R), dy) if need_t else None
        db = tile.partial(blocks, (N, R), dy) if need_b else None
        tile.launch(
            _expand_backward_kernel, grid, dy,
            dy, z2, g.rows, b, t, db, g.scale, M, N, R, *dy.stride(), *z2.stride(), g.gm, g.gr, *b.stride(), chunk,
            NEED_T=need_t, NEED_DB=need_b, **options,
        )  # fmt: skip
        db = tile.total(db, blocks)
    t, *grads = _gate_backward(t, count, z, scaling, gates, ranks, of_gate)
    return t, g, tile.split(db, lora_B, 1) if need_b else [], *grads


def lora_expand(y, z, lora_B, scaling, gates, ranks, columns, ids):
    """A new y with the update added to all columns or to [start, stop); with ids z is what they name of its rows."""
    if ids is not None and z.numel() >> 31:
        z, ids = torch.embedding(z, ids), None
    y2, z2, b = tile.rows_of(y), tile.rows_of(z), tile.join(lora_B, 1)
    (M, N), (V, R) = y2.shape, z2.shape
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not (M and N and R):
        return out.copy_(y)
    like = z if ids is None else y[..., :1].expand(*ids.shape, R)
    g, (start, stop) = tile.gate(scaling, gates, ranks, like), columns or (0, N)
    grid, options = _plan(M, N, R, y.element_size())
    tile.launch(
        _expand_kernel, grid, y,
        y2, z2, g.rows, b, out, None if ids is None else ids.contiguous(), g.scale, M, N, R, V, start, stop - start,
        *y2.stride(), *z2.stride(), g.gm, g.gr, *b.stride(), **options,
    )  # fmt: skip
    return out


def lora_expand_backward(dy, z, lora_B, scaling, gates, ranks, columns, ids, needs):
    """(dz, [dB], dscaling, dgates) of the outputs that are needed; with ids ATen gathers z and scatters dz."""
    table, z = z, z if ids is None else torch.embedding(z, ids)
    part = dy[..., columns[0] : columns[1]] if columns else dy
    t, g, *grads = expand_backward(tile.rows_of(part), z, lora_B, scaling, gates, ranks, needs)
    dz = z.new_empty(0)
    if needs[0]:
        dz = (t * g.scale if g.rows is None else t * g.scale * g.rows).view(z.shape)
    if needs[0] and ids is not None:
        dz = torch.ops.aten.embedding_dense_backward(dz, ids, len(table), -1, False)
    return dz.to(table.dtype), *grads
