"""LoRA over a module tree: put adapters in, merge them, take them out."""

import copy
import difflib
import importlib
import re
import sys
import types
import warnings

import torch
from torch import nn

from fastlora.nn.fastpath import check_called, is_called, update_fast_paths
from fastlora.nn.layer import LoRALayer, check_adapter
from fastlora.nn.linear import DenseLoRA, OpaqueLoRA, lora_class
from fastlora.nn.switch import turned_off
from fastlora.ops import check

# exact types whose forward is x Wᵀ + bias -> whether W is stored (in, out)
_dense_types = {nn.Linear: False}
# what an adapter adds to a module, and takes away again
_OWN = ("r", "lora_alpha", "lora_dropout", "lora_A", "lora_B", "scaling", "fan_in_fan_out", "merged", "merge_weights",
        "_merged_copy", "_ran_off")  # fmt: skip
# module that defines a type of linear layer -> ours that registers it, loaded once the former is
_INTEGRATIONS = {"transformers.pytorch_utils": "fastlora.integrations.transformers"}


def register_linear(cls, fan_in_fan_out=False):
    """Treat modules of exactly this type as y = x Wᵀ + bias, with `weight` stored (in, out) if `fan_in_fan_out`."""
    _dense_types[cls] = fan_in_fan_out


def lora_layers(model):
    """{name: layer} of the layers with an adapter; ValueError for a model without LoRA layers of any rank."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}
    check.value(layers, "model", f"a {type(model).__name__} without LoRA layers", "an injected model")
    return {name: m for name, m in layers.items() if m.r}


def inject(model, r=8, lora_alpha=None, lora_dropout=0.0, target_modules="all-linear", dtype=None):
    """Give linear layers of `model` adapters, in place, and freeze everything else: y = x Wᵀ + bias + s (D(x) Aᵀ) Bᵀ.

    The modules change their class and stay the same objects: hooks, device maps, ties and base keys stay, and so do the
    outputs, as B is zero. s = lora_alpha / r; `lora_alpha` defaults to r. `target_modules`: "all-linear" (all but the
    output head), a name, suffix or regular expression of whole names, or a list of names and suffixes. Adapters are
    float32 (float64 on a float64 base) unless `dtype` says otherwise. Returns the model. Raises ValueError: a target
    without a match, a model injected before, a layer whose forward would be passed by.
    """
    lora_alpha = r if lora_alpha is None else lora_alpha
    names = find_targets(model, target_modules)
    return adapt(model, dict.fromkeys(names, (r, lora_alpha)), lora_dropout, dtype)


def adapt(model, plan, lora_dropout=0.0, dtype=None):
    """`inject` with `plan`, {module name: (r, lora_alpha)}. Nothing changes if any layer is refused."""
    plain = not any(isinstance(m, LoRALayer) for m in model.modules())
    check.value(plain, "model", "a model with LoRA layers", "a plain one, as remove(model) leaves it")
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    check.value(dtype is None or floating, "dtype", repr(dtype), "a floating torch.dtype or None")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (r, lora_alpha) in plan.items():
        check_adapter(r, lora_alpha, lora_dropout, least=1)
        _check_module(name, modules)
    for name, (r, lora_alpha) in plan.items():
        _attach(modules[name], r, lora_alpha, lora_dropout, dtype)
    update_fast_paths(model)
    mark_only_lora_as_trainable(model)
    return model


def find_targets(model, target_modules):
    """The names of the linear layers that `target_modules` means; see `inject`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = {name: m for name, m in modules.items() if linear_shape(m)}
    if target_modules == "all-linear":
        heads = {id(m.get_output_embeddings()) for m in modules.values() if hasattr(m, "get_output_embeddings")}
        found = [name for name, m in linear.items() if id(m) not in heads]
        for name in [name for name in found if not is_called(name, modules)]:
            found.remove(name)
            warnings.warn(f"fastlora: {name} gets no adapter: its parent never calls it", stacklevel=3)
        check.value(found, "target_modules", f"'all-linear' on a {type(model).__name__}", "a model with linear layers")
    else:
        targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        check.value(targets, "target_modules", target_modules, "names of linear layers")
        whole = re.compile(target_modules) if isinstance(target_modules, str) else None
        found = [name for target in targets for name in _matches(target, whole, modules, linear)]
    # a module that stands under two names is adapted once
    first = {}
    for name in found:
        first.setdefault(id(linear[name]), name)
    return list(first.values())


def _matches(target, whole, modules, linear):
    def hit(name):
        return name == target or name.endswith(f".{target}") or (whole is not None and whole.fullmatch(name))

    found = [name for name in modules if hit(name)]
    names = [name for name in found if name in linear]
    if not names:
        ends = sorted({end for name in linear for end in (name, name.rpartition(".")[2])})
        near = ", ".join(difflib.get_close_matches(target, ends, 5, 0.5) or ends[:5])
        kinds = f"the name of a {type(modules[found[0]]).__name__}" if found else "which matches no module"
        check.value(False, "target_modules", f"{target!r}, {kinds}", f"linear layers, such as {near}")
    return names


def linear_shape(module):
    """(out, in) of a linear layer; None for any other module."""
    for defines, registers in _INTEGRATIONS.items():
        if defines in sys.modules:
            importlib.import_module(registers)
    if _dense_types.get(getattr(type(module), "lora_base", type(module))):
        return tuple(module.weight.shape[::-1])
    shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return shape if all(isinstance(size, int) for size in shape) else None


def _check_module(name, modules):
    linear = name in modules and linear_shape(modules[name])
    check.value(linear, "target_modules", f"{name!r}", "the name of a linear layer of the model")
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


