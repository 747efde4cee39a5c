"""y = x Wᵀ + bias + Σ gate ((c − 1) ⊙ x Wᵀ + c ⊙ s (x Aᵀ) B), every token with adapters of its own, all in pages."""

from functools import lru_cache

import torch

import triton
import triton.language as tl

from . import config, tile

FEW = 16  # tokens up to which one launch does it all, in which every block of columns computes z again: a guess


@triton.jit
def _tokens(tiles, order, offsets, BM: tl.constexpr):
    """A tile's tokens, which lanes have one, where each one's and the first one's list starts, the list's length."""
    at = tiles + 3 * tl.program_id(0)
    lane = tl.arange(0, BM)
    inside = (lane < tl.load(at + 1))[:, None]
    rows = tl.load(order + tl.load(at) + lane[:, None], mask=inside, other=0)
    entries = tl.load(offsets + rows, mask=inside, other=0).to(tl.int64)
    return rows, inside, entries, tl.load(offsets + tl.load(order + tl.load(at))), tl.load(at + 2)


@triton.jit
def _adapter(slots, entry, table, tm, ranks, S):
    """(slot, its row of the table, rank) of an entry of a list; no rank for a slot that is not in the tables."""
    slot = tl.load(slots + entry).to(tl.int64)
    return slot, table + slot * tm, tl.load(ranks + slot, mask=(slot >= 0) & (slot < S), other=0)


