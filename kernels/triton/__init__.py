"""Triton's form of the ops: for each op a launcher with the op's signature, and `objection(*args)` or the op's own.

Installed as `fastlora.kernels`; imports torch and triton only, and nothing of fastlora.
"""
# ruff: noqa: F401

from .dropout import lora_dropout
from .expand import lora_expand, lora_expand_backward
from .linear import lora_linear_backward, lora_linear_forward
from .routed import lora_routed_forward, lora_routed_forward_objection
from .shrink import lora_shrink, lora_shrink_backward
from .tile import objection
