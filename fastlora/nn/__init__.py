"""Modules that own adapters."""

from fastlora.nn.layer import LoRALayer
from fastlora.nn.linear import Linear
from fastlora.nn.switch import checkpoint_context

__all__ = ["Linear", "LoRALayer", "checkpoint_context"]
