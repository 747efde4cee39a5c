"""y + (lora_A[:, ids]ᵀ ⊙ g) lora_Bᵀ, and its gradients: an embedding's x lora_Aᵀ is a gather."""

import torch

import triton
import triton.language as tl

from . import tile
from .expand import expand_backward, gated, lora_expand, plan


@triton.jit
def _embedding_kernel(
    y, ids, a, z, g, b, out, scale, M, N, R, V, ym, yn, ar, av, gm, gr, bn, br,
    BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """A tile of y. Every block of columns gathers z from a [R, V], the first one stores it."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    acc = tl.load(y + rows[:, None] * ym + cols[None, :].to(tl.int64) * yn, mask=inside, other=0.0).to(tl.float32)
    to: tl.constexpr = y.dtype.element_ty
    token = tl.load(ids + rows, mask=rows < M, other=-1).to(tl.int64)
    # What names no column of a reads as a row beyond the last: zeros.
    known = tl.where((token >= 0) & (token < V), rows, M)
    at = a + token[:, None] * av
    acc = tile.update(acc, at, 0, ar, g, gm, gr, scale, b, bn, br, known, cols, M, N, R, to, RP, ONE)
    tl.store(out + rows[:, None] * N + cols[None, :], acc.to(to), mask=inside)
    for first in range(0, tl.where(tl.program_id(1) == 0, R, 0), RP):
        ranks = first + tl.arange(0, RP)
        zt = tile.load_gated(at, 0, ar, None, 0, 0, 1.0, known, ranks, M, R, tl.float32)
        tl.store(z + rows[:, None] * R + ranks[None, :], zt, mask=(rows < M)[:, None] & (ranks < R)[None, :])


def _inside(ids, vocabulary):
    """(ids as a vector, 0 for those that no table has, the others' mask)."""
    known = (ids >= 0) & (ids < vocabulary)
    return ids.where(known, 0).reshape(-1), known.reshape(-1, 1)


def lora_embedding_forward(y, ids, lora_A, lora_B, scaling, gates, ranks, padding_idx, scale_grad_by_freq):
    """(a new y with the update added, z (…, R) fp32, before the gate and 0 for an id outside the tables)."""
    y2, b, a = tile.rows_of(y), tile.join(lora_B, 1), lora_A[0]
    (M, N), R, V = y2.shape, b.shape[1], a.shape[1]
    if len(lora_A) > 1 or not (M and N and R) or a.numel() >> 31:
        # Tables as long as the vocabulary are not joined: a gather of each.
        tokens, known = _inside(ids, V)
        z = torch.cat([a.t().index_select(0, tokens).float() for a in lora_A], 1)
        z = z.where(known, 0.0).view(*y.shape[:-1], R)
        return lora_expand(y, z, lora_B, scaling, gates, ranks, ()), z
    out, z = y.new_empty(y.shape), y.new_empty((*y.shape[:-1], R), dtype=torch.float32)
    g, (grid, options) = tile.gate(scaling, gates, ranks, z), plan(M, N, R, y.element_size())
    tile.launch(
        _embedding_kernel, grid, y,
        y2, ids.contiguous(), a, z, g.rows, b, out, g.scale, M, N, R, V,
        *y2.stride(), *a.stride(), g.gm, g.gr, *b.stride(), **options,
    )  # fmt: skip
    return out, z


def lora_embedding_backward(dy, ids, lora_A, lora_B, scaling, gates, ranks, padding_idx, scale_grad_by_freq, z, needs):
    """([dA], [dB], dscaling, dgates) of the outputs that are needed; dA is dz, added up in the columns of ids."""
    t, g, *grads = expand_backward(tile.rows_of(dy), z, lora_B, scaling, gates, ranks, needs)
    if not needs[0]:
        return [], *grads
    tokens, known = _inside(ids, V := lora_A[0].shape[1])
    dz = gated(t, g).where(known, 0.0)
    da = torch.ops.aten.embedding_dense_backward(dz, tokens, V, padding_idx, scale_grad_by_freq)
    return tile.split(da.t().contiguous(), lora_A, 0), *grads
