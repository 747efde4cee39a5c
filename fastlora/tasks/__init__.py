"""Named tasks: many adapters on one model, TheDiscoMole/LoRA's interface, with simultaneous tasks."""

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
