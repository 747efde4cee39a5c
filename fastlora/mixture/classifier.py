"""The classifier, hidden states in, gates of the experts out; and its configuration in the words of X-LoRA and PEFT."""

import dataclasses
import itertools
import math
import warnings

import torch
from torch import nn

from fastlora.ops import check


@dataclasses.dataclass
class xLoRAConfig:
    """X-LoRA's configuration.

    hidden_size: None is the model's. adapters: {name: PEFT folder}, or given to `add_xlora_to_model`. device: the
    classifier's, of `xlora_depth` linear layers, with `use_bias`, the inner ones `xlora_size` wide and, with
    `enable_relu_and_dropout`, followed by ReLU and dropout of `xlora_dropout_p`. `layerwise_scalings`: gates for each
    layer. `per_token=False`: a sequence has one set of gates, as in the first version, from the mean of its hidden
    states (`use_mean_pool`) or from its last one, before the first `stop_token_id` if that is given.

    The gates: softmax of logits / `softmax_temperature` with `enable_softmax`; of these the `top_k_lora` largest, as
    they are, or with `enable_softmax_topk` their softmax; times `global_scaling_weight`. `scaling_pass_value`: the
    gates in the pass that the classifier reads; 0 is the plain model, None is 1 / n. `use_trainable_adapters`: the
    experts train too. Raises ValueError naming the field. Source: Buehler and Buehler 2024, arXiv 2402.07148.
    """

    hidden_size: int | None = None
    base_model_id: str = ""
    device: object = None
    adapters: dict | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    enable_relu_and_dropout: bool = True
    use_bias: bool = True
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float | None = 0.0
    global_scaling_weight: float = 1.0
    stop_token_id: int | None = None
    use_mean_pool: bool = True
    per_token: bool = True

    def __post_init__(self):
        for name in ("xlora_depth", "xlora_size"):
            value = getattr(self, name)
            check.value(isinstance(value, int) and value > 0, name, repr(value), "a positive integer")
        p, heat, k = self.xlora_dropout_p, self.softmax_temperature, self.top_k_lora
        check.value(0 <= p < 1, "xlora_dropout_p", p, "a number from 0 up to 1")
        check.value(math.isfinite(heat) and heat > 0, "softmax_temperature", heat, "a positive number")
        check.value(k is None or isinstance(k, int) and k > 0, "top_k_lora", repr(k), "a positive integer or None")
        check.value(k or not self.enable_softmax_topk, "enable_softmax_topk", True, "top_k_lora with it")
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn("fastlora: enable_softmax_topk takes the softmax of enable_softmax's softmax", stacklevel=3)


class xLoRAClassifier(nn.Module):
    """Gates (batch, tokens, layers, n) from hidden states (batch, tokens, hidden_size).

    `inner`, `last`: xlora's names. If all layers share gates, layers is 1; a sequence's have no dimension of tokens.
    """

    def __init__(self, config, layers, experts, like):
        super().__init__()
        self.config, self.experts = config, experts
        sizes = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1)]
        options = {"bias": config.use_bias, "device": config.device or like.device, "dtype": like.dtype}
        self.inner = nn.Sequential()
        for before, after in itertools.pairwise(sizes):
            self.inner.append(nn.Linear(before, after, **options))
            if config.enable_relu_and_dropout:
                self.inner.extend([nn.ReLU(), nn.Dropout(config.xlora_dropout_p)])
        self.last = nn.Linear(sizes[-1], experts * (layers if config.layerwise_scalings else 1), **options)

    def forward(self, hidden, attention_mask=None, input_ids=None):
        if not self.config.per_token:
            hidden = self.pool(hidden, attention_mask, input_ids)
        logits = self.last(self.inner(hidden.to(self.last.weight.dtype)))
        scalings = logits.unflatten(-1, (-1, self.experts))
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
