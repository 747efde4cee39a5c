"""The classifier: hidden states in, gates of the experts out."""

import itertools

import torch
from torch import nn

from fastlora.ops import check


class xLoRAClassifier(nn.Module):
    """Gates (batch, tokens, layers, n) from hidden states (batch, tokens, hidden_size).

    `inner` and `last` have xlora's names. Where all layers have the same gates their dimension is 1, and where a
    sequence has one set of gates there is no dimension of tokens.
    """

    def __init__(self, config, layers, experts, like):
        super().__init__()
        self.config, self.experts = config, experts
        sizes = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1)]
        out = experts * (layers if config.layerwise_scalings else 1)
        options = {"bias": config.use_bias, "device": config.device or like.device, "dtype": like.dtype}
        self.inner = nn.ModuleList()
        for before, after in itertools.pairwise(sizes):
            self.inner.append(nn.Linear(before, after, **options))
            if config.enable_relu_and_dropout:
                self.inner.extend([nn.ReLU(), nn.Dropout(config.xlora_dropout_p)])
        self.last = nn.Linear(sizes[-1], out, **options)

    def forward(self, hidden, attention_mask=None, input_ids=None):
        if not self.config.per_token:
            hidden = self.pool(hidden, attention_mask, input_ids)
        hidden = hidden.to(self.last.weight.dtype)
        for layer in self.inner:
            hidden = layer(hidden)
        scalings = self.last(hidden).unflatten(-1, (-1, self.experts))
        return (scalings / self.config.softmax_temperature).softmax(-1) if self.config.enable_softmax else scalings

    def pool(self, hidden, attention_mask, input_ids):
        """(batch, hidden_size): a sequence's mean or last hidden state, its padding left out."""
        mask = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask[:, -hidden.shape[1] :]
        stop = self.config.stop_token_id
        if stop is not None and input_ids is not None:
            # up to the first one
            mask = mask * (((input_ids == stop) & (mask != 0)).cumsum(1) == 0)
        if self.config.use_mean_pool:
            return (hidden * mask[..., None]).sum(1).to(hidden.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
        last = (mask != 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return hidden[torch.arange(len(hidden), device=hidden.device), last.argmax(1)]

    def select(self, scalings):
        """The gates: of each token's the `top_k_lora` largest, times `global_scaling_weight`."""
        k = self.config.top_k_lora
        if k is not None:
            top = scalings.topk(k, dim=-1)
            chosen = top.values.softmax(-1) if self.config.enable_softmax_topk else top.values
            scalings = torch.zeros_like(scalings).scatter(-1, top.indices, chosen)
        return scalings * self.config.global_scaling_weight


def check_k(k, experts):
    """Raise ValueError for a top_k_lora that this number of experts does not have."""
    fits = k is None or isinstance(k, int) and 1 <= k <= experts
    check.value(fits, "top_k_lora", repr(k), f"None or an integer from 1 to {experts}, the number of experts")
