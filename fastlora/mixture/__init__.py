"""X-LoRA: a mixture of LoRA experts, gated for each token by a classifier on the model's own last hidden state."""

from fastlora.mixture.classifier import xLoRAClassifier, xLoRAConfig
from fastlora.mixture.files import load_scalings_log
from fastlora.mixture.model import (
    add_xlora_to_model,
    disable_scalings_logging,
    enable_scalings_logging,
    flush_log_scalings,
    from_pretrained,
    print_scalings_predictions,
    set_scalings_with_lifetime,
    xLoRAModel,
)
from fastlora.model import get_nb_trainable_parameters, print_trainable_parameters

__all__ = [
    "add_xlora_to_model", "disable_scalings_logging", "enable_scalings_logging", "flush_log_scalings",
    "from_pretrained", "get_nb_trainable_parameters", "load_scalings_log", "print_scalings_predictions",
    "print_trainable_parameters", "set_scalings_with_lifetime", "xLoRAClassifier", "xLoRAConfig", "xLoRAModel",
]  # fmt: skip
