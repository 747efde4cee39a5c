"""State dicts, whole or of the adapters alone, in the names of any library that `nn/names.py` knows."""

import re

import torch
from torch.nn.modules.module import _IncompatibleKeys

from fastlora.model import lora_layers
from fastlora.nn.fastpath import holds_adapters
from fastlora.nn.names import base_name, from_any_name, put, read, write
from fastlora.ops import check

# PEFT's names are those of a folder, with its config: save_adapter
_NAMES = ("fastlora", "loralib", "loratorch", "tasks")


def is_adapter(name):
    """Whether this name of a tensor, in ours or another library's names, is an adapter's."""
    return re.search(r"(^|\.)lora_", name) is not None


def join(*parts):
    return ".".join(filter(None, parts))


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
    layers, state, found = holders(model), model.state_dict(), {}
    for path, layer in layers.items():
        check.value(not hasattr(layer, "tasks"), path or "model", "named tasks",
                    "a single adapter: tasks.Model.state_dict writes theirs")  # fmt: skip
    wanted = {name for name in state if "bias" in name} if bias == "all" else set()
    if bias == "lora_only":
        wanted = {join(path, name) for path, m in layers.items() if getattr(m, "r", 1) for name in m.biases()}
    if names == "fastlora":
        return {name: tensor for name, tensor in state.items() if name in wanted or is_adapter(name)}
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
    wrong = [n for n, t in given.items() if isinstance(own.get(n), torch.Tensor) and t.shape != own[n].shape]
    got = {name: (tuple(given[name].shape), tuple(own[name].shape)) for name in wrong}
    return missing, unexpected, [f"{name}: got shape {a}, expected {b}" for name, (a, b) in got.items()]


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


def unmerged(layers, tensors, base):
    """`tensors` with the weights of `base` for layers with an adapter; ValueError for one that is neither W nor W + ΔW.

    Both are compared within the rounding of the coarsest dtype in play. float32 gets 64 roundings: loralib adds and
    subtracts ΔW at each evaluation, which leaves a trace in W.
    """
    found = dict(tensors)
    for name, parts in _adapted_weights(layers, tensors).items():
        if name not in tensors or not tensors[name].is_floating_point():
            continue
        check.value(name in base, "base", f"no {name}", "a state dict of the pretrained model")
        got, want = tensors[name].to(base[name].device), base[name]
        check.value(got.shape == want.shape, "base", f"{name} of shape {tuple(want.shape)}", tuple(got.shape))
        # ΔW, and the sum of the absolute values that it is made of
        update, size = torch.zeros_like(want, dtype=torch.float64), torch.zeros_like(want, dtype=torch.float64)
        for rows, layer, *pair in parts:
            # PEFT does not merge a grouped convolution
            if layer.kind == "conv" and layer.form == "peft" and layer.groups > 1:
                continue
            factors = [t.to(want.device, torch.float64) for t in pair]
            for total, of in ((update, factors), (size, [t.abs() for t in factors])):
                delta = layer.delta(*of) * (layer.lora_alpha / layer.r)
                total[rows] = delta.t() if layer.fan_in_fan_out else delta
        eps = max(torch.finfo(t.dtype).eps for _, _, *pair in parts for t in (got, want, *pair))
        room = max(4 * eps, 2**-17) * (want.double().abs() + size.abs())
        apart = got.double() - want.double()
        same = (apart.abs() <= room).all() or ((apart - update).abs() <= room).all()
        check.value(same, name, f"a weight that is {apart.abs().max():.2g} off the base's",
                    "the base's, or that plus lora_alpha / r ΔW")  # fmt: skip
        found[name] = want
    return found


def _adapted_weights(layers, tensors):
    """{name of a weight: [(rows, the layer that adapts them, its lora_A, its lora_B)]} of the adapters in `tensors`."""
    found = {}
    for path, layer in layers.items():
        for below, holder, weight, rows in layer.places() if layer.kind != "projection" else ():
            pair = [tensors.get(join(path, below, f"lora_{x}")) for x in "AB"]
            if all(t is not None for t in pair):
                found.setdefault(join(path, weight), []).append((rows, holder, *pair))
    return found
