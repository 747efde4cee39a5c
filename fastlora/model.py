"""LoRA over a module tree: put adapters in, merge them, take them out."""

import copy
import difflib
import re

import torch
from torch import nn

from fastlora.nn.attention import ProjectionLoRA
from fastlora.nn.convert import check_convertible, convert, kind_of, like, restore
from fastlora.nn.fastpath import holds_adapters, is_called, update_fast_paths
from fastlora.nn.layer import LoRALayer, check_adapter
from fastlora.nn.switch import turned_off
from fastlora.ops import check

# what `fastlora` itself has of it
__all__ = [
    "disable_adapter", "enable_input_require_grads", "inject", "mark_only_lora_as_trainable", "merge",
    "merge_and_export", "print_trainable_parameters", "refresh", "remove", "set_scale", "unmerge",
]  # fmt: skip


def lora_layers(model, named_tasks=False):
    """{name: layer} of the layers with an adapter; ValueError for a model without LoRA layers of any rank.

    Layers with named tasks, of which those are returned that have chosen ones, are refused unless `named_tasks`.
    """
    layers = {name: m for name, m in model.named_modules() if holds_adapters(m)}
    check.value(layers, "model", f"a {type(model).__name__} without LoRA layers", "an injected model")
    single = named_tasks or not any(hasattr(m, "tasks") for m in layers.values())
    check.value(single, "model", "a model with named tasks", "layers with one adapter of their own; tasks.Model has "
                "remove_task, state_dict(task=) and merge_and_export")  # fmt: skip
    return {name: m for name, m in layers.items() if isinstance(m, LoRALayer) and m.r}


def inject(model, r=8, lora_alpha=None, lora_dropout=0.0, target_modules="all-linear", dtype=None, dynamic=False):
    """Give layers of `model` adapters, in place, and freeze everything else: y = x Wᵀ + bias + s (D(x) Aᵀ) Bᵀ.

    The modules change their class and stay the same objects, with their hooks, device maps, ties and base keys; outputs
    stay, as the update is zero. s = lora_alpha / r; `lora_alpha` defaults to r. `target_modules`: "all-linear" (all but
    the output head, with q, k, v, o of nn.MultiheadAttention), a name, suffix or regular expression of whole names, or
    a list of names and suffixes; embeddings and convolutions (in PEFT's form) by name. `dynamic`: for DyLoRA, training
    starts at rank 1. Adapters are float32 (float64 on a float64 base) unless `dtype` says otherwise. Returns the model.
    Raises ValueError: a target without a match, a model injected before, a layer whose forward would be passed by.
    """
    plan = dict.fromkeys(find_targets(model, target_modules), (r, r if lora_alpha is None else lora_alpha))
    return adapt(model, plan, lora_dropout, dtype, first=1 if dynamic else None)


def adapt(model, plan, lora_dropout=0.0, dtype=None, first=None):
    """`inject` with {module name: (r, lora_alpha)}, begun at rank `first`; if a layer refuses one nothing changes."""
    plain = not any(map(holds_adapters, model.modules()))
    check.value(plain, "model", "a model with LoRA layers", "a plain one, as remove(model) leaves it")
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    check.value(dtype is None or floating, "dtype", repr(dtype), "a floating torch.dtype or None")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (r, lora_alpha) in plan.items():
        check_adapter(r, lora_alpha, lora_dropout, least=1)
        for rank in dict.fromkeys((r, first or r)):
            check_convertible(name, modules, rank)
    for name, (r, lora_alpha) in plan.items():
        layer, base = modules[name], like(modules[name])
        convert(layer)
        own = dtype or (torch.float64 if base.dtype == torch.float64 else torch.float32)
        for _, part, _, _ in layer.places():
            part.attach(r, lora_alpha, lora_dropout, own, base.device)
            part.reset_lora_parameters()
            if first:
                part.use_rank(first)
    mark_only_lora_as_trainable(model)
    return model


