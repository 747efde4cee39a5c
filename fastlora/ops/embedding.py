"""y + (lora_A[:, ids]ᵀ ⊙ g) lora_Bᵀ: of an embedding's one-hot x, x lora_Aᵀ is a gather.

y (..., out), mostly W[ids], is never written; ids (...) of int64 or int32; lora_A (r, num_embeddings) and lora_B (out,
r) of each adapter. `padding_idx`, −1 for none, and `scale_grad_by_freq` are those of torch's embedding, for lora_A's
gradient, which is dense.
"""

import torch

from fastlora.ops import check
from fastlora.ops.dropout import wide
from fastlora.ops.expand import lora_expand_op
from fastlora.ops.library import define
from fastlora.ops.shrink import join


def lora_embedding_reference(y, ids, lora_A, lora_B, scaling, gates, ranks, padding_idx, scale_grad_by_freq):
    """By ops that have gradients: its own are theirs."""
    check.embedding(y, ids, lora_A, lora_B, scaling, gates, ranks, padding_idx, scale_grad_by_freq)
    z = [torch.embedding(a.t(), ids, padding_idx, scale_grad_by_freq) for a in lora_A]
    return lora_expand_op(y, join(z, y, y.dtype).to(wide(y)), lora_B, scaling, gates, ranks, ())


_ARGUMENTS = (
    "Tensor y, Tensor ids, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor? gates, int[] ranks, "
    "int padding_idx, bool scale_grad_by_freq"
)
lora_embedding_op = define(
    "lora_embedding", _ARGUMENTS, "Tensor", lambda y, *_: y.new_empty(y.shape), check.embedding,
    lora_embedding_reference,
)  # fmt: skip
