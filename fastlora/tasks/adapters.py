"""The adapters of a task, and which modules get what: TheDiscoMole/LoRA's registry of types."""

import functools
import math

import torch
from torch import nn

from fastlora.nn import names
from fastlora.nn.bank import TaskAdapter
from fastlora.nn.convert import kind_of, like
from fastlora.nn.fastpath import is_called
from fastlora.nn.layer import LoRALayer, check_adapter
from fastlora.ops import check

__all__ = [
    "ConvNd", "Embedding", "Linear", "base_module_wrappers", "get_module_task_constructor",
    "register_base_module_wrapper",
]  # fmt: skip


def default_rank(*sizes):
    """The original's rank: the square root of the smaller of a layer's two sizes."""
    return int(math.sqrt(min(sizes)))


def make_adapter(module, rank=default_rank, lora_alpha=None, init="zero", base=None):
    """A TaskAdapter for a layer, of scale lora_alpha / rank; `rank` is a number or a function of the layer's sizes."""
    kind = type(module) if isinstance(module, LoRALayer) else kind_of(module)
    check.value(kind, "module", f"a {type(module).__name__}", "a layer that can have an adapter")
    if callable(rank):
        shapes = [math.prod(shape) for shape in kind.adapter_shapes(module, 1)]
        rank = rank(*((module.in_channels, module.out_channels) if hasattr(module, "in_channels") else shapes))
    lora_alpha = rank if lora_alpha is None else lora_alpha
    check_adapter(rank, lora_alpha, 0.0, least=1)
    base, adapter = like(module) if base is None else base, TaskAdapter()
    # not the eight-bit floats of a quantised weight
    dtype = base.dtype if base.is_floating_point() and base.itemsize > 1 else torch.float32
    adapter.attach_factors(kind.adapter_shapes(module, rank), rank, lora_alpha, dtype, base.device)
    kind.init_adapter(module, adapter.lora_A, adapter.lora_B)
    if init == "original":
        for factor in names.to_tasks(kind.kind, adapter.lora_A, adapter.lora_B):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    return adapter


# the original's names of it: rank(in_features, out_features) and rank(num_embeddings, embedding_dim)
Linear = Embedding = make_adapter


def ConvNd(dims, module, rank=default_rank):
    """A task's adapter for a convolution of `dims` dimensions, of rank `rank(in_channels, out_channels)`."""
    return make_adapter(module, rank)


base_module_wrappers = {
    **{cls: functools.partial(ConvNd, dims) for dims, cls in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)},
    nn.Embedding: Embedding,
    nn.Linear: Linear,
}
_own = tuple(base_module_wrappers.values())


def register_base_module_wrapper(base_type, constructor):
    """Let `Model` give modules of `base_type` tasks made by `constructor(module)`, and not look inside them.

    The constructor returns what `Linear`, `Embedding` or `ConvNd` of this module return, or any nn.Module: that one
    runs in the base module's place while its task is chosen, and is a task's parameters.
    """
    kind = isinstance(base_type, type) and issubclass(base_type, nn.Module)
    check.kind(kind, "base_type", repr(base_type), "a subclass of nn.Module")
    check.kind(callable(constructor), "constructor", type(constructor).__name__, "a function of a module")
    base_module_wrappers[base_type] = constructor


def get_module_task_constructor(module):
    """The constructor of the first registered type that `module` is an instance of, or None."""
    return next((make for base_type, make in base_module_wrappers.items() if isinstance(module, base_type)), None)


def custom_constructor(module):
    """What a user has registered for a module's type; None where fastlora's own adapters are meant."""
    make = get_module_task_constructor(module)
    return None if make in _own else make


def becomes_bank(module):
    """Whether a layer's tasks are adapters, and not modules of a user's own."""
    make = custom_constructor(module)
    with torch.random.fork_rng(devices=[]):
        return make is None or isinstance(make(module), TaskAdapter)


def find(name, module, seen):
    """The names of what is to be wrapped; a match is not entered."""
    if id(module) in seen:
        return
    seen.add(id(module))
    # a subclass with a forward of its own is no layer that has an adapter's formula
    if custom_constructor(module) or kind_of(module):
        yield name
        return
    for child, m in module.named_children():
        if is_called(child, {"": module}):
            yield from find(f"{name}.{child}".lstrip("."), m, seen)
