"""Named tasks: many adapters on one model, chosen for each call, together, or for each batch row.

The interface of TheDiscoMole/LoRA, with simultaneous tasks. A layer with the tasks e computes

    y = base(x) + Σ gate_e · scale_e · (D(x) A_eᵀ) B_eᵀ

in one call of the op, whatever their number; a task owns its parameters.
"""

from fastlora.tasks.adapters import (
    ConvNd,
    Embedding,
    Linear,
    base_module_wrappers,
    get_module_task_constructor,
    register_base_module_wrapper,
)
from fastlora.tasks.model import Model

__all__ = [
    "ConvNd", "Embedding", "Linear", "Model", "base_module_wrappers", "get_module_task_constructor",
    "register_base_module_wrapper",
]  # fmt: skip
