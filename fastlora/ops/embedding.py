"""y + (lora_A[:, ids]ᵀ ⊙ g) lora_Bᵀ: of an embedding's one-hot x, x lora_Aᵀ is a gather."""

import torch
import torch.nn.functional as F

from fastlora.ops import check
from fastlora.ops.dropout import wide
from fastlora.ops.expand import lora_expand_backward_reference, lora_expand_reference
from fastlora.ops.library import differentiable, scalar
from fastlora.ops.shrink import apart, join


def lora_embedding(
    y, ids, lora_A, lora_B, scaling=1.0, *, gates=None, ranks=None, padding_idx=None, scale_grad_by_freq=False
):
    """y with an embedding's low-rank update added: y + (lora_A[:, ids]ᵀ ⊙ g) lora_Bᵀ.

    y (..., out), mostly W[ids], is never written; ids (...) of int64 or int32; lora_A (R, num_embeddings) and lora_B
    (out, R), or sequences, one pair per adapter. `scaling`, `gates`, `ranks` as in `lora_linear`. The gradient of
    lora_A is dense; `padding_idx` gets none, `scale_grad_by_freq` divides it by how often an id stands in `ids`.
    Returns a new tensor of y's shape and dtype. Raises ValueError or TypeError that names the argument, IndexError for
    an id that is not in 0 … num_embeddings − 1 (on a GPU as torch's embedding does). Source: Hu et al. 2021,
    arXiv 2106.09685.
    """
    A, B = check.tensors("lora_A", lora_A), check.tensors("lora_B", lora_B)
    if ranks is None:
        ranks = [] if isinstance(lora_A, torch.Tensor) else [a.shape[0] for a in A]
    check.value(padding_idx is None or padding_idx >= 0, "padding_idx", padding_idx, "an id or None")
    padding_idx = -1 if padding_idx is None else padding_idx
    return lora_embedding_op(y, ids, A, B, scalar(scaling), gates, ranks, padding_idx, scale_grad_by_freq)


def lora_embedding_reference(y, ids, lora_A, lora_B, scaling, gates, ranks, padding_idx, scale_grad_by_freq):
    z = join([F.embedding(ids, a.t()) for a in lora_A], y, wide(y)).to(wide(y))
    return lora_expand_reference(y, z, lora_B, scaling, gates, ranks, ()), z


def lora_embedding_backward_reference(
    dy, ids, lora_A, lora_B, scaling, gates, ranks, padding_idx, scale_grad_by_freq, z, needs
):
    """dA is dz, added up in the columns that ids name; the others as in `lora_expand`."""
    dz, *grads = lora_expand_backward_reference(dy, z, lora_B, scaling, gates, ranks, (), needs)
    if not needs[0]:
        return [], *grads
    vocabulary = lora_A[0].shape[1]
    rows = torch.ops.aten.embedding_dense_backward(dz, ids, vocabulary, padding_idx, scale_grad_by_freq)
    return apart(rows.t(), lora_A, 0), *grads


def _fake(y, ids, lora_A, *_):
    return y.new_empty(y.shape), y.new_empty((*y.shape[:-1], sum(a.shape[0] for a in lora_A)), dtype=wide(y))


_ARGUMENTS = (
    "Tensor y, Tensor ids, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor? gates, int[] ranks, "
    "int padding_idx, bool scale_grad_by_freq"
)
_REFERENCES = lora_embedding_reference, lora_embedding_backward_reference
lora_embedding_op = differentiable(
    "lora_embedding", _ARGUMENTS, (2, 3, 4, 5), check.embedding, _fake, _REFERENCES, apart=0, kept=("z",)
)
