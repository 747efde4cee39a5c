"""y + (lora_A[:, ids]ᵀ ⊙ g) lora_Bᵀ, and its gradients: an embedding's x lora_Aᵀ is a gather."""

import torch

from . import tile
from .expand import expand_backward, gated, lora_expand


def _inside(ids, vocabulary):
    """(ids as a vector, 0 for those that no table has, the others' mask)."""
    known = (ids >= 0) & (ids < vocabulary)
    return ids.where(known, 0).reshape(-1), known.reshape(-1, 1)


def lora_embedding_forward(y, ids, lora_A, lora_B, scaling, gates, ranks, padding_idx, scale_grad_by_freq):
    """(a new y with the update added, z (…, R) fp32, before the gate and 0 for an id outside the tables)."""
    shape, a = (*y.shape[:-1], sum(a.shape[0] for a in lora_A)), lora_A[0]
    if len(lora_A) > 1 or not y.numel() or a.numel() >> 31:
        # Tables as long as the vocabulary are not joined: a gather of each.
        tokens, known = _inside(ids, a.shape[1])
        z = torch.cat([a.t().index_select(0, tokens).float() for a in lora_A], 1)
        z = z.where(known, 0.0).view(shape)
        return lora_expand(y, z, lora_B, scaling, gates, ranks, ()), z
    z = y.new_empty(shape, dtype=torch.float32)
    return lora_expand(y, z, lora_B, scaling, gates, ranks, (), a.t(), ids.contiguous()), z


def lora_embedding_backward(dy, ids, lora_A, lora_B, scaling, gates, ranks, padding_idx, scale_grad_by_freq, z, needs):
    """([dA], [dB], dscaling, dgates) of the outputs that are needed; dA is dz, added up in the columns of ids."""
    t, g, *grads = expand_backward(tile.rows_of(dy), z, lora_B, scaling, gates, ranks, needs)
    if not needs[0]:
        return [], *grads
    tokens, known = _inside(ids, V := lora_A[0].shape[1])
    dz = gated(t, g).where(known, 0.0)
    da = torch.ops.aten.embedding_dense_backward(dz, tokens, V, padding_idx, scale_grad_by_freq)
    return tile.split(da.t().contiguous(), lora_A, 0), *grads