@triton.jit
def _rank_rows(pages, page_step, row_step, table, row, rank):
    """Where an adapter's rank rows start; 8 to a page, `table` its pages."""
    page = tl.load(table + row // 8, mask=row < rank, other=0).to(tl.int64)
    return pages + page * page_step + row % 8 * row_step


@triton.jit
def _shrunk(
    x, rows, inside, a, has, start, stop, K, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, EVEN_K: tl.constexpr
):
    """x[rows] · Aᵀ in fp32 over columns start … stop; `a`: where the rank rows start."""
    acc = tl.zeros((BM, RP), tl.float32)
    for first in range(start, stop, BK):
        cols = first + tl.arange(0, BK)
        x_in = inside if EVEN_K else inside & (cols < K)[None, :]
        a_in = has[None, :] if EVEN_K else has[None, :] & (cols < K)[:, None]
        xt = tl.load(x + rows * K + cols[None, :], mask=x_in, other=0.0)
        at = tl.load(a[None, :] + cols[:, None], mask=a_in, other=0.0)
        acc = tl.dot(xt, at.to(xt.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def _routed_shrink_kernel(
    x, a, z, planes, counters, tiles, order, offsets, slots, table, ranks, S, K, R, ap, ai, ar, tm, zm, chunk,
    BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, SPLITS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """z of a tile and output slice: each part of K fills its own plane, the last to arrive adds the planes in order."""
    i = tl.program_id(1)
    start = tl.program_id(2) * chunk
    rows, inside, entries, head, length = _tokens(tiles, order, offsets, BM)
    planes += entries * SPLITS * zm + i * R
    for j in range(length):
        slot, pages, rank = _adapter(slots, head + j, table, tm, ranks, S)
        for first in range(0, rank, RP):
            row = first + tl.arange(0, RP)
            at = _rank_rows(a + i * ai, ap, ar, pages, row, rank)
            part = _shrunk(x, rows, inside, at, row < rank, start, min(K, start + chunk), K, BM, BK, RP, EVEN_K)
            own = planes + (j * SPLITS + tl.program_id(2)) * zm + row[None, :]
            tl.store(own, part, mask=inside & (row < rank)[None, :])
    # Every thread's stores come before the one thread that takes the ticket; no program waits for another.
    tl.debug_barrier()
    ticket = counters + tl.program_id(0) * tl.num_programs(1) + i
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        for j in range(length):
            slot, pages, rank = _adapter(slots, head + j, table, tm, ranks, S)
            for first in range(0, R, RP):
                row = first + tl.arange(0, RP)[None, :]
                total = tl.zeros((BM, RP), tl.float32)
                for part in range(SPLITS):
                    # From the L2 cache: this multiprocessor's L1 may hold what another program has written over.
                    at = planes + (j * SPLITS + part) * zm + row
                    total += tl.load(at, mask=inside & (row < rank), other=0.0, cache_modifier=".cg")
                tl.store(z + (entries + j) * zm + i * R + row, total, mask=inside & (row < R))
        tl.store(ticket, 0)


@triton.jit
def _routed_expand_kernel(
    y, z, x, a, b, bias, gates, scales, columns, tiles, order, offsets, slots, table, ranks,
    S, K, R, ap, ai, ar, tm, zm, N, bp, br, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    RP: tl.constexpr, BLOCKS: tl.constexpr, SHRINK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A tile's columns of y, which is x Wᵀ + bias, in place. SHRINK: z is computed here, by every block of columns.

    BLOCKS: (first block, first column, end) of each slice, so that no block of columns lies in two.
    """
    rows, inside, entries, head, length = _tokens(tiles, order, offsets, BM)
    block = tl.program_id(1)
    i, start, end, written = 0, 0, 0, 0
    for part in tl.static_range(len(BLOCKS)):
        here = block >= BLOCKS[part][0]
        i, end = tl.where(here, part, i), tl.where(here, BLOCKS[part][2], end)
        start = tl.where(here, BLOCKS[part][1] + (block - BLOCKS[part][0]) * BN, start)
        written = tl.where(here, tl.where(block == BLOCKS[part][0], R, 0), written)
    cols = start + tl.arange(0, BN)
    there = y + rows * N + cols[None, :]
    acc = tl.load(there, mask=inside & (cols < end)[None, :], other=0.0).to(tl.float32)
    for j in range(length):
        slot, pages, rank = _adapter(slots, head + j, table, tm, ranks, S)
        update = tl.zeros((BM, BN), tl.float32)
        place = z + (entries + j) * zm + i * R
        for first in range(0, rank, RP):
            row = first + tl.arange(0, RP)
            if SHRINK:
                at = _rank_rows(a + i * ai, ap, ar, pages, row, rank)
                zt = _shrunk(x, rows, inside, at, row < rank, 0, K, K, BM, BK, RP, EVEN_K)
                tl.store(place + row[None, :], zt, mask=inside & (row < written)[None, :])
            else:
                zt = tl.load(place + row[None, :], mask=inside & (row < rank)[None, :], other=0.0)
            at = _rank_rows(b, bp, br, pages, row, rank)
            bt = tl.load(at[:, None] + cols[None, :], mask=(row < rank)[:, None] & (cols < end)[None, :], other=0.0)
            update = tl.dot(zt.to(bt.dtype), bt, update, input_precision="ieee")
        if SHRINK:
            for first in range(tl.cdiv(rank, RP) * RP, written, RP):
                row = first + tl.arange(0, RP)[None, :]
                tl.store(place + row, tl.zeros((BM, RP), tl.float32), mask=inside & (row < written))
        # Without DoRA nothing is loaded here: d and x Wᵀ are zeros.
        column = tl.load(columns + slot, mask=rank > 0, other=-1).to(tl.int64)
        scaled = cols < tl.where(column < 0, 0, end)
        d = tl.load(b + column * bp + cols, mask=scaled, other=0.0).to(tl.float32)[None, :]
        base = tl.load(there, mask=inside & scaled[None, :], other=0.0).to(tl.float32)
        if bias is not None:
            base -= tl.load(bias + cols, mask=scaled, other=0.0).to(tl.float32)[None, :]
        update = (1 + d) * tl.load(scales + slot, mask=rank > 0, other=0.0) * update + d * base
        acc += tl.load(gates + entries + j, mask=inside, other=0.0) * update
    tl.store(there, acc.to(y.dtype.element_ty), mask=inside & (cols < end)[None, :])


@lru_cache(maxsize=4096)
def _plan(few, K, R, itemsize, slices):
    """(blocks of columns, columns of K in a part, shrink's options, expand's, which may do without shrink's launch)."""
    RP, blocks, block, column = config.rank_block(R, 32), [], 0, 0
    c, BN = config.shrink(16, itemsize, RP, True), config.expand(16, itemsize).BN
    for width in slices:
        blocks.append((block, column, column + width))
        block, column = block + config.cdiv(width, BN), column + width
    # At most 8 parts, by K alone: no token's z depends on the others.
    chunk = max(256, config.cdiv(K, 8 * c.BK) * c.BK)
    both = dict(BM=16, BK=c.BK, RP=RP, EVEN_K=K % c.BK == 0, num_warps=c.warps, num_stages=c.stages)
    once = dict(BN=BN, BLOCKS=tuple(blocks), SHRINK=few and min(slices) > 0)
    return block, chunk, dict(both, SPLITS=max(1, config.cdiv(K, chunk))), both | once


def lora_routed_forward(x, weight, lora_A, lora_B, scaling, bias, route, gates, column_scale, slices, pages):
    """(y, z (n, k·R) fp32, zero beyond a rank): the base layer by ATen, then one launch for few tokens, else two."""
    (offsets, slots, order, tiles), (a, b, table, ranks, scales, columns) = route[:4], pages[:6]
    x2, k, R, (N, K) = tile.rows_of(x).contiguous(), a.shape[1], 8 * table.shape[1], weight.shape
    y = torch.nn.functional.linear(x2, weight, bias)
    z = torch.empty((len(slots), k * R), dtype=torch.float32, device=x.device)
    if z.numel() and y.numel():
        blocks, chunk, shrink, expand = _plan(len(x2) <= FEW, K, R, x.element_size(), tuple(slices) or (N,))
        lists = tiles, order, offsets, slots, table, ranks, len(ranks), K, R, *a.stride()[:3], table.stride(0), k * R
        if not expand["SHRINK"]:
            planes, tickets = z.new_empty(shrink["SPLITS"] * z.numel()), tile.tickets(len(tiles) * k, x)
            arguments = x2, a, z, planes, tickets, *lists, chunk
            tile.launch(_routed_shrink_kernel, (len(tiles), k, shrink["SPLITS"]), x, *arguments, **shrink)
        arguments = y, z, x2, a, b, bias, gates, scales, columns, *lists, N, *b.stride()[:2]
        tile.launch(_routed_expand_kernel, (len(tiles), blocks), x, *arguments, **expand)
    return y.view(*x.shape[:-1], N), z


def lora_routed_forward_objection(x, weight, lora_A, lora_B, scaling, bias, route, gates, column_scale, slices, pages):
    """The sentence that says why Triton cannot take this call, or None."""
    if lora_A or not pages:
        return "the kernels read adapters from pages; those that are tensors of their own (lora_A, lora_B) run composed"
    if pages[0].stride(3) != 1 or pages[1].stride(2) != 1:
        return "the elements of a rank row in the pages do not lie side by side"
    return tile.objection(x, weight, bias, *route[:4], gates, *pages[:6])
