"""X-LoRA: a mixture of LoRA experts, gated for each token by a classifier on the model's own last hidden state."""

from fastlora.mixture import model
from fastlora.mixture.classifier import xLoRAClassifier, xLoRAConfig
from fastlora.mixture.files import load_scalings_log
from fastlora.mixture.model import *  # noqa: F403

__all__ = ["load_scalings_log", "xLoRAClassifier", "xLoRAConfig"]
__all__ += model.__all__