def _bound_forwards(module):
    """The instance attributes that hold the class's own forward, as accelerate's `_old_forward`."""
    own = type(module).forward
    return [
        key for key, value in vars(module).items()
        if getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is own
    ]  # fmt: skip


def _change_class(module, cls):
    bound = _bound_forwards(module)
    module.__class__ = cls
    for key in bound:
        vars(module)[key] = types.MethodType(cls.forward, module)


def _attach(module, r, lora_alpha, lora_dropout, dtype):
    base, weight, shape = type(module), module._parameters.get("weight"), linear_shape(module)
    like = next((t for t in (weight, *module.parameters(), *module.buffers()) if t is not None), torch.empty(0))
    dense = base in _dense_types and type(weight) is nn.Parameter and weight.is_floating_point()
    dense = dense and weight.layout == torch.strided and weight.dim() == 2
    _change_class(module, lora_class(DenseLoRA if dense else OpaqueLoRA, base))
    module.fan_in_fan_out = _dense_types.get(base, False)
    dtype = dtype or (torch.float64 if like.dtype == torch.float64 else torch.float32)
    module.attach(shape, r, lora_alpha, lora_dropout, dtype, like.device)
    module.reset_lora_parameters()


def _make_plain(model, merged):
    """Make every LoRA layer its base again, with W + ΔW as a new weight if `merged`."""
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    for cls in map(type, layers):
        check.value("lora_base" in vars(cls), "model", f"a {cls.__name__}, a class made elsewhere", "fastlora's layers")
    for layer in layers:
        base, weight = type(layer).lora_base, None
        if merged and layer.r:
            weight = layer.merged_weight()
        elif layer.fan_in_fan_out and base is nn.Linear:
            weight = layer.base_weight().detach()
        if weight is not None:
            weight = weight if base is nn.Linear or not layer.fan_in_fan_out else weight.t()
            layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
        for name in _OWN:
            for attributes in (layer._parameters, layer._modules, vars(layer)):
                attributes.pop(name, None)
        _change_class(layer, base)
    update_fast_paths(model)
    return model


def merge(model, in_place=False):
    """Let forwards without gradients in eval mode use W + ΔW, built when first wanted; train() or unmerge ends it.

    W is not written: the merged weight is a second tensor, and a state dict holds the unmerged W. With `in_place` the
    layers become plain ones instead, each with W + ΔW as a new parameter (a weight tied to it keeps its values): no
    second copy, no way back. Returns the model. Raises ValueError for a layer that has no dense weight.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        dense = isinstance(layer, DenseLoRA)
        check.value(dense, name, f"a {type(layer).__name__}, which has no dense weight", "a layer to merge into")
    if not in_place:
        for layer in layers.values():
            layer.merged = True
            layer.refresh()
        return model
    _untie(model, layers.values())
    return _make_plain(model, merged=True)


def _untie(model, layers):
    """A merged output head is no longer the embedding: tell a transformers config, or loading would tie them again."""
    for module in model.modules():
        config = getattr(module, "config", None)
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        if getattr(config, "tie_word_embeddings", False) and any(head is layer for layer in layers):
            config.tie_word_embeddings = False


def unmerge(model):
    """End what `merge` began, and free the merged weights. Returns the model."""
    for layer in lora_layers(model).values():
        layer.merged = False
        layer.refresh()
    return model


def remove(model):
    """Take the adapters out: plain torch modules with W as it always was, still frozen. Returns the model."""
    lora_layers(model)
    return _make_plain(model, merged=False)


def merge_and_export(model):
    """A plain torch copy of a model or of one layer, with W + ΔW as its weights; the model itself is left alone."""
    return merge(copy.deepcopy(model), in_place=True)


def mark_only_lora_as_trainable(model, bias="none"):
    """Freeze everything but lora_*; `bias`: "none", "all" or "lora_only" (those of LoRA layers) stays trainable too."""
    check.value(bias in ("none", "all", "lora_only"), "bias", repr(bias), "'none', 'all' or 'lora_only'")
    for name, parameter in model.named_parameters():
        if not re.search(r"(^|\.)lora_", name):
            parameter.requires_grad = bias == "all" and "bias" in name
    for module in model.modules():
        if bias == "lora_only" and isinstance(module, LoRALayer) and getattr(module, "bias", None) is not None:
            module.bias.requires_grad = True
    update_fast_paths(model)


def print_trainable_parameters(model):
    """Print how many parameters are trained, of how many, and the share in percent."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, wanted in sizes if wanted)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / max(total, 1):.4f}")


def disable_adapter(model):
    """Context manager: in this thread the model runs without its adapters, as DPO's reference model.

    Under activation checkpointing with gradients pass `context_fn=fastlora.checkpoint_context`; a recompute that
    cannot know the state raises RuntimeError.
    """
    return turned_off(lora_layers(model).values())


def set_scale(model, scale):
    """Run every adapter at scale · lora_alpha / r from now on; 1 is the trained model. Not saved."""
    for layer in lora_layers(model).values():
        layer.set_scale(scale)


def refresh(model):
    """Drop everything derived from the weights, after a write that nothing can see (through `.data`, say)."""
    for layer in lora_layers(model).values():
        layer.refresh()


def _require_grad(module, args, output):
    output.requires_grad_(True)


def enable_input_require_grads(model):
    """Make the embeddings' output require gradients, which reentrant checkpointing of a frozen base needs.

    The input embedding is `model.get_input_embeddings()`, else the first nn.Embedding. Returns a handle to remove it.
    """
    find = getattr(model, "get_input_embeddings", lambda: None)
    embedding = find() or next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    check.value(embedding is not None, "model", f"a {type(model).__name__} without nn.Embedding", "a model with one")
    return embedding.register_forward_hook(_require_grad)
