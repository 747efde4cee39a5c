"""fastlora: LoRA at the speed of the base layer, from one adapter to thousands."""

from fastlora.backends import use_backend
from fastlora.ops import lora_expand, lora_linear, lora_shrink

__version__ = "0.1.0"
__all__ = ["lora_expand", "lora_linear", "lora_shrink", "use_backend"]
