"""fastlora: LoRA at the speed of the base layer, from one adapter to thousands."""

from fastlora import checkpoint, model, nn
from fastlora.backends import use_backend
from fastlora.checkpoint import *  # noqa: F403
from fastlora.dynamic import DyLinear
from fastlora.explain import explain
from fastlora.model import *  # noqa: F403
from fastlora.nn import *  # noqa: F403
from fastlora.ops import Pages, Route, lora_expand, lora_linear, lora_norm, lora_routed, lora_shrink

__version__ = "0.1.0"
__all__ = [
    "DyLinear", "Pages", "Route", "explain", "lora_expand", "lora_linear", "lora_norm", "lora_routed", "lora_shrink",
    "use_backend",
]  # fmt: skip
# one by one: type checkers read no other form
__all__ += checkpoint.__all__
__all__ += model.__all__
__all__ += nn.__all__
