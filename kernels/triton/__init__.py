"""Triton's form of the ops: for each op a launcher with the op's signature and `<op>_objection(*args)`.

Installed as `fastlora.kernels`; imports torch and triton only, and nothing of fastlora.
"""
# ruff: noqa: F401

from .dropout import lora_dropout, lora_dropout_objection
from .expand import lora_expand, lora_expand_backward, lora_expand_backward_objection, lora_expand_objection
from .linear import (
    lora_linear_backward,
    lora_linear_backward_objection,
    lora_linear_forward,
    lora_linear_forward_objection,
)
from .routed import lora_routed_forward, lora_routed_forward_objection
from .shrink import lora_shrink, lora_shrink_backward, lora_shrink_backward_objection, lora_shrink_objection
