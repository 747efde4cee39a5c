"""torch's two paths that read a linear layer's weight past its forward, where an adapter would be lost without a word.

In eval mode `nn.TransformerEncoderLayer` hands linear1.weight and linear2.weight to one fused kernel, and
`nn.TransformerEncoder` prepares nested tensors for it: both have an attribute that turns this off.
`nn.MultiheadAttention` always reads out_proj.weight itself: refused.
"""

import functools

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fastlora.ops import check

_SWITCHES = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))


def holds_adapters(module):
    """Whether this is a LoRA layer, or an attention layer with LoRA projections."""
    return getattr(module, "holds_adapters", False)


def update_fast_paths(model):
    """Turn the fused path off in every encoder that holds an adapter, and on again in those that no longer do."""
    for module in model.modules():
        _turn(module, on=not any(map(holds_adapters, module.modules())))


def _turn(module, on):
    for cls, name in _SWITCHES:
        if not isinstance(module, cls):
            continue
        if on and "_fast_path_before" in vars(module):
            setattr(module, name, vars(module).pop("_fast_path_before"))
        elif not on and getattr(module, name, False):
            module._fast_path_before = getattr(module, name)
            setattr(module, name, 0)


def is_called(name, modules):
    """Whether the parent of the module of this name calls it, and does not read its weight instead."""
    parent, _, child = name.rpartition(".")
    return not (isinstance(modules[parent], nn.MultiheadAttention) and child == "out_proj")


def check_called(name, modules):
    got = "the out_proj of nn.MultiheadAttention, whose weight is read without calling the layer"
    check.value(is_called(name, modules), name, got, "another linear layer: an adapter there would have no effect")


def _on_registration(parent, name, child):
    if holds_adapters(child):
        check_called(name, {"": parent})
        _turn(parent, on=False)


@functools.cache
def watch_registrations():
    """From now on a LoRA layer assigned by hand (`encoder_layer.linear1 = Linear(...)`) is seen too."""
    register_module_module_registration_hook(_on_registration)
