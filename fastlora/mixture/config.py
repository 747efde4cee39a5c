"""What a mixture is made of, in the words of both eras of X-LoRA and of PEFT."""

import dataclasses
import math
import warnings

from fastlora.ops import check


@dataclasses.dataclass
class xLoRAConfig:
    """X-LoRA's configuration.

    hidden_size: None is the model's. adapters: {name: PEFT folder}, or given to `add_xlora_to_model`. device: the
    classifier's, of `xlora_depth` linear layers, with `use_bias`, the inner ones `xlora_size` wide and, with
    `enable_relu_and_dropout`, followed by ReLU and dropout of `xlora_dropout_p`. `layerwise_scalings`: gates for each
    layer. `per_token=False`: a sequence has one set of gates, as in the first version, from the
    mean of its hidden states (`use_mean_pool`) or from its last one, before the first `stop_token_id` if that is given.

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
