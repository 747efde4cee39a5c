"""State dicts, whole or of the adapters alone, in the names of any library that `nn/names.py` knows."""

import re

import torch
from torch.nn.modules.module import _IncompatibleKeys

from fastlora.checkpoint.merged import unmerged
from fastlora.model import lora_layers
from fastlora.nn.fastpath import holds_adapters
from fastlora.nn.names import DIALECTS, base_name, from_any_name, put, read, write
from fastlora.ops import check

# PEFT's names are those of a folder, with its config: save_adapter
_NAMES = tuple(name for name in DIALECTS if name != "peft")


def is_adapter(name):
    """Whether this name of a tensor, in ours or another library's names, is an adapter's."""
    return re.search(r"(^|\.)lora_", name) is not None


def join(path, name):
    return ".".join(part for part in (path, name) if part)


def owner(layers, key):
    """(name of the layer among `layers` that a tensor lies below, the rest of its name), or (None, key)."""
    parts = key.split(".")
    for i in range(len(parts) - 1, -1, -1):
        if (path := ".".join(parts[:i])) in layers:
            return path, ".".join(parts[i:])
    return None, key


def holders(model):
    """{name: module} of LoRA layers and attention layers with adapters, under every name that they have."""
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if holds_adapters(m)}


def lora_state_dict(model, bias="none", names="fastlora"):
    """The adapters' entries of the model's state dict, with all biases ("all") or those of LoRA layers ("lora_only").

    `names`: "fastlora", "loralib", "loratorch" or "tasks" (TheDiscoMole/LoRA, as the task "default"). loratorch has one
    adapter for q, k and v: if their lora_A differ they are stacked to rank g·r for g projections, which there needs
    lora_alpha scaled by g. Raises ValueError, naming the layer, for one that the library does not have.
    """
    check.value(bias in ("none", "all", "lora_only"), "bias", repr(bias), "'none', 'all' or 'lora_only'")
    check.value(names in _NAMES, "names", repr(names), f"one of {', '.join(_NAMES)}")
    several = [path or "model" for path, layer in holders(model).items() if hasattr(layer, "tasks")]
    only = "a single adapter: tasks.Model.state_dict writes theirs"
    check.value(not several, next(iter(several), ""), "named tasks", only)
    state = model.state_dict()
    adapters = [name for name in state if is_adapter(name)]
    wanted = set()
    if bias == "all":
        wanted.update(name for name in state if "bias" in name)
    elif bias == "lora_only":
        kept = {path: m for path, m in holders(model).items() if getattr(m, "r", 1)}
        wanted.update(join(path, name) for path, m in kept.items() for name in m.biases())
    if names == "fastlora":
        wanted.update(adapters)
        return {name: tensor for name, tensor in state.items() if name in wanted}
    layers, found = holders(model), {}
    for path, layer in layers.items():
        if layer.kind == "attention" or layer.kind != "projection" and layer.r:
            found.update((join(path, name), tensor) for name, tensor in write(layer, names, path).items())
    for name in (name for name in state if name in wanted):
        path, rest = owner(layers, name)
        found[name if path is None else join(path, base_name(layers[path], names, rest))] = state[name]
    return found


def rename(model, state_dict):
    """`state_dict`, in any library's names, under this model's; what has no place keeps its name."""
    layers, own, groups = holders(model), model.state_dict(keep_vars=True).keys(), {}
    for key, tensor in state_dict.items():
        path, rest = owner(layers, key if key in own else key.removeprefix("base_model.model."))
        put(groups.setdefault(path, {}), key if path is None else rest, tensor)
    found = {}
    for name, tensor in groups.pop(None, {}).items():
        names = name, from_any_name(name), re.sub(r"(^|\.)module\.(\w+)$", r"\1\2", name)
        put(found, next((plain for plain in names if plain in own), name), tensor)
    for path, entries in groups.items():
        ours = read(layers[path], entries, where=path and f"{path}.")
        for name, tensor in ours.items():
            put(found, join(path, name), tensor)
    return found


def compare(own, given):
    """(names that `given` lacks, names that it has beside `own`'s, a sentence on each shape that differs)."""
    missing, unexpected = [name for name in own if name not in given], [name for name in given if name not in own]
    shapes = [
        f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in given.items()
        if isinstance(own.get(name), torch.Tensor) and tensor.shape != own[name].shape
    ]
    return missing, unexpected, shapes


@torch.no_grad()
def load_lora_state_dict(model, state_dict, base=None, strict=True):
    """Load adapters, or a whole model with adapters, from a state dict of this library or of any other that it knows.

    Names of loralib (0.1.2 and git HEAD), loratorch, TheDiscoMole/LoRA (a single task) and PEFT are understood. Nothing
    is loaded unless everything fits: RuntimeError for shapes, and with `strict` for names that have no place here and
    adapters that are missing. lora_alpha is the layer's own. Returns torch's (missing_keys, unexpected_keys).

    loralib and loratorch save a model in eval mode with W + ΔW as its weight, and nothing in the file says so. `base`,
    a state dict of the pretrained model, tells: a layer's weight that is W or W + ΔW within rounding is loaded as W, so
    that ΔW is never there twice; ValueError for one that is neither. Without `base` a weight is loaded as it stands.
    """
    lora_layers(model)
    own, given = model.state_dict(keep_vars=True), rename(model, state_dict)
    missing, unexpected, faults = compare(own, given)
    if strict:
        faults += [f"missing {name}" for name in missing if is_adapter(name)] + [f"unexpected {n}" for n in unexpected]
    if faults:
        raise RuntimeError(f"fastlora: state_dict: {'; '.join(faults)}; nothing was loaded")
    model.load_state_dict(given if base is None else unmerged(holders(model), given, rename(model, base)), strict=False)
    return _IncompatibleKeys(missing, unexpected)
