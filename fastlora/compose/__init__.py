"""LoraHub composition: weights for trained adapters, found on a few examples, and the ways to merge adapters."""

from fastlora.compose.lorahub import default_get_loss, default_l1_regularization, lorahub_inference, lorahub_learning
from fastlora.compose.merge import compose
from fastlora.compose.search import merge_composed, search

__all__ = [
    "compose", "default_get_loss", "default_l1_regularization", "lorahub_inference", "lorahub_learning",
    "merge_composed", "search",
]  # fmt: skip
