"""fastlora: LoRA at the speed of the base layer, from one adapter to thousands."""

from fastlora import nn
from fastlora.backends import use_backend
from fastlora.checkpoint import load_adapter, load_lora_state_dict, lora_state_dict, save_adapter
from fastlora.dynamic import DyLinear
from fastlora.explain import explain
from fastlora.model import (
    disable_adapter,
    enable_input_require_grads,
    inject,
    mark_only_lora_as_trainable,
    merge,
    merge_and_export,
    print_trainable_parameters,
    refresh,
    remove,
    set_scale,
    unmerge,
)
from fastlora.nn import *  # noqa: F403
from fastlora.ops import Pages, Route, lora_expand, lora_linear, lora_routed, lora_shrink

__version__ = "0.1.0"
__all__ = [
    "DyLinear", "Pages", "Route", "disable_adapter", "enable_input_require_grads", "explain", "inject", "load_adapter",
    "load_lora_state_dict", "lora_expand", "lora_linear", "lora_routed", "lora_shrink", "lora_state_dict",
    "mark_only_lora_as_trainable", "merge", "merge_and_export", "print_trainable_parameters", "refresh", "remove",
    "save_adapter", "set_scale", "unmerge", "use_backend",
]  # fmt: skip
__all__ += nn.__all__