def find_targets(model, target_modules):
    """The names of the layers that `target_modules` means; see `inject`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    fit = {name: m for name, m in modules.items() if kind_of(m)}
    if target_modules == "all-linear":
        heads = {id(m.get_output_embeddings()) for m in modules.values() if hasattr(m, "get_output_embeddings")}
        linear = [name for name, m in fit.items() if kind_of(m).kind in ("linear", "attention")]
        # what its parent does not call is nn.MultiheadAttention's out_proj, which that layer's own adapters cover
        found = [name for name in linear if id(fit[name]) not in heads and is_called(name, modules)]
        check.value(found, "target_modules", f"'all-linear' on a {type(model).__name__}", "a model with linear layers")
    else:
        whole = re.compile(target_modules) if isinstance(target_modules, str) else None
        targets = [target_modules] if whole else list(target_modules)
        check.value(targets, "target_modules", target_modules, "names of layers")
        found = [name for target in targets for name in _matches(target, whole, modules, fit)]
    # a module that stands under two names is adapted once
    first = {}
    for name in found:
        first.setdefault(id(fit[name]), name)
    return list(first.values())


def _matches(target, whole, modules, fit):
    found = [name for name in modules if f".{name}".endswith(f".{target}") or whole and whole.fullmatch(name)]
    names = [name for name in found if name in fit]
    ends = sorted({end for name in fit for end in (name, name.rpartition(".")[2])})
    near = ", ".join(names or difflib.get_close_matches(target, ends, 5, 0.5) or ends[:5])
    kinds = f"the name of a {type(modules[found[0]]).__name__}" if found else "which matches no module"
    check.value(names, "target_modules", f"{target!r}, {kinds}", f"layers that can have an adapter, such as {near}")
    return names


def make_plain(model, merged):
    """Make every LoRA layer its base again, with W + ΔW as a new weight if `merged`."""
    layers = [m for m in model.modules() if holds_adapters(m) and not isinstance(m, ProjectionLoRA)]
    for cls in map(type, layers):
        check.value("lora_base" in vars(cls), "model", f"a {cls.__name__}, a class made elsewhere", "fastlora's layers")
    for layer in layers:
        restore(layer, merged)
    update_fast_paths(model)
    return model


def check_merge(model):
    """Raise ValueError for a layer whose W + ΔW is not one dense weight."""
    for name, module in model.named_modules():
        if holds_adapters(module):
            module.check_merge(name or "model")


def merge(model, in_place=False):
    """Let forwards without gradients in eval mode use W + ΔW, built when first wanted; train() or unmerge ends it.

    W is not written: the merged weight is a second tensor, and a state dict holds the unmerged W. With `in_place` the
    layers become plain ones instead, each with W + ΔW as a new parameter (a weight tied to it keeps its values): no
    second copy, no way back. Returns the model. Raises ValueError for a layer that has no dense weight.
    """
    layers = lora_layers(model)
    check_merge(model)
    if not in_place:
        for layer in layers.values():
            layer.merged = True
            layer.refresh()
        return model
    # a merged head or embedding is no longer tied: tell a transformers config, or loading would tie them again
    for module in model.modules():
        config, ends = getattr(module, "config", None), ("get_output_embeddings", "get_input_embeddings")
        found = [find() for name in ends if (find := getattr(module, name, None))]
        if getattr(config, "tie_word_embeddings", False) and {*map(id, found)} & {*map(id, layers.values())}:
            config.tie_word_embeddings = False
    return make_plain(model, merged=True)


def unmerge(model):
    """End what `merge` began, and free the merged weights. Returns the model."""
    for layer in lora_layers(model).values():
        layer.merged = False
        layer.refresh()
    return model


def remove(model):
    """Take the adapters out: plain torch modules with W as it always was, still frozen. Returns the model."""
    lora_layers(model)
    return make_plain(model, merged=False)


def merge_and_export(model):
    """A plain torch copy of a model or of one layer, with W + ΔW as its weights; the model itself is left alone."""
    # a model that knows more about its adapters, as tasks.Model does
    own = getattr(type(model), "merge_and_export", None)
    return own(model) if own else merge(copy.deepcopy(model), in_place=True)


def mark_only_lora_as_trainable(model, bias="none"):
    """Freeze everything but lora_*; `bias`: "none", "all" or "lora_only" (those of LoRA layers) stays trainable too."""
    check.value(bias in ("none", "all", "lora_only"), "bias", repr(bias), "'none', 'all' or 'lora_only'")
    for name, parameter in model.named_parameters():
        if not re.search(r"(^|\.)lora_", name):
            parameter.requires_grad = bias == "all" and "bias" in name
    for module in model.modules():
        if bias == "lora_only" and holds_adapters(module):
            for parameter in module.biases().values():
                parameter.requires_grad = True
    update_fast_paths(model)


def get_nb_trainable_parameters(model):
    """(number of trained parameters, number of all)"""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def print_trainable_parameters(model):
    """Print how many parameters are trained, of how many, and the share in percent."""
    trained, total = get_nb_trainable_parameters(model)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / max(total, 1):.4f}")


def disable_adapter(model):
    """Context manager: in this thread the model runs without its adapters, as DPO's reference model.

    A recompute of activation checkpointing raises RuntimeError without `context_fn=fastlora.checkpoint_context`.
    """
    lora_layers(model, named_tasks=True)
    return turned_off(m for m in model.modules() if holds_adapters(m))


def set_scale(model, scale):
    """Run every adapter at scale · lora_alpha / r from now on; 1 is the trained model. Not saved.

    Of named tasks it is those that `with model.task(...)` has chosen. Raises ValueError where there is no adapter.
    """
    layers = lora_layers(model, named_tasks=True)
    check.value(layers, "model", "no adapter in force", "an adapter, or named tasks in `with model.task(...)`")
    for layer in layers.values():
        layer.set_scale(scale)


def refresh(model):
    """Drop everything derived from the weights, after a write that nothing can see (through `.data`, say)."""
    lora_layers(model, named_tasks=True)
    # also those whose tasks are not chosen now
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
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
