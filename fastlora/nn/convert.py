"""Plain torch modules become LoRA layers, and back, by a change of class: hooks, device maps, ties and names stay."""

import sys
import types

import torch
from torch import nn

from fastlora.nn.attention import PROJECTIONS, AttentionLoRA, ProjectionLoRA
from fastlora.nn.conv import ConvLoRA
from fastlora.nn.embedding import EmbeddingLoRA
from fastlora.nn.fastpath import check_called
from fastlora.nn.linear import DenseLoRA, OpaqueLoRA, lora_class
from fastlora.ops import check

# exact type -> the kind of LoRA layer it becomes
_kinds = {
    nn.Linear: DenseLoRA,
    nn.Embedding: EmbeddingLoRA,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvLoRA),
    nn.MultiheadAttention: AttentionLoRA,
}
# types of linear layer that store W as (in, out)
_transposed = set()
# what an adapter adds to a module, and takes away again
_OWN = ("r", "lora_alpha", "lora_dropout", "lora_A", "lora_B", "scaling", "rank", "frozen", "_factor", "fan_in_fan_out",
        "merged", "merge_weights", "enable_lora", "form", "tasks", "owner", "place", "_merged_copy",
        "_ran", "_chose", "_stack", *(f"lora_{name}" for name in PROJECTIONS))  # fmt: skip


def kind_of(module):
    """The kind of LoRA layer that a module becomes; None for one that cannot have an adapter."""
    if (theirs := sys.modules.get("transformers.pytorch_utils")) and hasattr(theirs, "Conv1D"):
        # GPT-2's linear layer, known once another program has imported it
        _kinds[theirs.Conv1D] = DenseLoRA
        _transposed.add(theirs.Conv1D)
    kind = _kinds.get(getattr(type(module), "lora_base", type(module)))
    if kind is DenseLoRA:
        weight = module._parameters.get("weight")
        dense = type(weight) is nn.Parameter and weight.is_floating_point()
        return DenseLoRA if dense and weight.layout == torch.strided and weight.dim() == 2 else OpaqueLoRA
    sized = all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features"))
    return kind or (OpaqueLoRA if sized else None)


def dense_weight(module):
    """W as (out, in) of a module whose kind is DenseLoRA, plain or not."""
    return module.weight.t() if getattr(type(module), "lora_base", type(module)) in _transposed else module.weight


def check_convertible(name, modules, r):
    """Raise ValueError unless the module of this name can have an adapter of rank r, or tasks (None)."""
    kind = kind_of(modules[name]) if name in modules else None
    check.value(kind, "target_modules", f"{name!r}", "the name of a layer that can have an adapter")
    check_called(name, modules)
    module, attributes = modules[name], vars(modules[name])
    taken = [own for own in _OWN if hasattr(module, own)]
    got = f"a {type(module).__name__} with a {' and a '.join(taken)} of its own"
    check.value(not taken, name, got, "a layer without an adapter")
    weight = getattr(module, "weight", None)
    ready = not isinstance(weight, nn.UninitializedParameter) and not hasattr(weight, "device_mesh")
    check.value(ready, name, f"a {type(weight).__name__} as weight", "one that has a shape and is not yet sharded")
    hook = getattr(module, "_hf_hook", None)
    offloaded = any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))
    # that hook keeps a list of the weights that it moves
    check.value(not offloaded, name, "a module that accelerate offloads", "inject before dispatch_model")
    kept = "forward" not in attributes or _bound_forwards(module)
    check.value(kept, name, f"an instance attribute forward, {attributes.get('forward')}, that passes the adapter by",
                "the forward of its class")  # fmt: skip
    if hasattr(kind, "check_base"):
        kind.check_base(module, r)


def _bound_forwards(module):
    """The instance attributes that hold the class's own forward, as accelerate's `_old_forward`."""
    own = types.MethodType(type(module).forward, module)
    return [key for key, value in vars(module).items() if type(value) is types.MethodType and value == own]


def change_class(module, cls):
    """Make a module one of another class, with the forwards that accelerate has put on it."""
    bound = _bound_forwards(module)
    module.__class__ = cls
    for key in bound:
        vars(module)[key] = types.MethodType(cls.forward, module)


def like(module):
    """A tensor with the dtype and device that an adapter of this module takes after."""
    weight = module._parameters.get("weight")
    return next((t for t in (weight, *module.parameters(), *module.buffers()) if t is not None), torch.empty(0))


def convert(module, *mixins):
    """Make a module a LoRA layer, in place, without an adapter yet; `mixins` come before its kind (Bank, say)."""
    base, kind = type(module), kind_of(module)
    if kind is AttentionLoRA:
        change_class(module, lora_class(base, AttentionLoRA))
        module.add_projections(PROJECTIONS, lora_class(ProjectionLoRA, *mixins) if mixins else ProjectionLoRA)
    else:
        change_class(module, lora_class(base, *mixins, kind))
    if base in _transposed:
        module.fan_in_fan_out = True


@torch.no_grad()
def restore(module, merged):
    """Make a LoRA layer its base again, with W + ΔW as a new weight if `merged`."""
    base, turned = type(module).lora_base, getattr(module, "fan_in_fan_out", False)
    for _, layer, name, rows in module.places() if merged else ():
        if layer.r:
            path, _, key = name.rpartition(".")
            owner = module.get_submodule(path)
            weight = getattr(owner, key)
            new, update = weight.detach().clone(memory_format=torch.contiguous_format), layer.update(*layer.adapters())
            new[rows] += update.t() if turned else update
            setattr(owner, key, nn.Parameter(new, requires_grad=weight.requires_grad))
    if turned and base is nn.Linear:
        weight = module.weight
        module.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    for name in _OWN:
        for attributes in (module._parameters, module._modules, vars(module)):
            attributes.pop(name, None)
    change_class(module, base)
