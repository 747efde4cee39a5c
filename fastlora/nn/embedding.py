"""LoRA on embeddings: y = W[ids] + s lora_A[:, ids]ᵀ lora_Bᵀ: x lora_Aᵀ of the formula becomes a gather."""

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.nn.layer import LoRALayer
from fastlora.nn.switch import match_rows, rank_list
from fastlora.ops import check
from fastlora.ops.dropout import draw_seed, lora_dropout_op
from fastlora.ops.expand import lora_expand_op


class EmbeddingLoRA(LoRALayer):
    """What an embedding's lora_A (r, num_embeddings) and lora_B (embedding_dim, r) mean."""

    kind = "embedding"

    def check_base(self, r):
        # torch renormalises the rows of W in place
        check.value(self.max_norm is None, "max_norm", self.max_norm, "None: it writes to the frozen weight")

    def adapter_shapes(self, r):
        return (r, self.num_embeddings), (self.embedding_dim, r)

    def init_adapter(self, lora_A, lora_B):
        """lora_A zero, lora_B normal: the other way round than in a linear layer, as in loralib."""
        nn.init.zeros_(lora_A)
        nn.init.normal_(lora_B)

    def delta(self, lora_A, lora_B):
        return (lora_B @ lora_A).T

    def plain(self, ids, weight):
        options = self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        return F.embedding(ids, weight, *options)

    def adapted(self, ids, A, B, scaling, gates):
        ids, gates = match_rows(ids, ids.shape, gates)
        if len(A) == 1 and not (A[0].requires_grad and torch.is_grad_enabled()):
            z, rows = A[0].t(), ids
        else:
            # dense gradients, whatever W's are: torch has no sparse gradient of a transposed view
            z = [F.embedding(ids, a.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq) for a in A]
            z, rows = z[0] if len(z) == 1 else torch.cat(z, -1), None
        ranks = rank_list(A, gates)
        if (p := self.dropout_p()) > 0:
            # dropout of a one-hot row: the token's update is kept or not
            kept = lora_dropout_op(z.new_ones((*ids.shape, 1)), p, draw_seed(z))
            gates = kept if gates is None else gates * kept
        return lora_expand_op(self.plain(ids, self.weight), z, B, scaling, gates, ranks, (), rows)


class Embedding(EmbeddingLoRA, nn.Embedding):
    """loralib's Embedding: the same arguments, initial values and state-dict keys, and `lora_dropout`.

    y = W[ids] + lora_alpha / r lora_A[:, ids]ᵀ lora_Bᵀ; ids (...) of integers, W (num_embeddings, embedding_dim),
    lora_A (r, num_embeddings), zero at first, lora_B (embedding_dim, r). Only the rows that `ids` names are read and
    get gradients. Dropout drops a token's whole update. `kwargs` go to nn.Embedding; `max_norm` is refused with r > 0,
    as it writes to the weight. Raises ValueError naming the argument. Source: Hu et al. 2021, arXiv 2106.09685.
    """

    lora_base = nn.Embedding

    def __init__(self, num_embeddings, embedding_dim, r=0, lora_alpha=1, merge_weights=True, lora_dropout=0.0,
                 **kwargs):  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        weight = self.weight.data
        if kwargs.get("_weight") is not None:
            # from_pretrained's tensor, over which loralib draws anew
            self.weight.data = torch.empty_like(weight)
        self.adapt(r, lora_alpha, lora_dropout, merge_weights)
        self.weight.data = weight
