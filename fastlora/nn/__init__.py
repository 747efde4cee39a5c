"""Modules that own adapters."""

from fastlora.nn.attention import MultiheadAttention
from fastlora.nn.conv import Conv1d, Conv2d, Conv3d
from fastlora.nn.embedding import Embedding
from fastlora.nn.layer import LoRALayer
from fastlora.nn.linear import Linear, MergedLinear
from fastlora.nn.switch import checkpoint_context

__all__ = [
    "Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoRALayer", "MergedLinear", "MultiheadAttention",
    "checkpoint_context",
]  # fmt: skip
