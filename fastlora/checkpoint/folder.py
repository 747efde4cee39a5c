"""An adapter's folder in PEFT's format, both ways."""

import collections
import json
import math
import pathlib
import re
import warnings

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora.checkpoint.state import join, owner
from fastlora.model import adapt, lora_layers
from fastlora.nn.convert import kind_of
from fastlora.nn.fastpath import holds_adapters
from fastlora.nn.layer import LoRALayer
from fastlora.nn.names import PEFT_OUT, base_name, from_any_name, put, read, write
from fastlora.ops import check

# what PEFT's config may say without changing the layer's formula; any other field that is set is refused
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# the PEFT whose reading of an attention layer a folder states
PEFT_VERSION = "0.21.2"
# initialisations that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and others change them
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(model, folder):
    """Write the adapter in PEFT's folder format: adapter_config.json and adapter_model.safetensors, which PEFT loads.

    Biases that are trained are saved with it; any other trained parameter is no part of an adapter: a warning says so.
    PEFT has no MergedLinear: that is saved as a linear layer's adapter of rank g·r for g enabled parts. It has one
    adapter for q, k and v: where their lora_A differ, they are stacked to rank g·r. lora_alpha is scaled with the rank.
    Raises ValueError, naming the layer, for one that PEFT does not have.
    """
    inside, modules = lora_layers(model), dict(model.named_modules())
    check.value(inside, "model", "LoRA layers without an adapter of their own", "one with adapters")
    paths = [name.rpartition(".")[0] if layer.kind == "projection" else name for name, layer in inside.items()]
    layers = {path: modules[path] for path in paths}
    _warn_of_convolutions(layers)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not re.search(r"(^|\.)lora_[AB]", n)]
    unsaved = [name for name in trained if "bias" not in name]
    if unsaved:
        warnings.warn(f"fastlora: {', '.join(unsaved[:3])}: trained, but not saved with an adapter", stacklevel=2)
    biases = [owner(layers, name) for name in trained if "bias" in name]
    # PEFT's "lora_only" means the attribute `bias` of a layer
    only = all(path is not None and rest == "bias" for path, rest in biases)
    write_adapter(model, layers, folder, "none" if not biases else "lora_only" if only else "all")


def write_adapter(model, layers, folder, bias="none"):
    """`save_adapter` of these {name: layer}, which need no more than a layer's description and tensors."""
    written = {name: write(layer, "peft", name) for name, layer in layers.items()}
    named = {join(path, name): tensor for path, tensors in written.items() for name, tensor in tensors.items()}
    for name, parameter in model.named_parameters():
        path, rest = owner(layers, name)
        if "bias" in name and (bias == "all" or bias == "lora_only" and rest == "bias" and path is not None):
            named[name if path is None else join(path, base_name(layers[path], "peft", rest))] = parameter
    # copies: safetensors refuses tensors that share memory, as a tied lora_A does
    tensors = {
        f"base_model.model.{name}": t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, t in named.items()
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_config(model, layers, written, bias), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _warn_of_convolutions(layers):
    names = [n for n, m in layers.items() if m.kind == "conv" and (set(m.dilation) != {1} or m.padding_mode != "zeros")]
    if names:
        said = "PEFT's adapter of a convolution has no dilation and pads with zeros, so its outputs differ"
        warnings.warn(f"fastlora: {', '.join(names[:3])}: {said}", stacklevel=3)


def _config(model, layers, written, bias):
    # an attention layer's rank, lora_alpha and dropout are those of its first projection
    ones = {n: next(iter(m.projections().values())) if m.kind == "attention" else m for n, m in layers.items()}
    ranks = {}
    for name, one in ones.items():
        r = len(next(iter(written[name].values())))
        ranks[name] = r, one.lora_alpha if r == one.r else _whole(one.lora_alpha * r / one.r)
    r, lora_alpha = collections.Counter(ranks.values()).most_common(1)[0][0]
    # a pattern's key is the end of a name
    keys = {name: f"^{name}" if any(n.endswith(f".{name}") for n in layers) else name for name in layers}
    # the last parts of the layers' names, where those mean no other module
    ends = {name.rpartition(".")[2] for name in layers}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    attention = any(layer.kind == "attention" for layer in layers.values())
    return {
        **({"peft_version": PEFT_VERSION} if attention else {}),
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": max(getattr(one.lora_dropout, "p", 0.0) for one in ones.values()),
        "target_modules": sorted(ends if meant == set(layers) else layers),
        "rank_pattern": {keys[name]: rank for name, (rank, _) in ranks.items() if rank != r},
        "alpha_pattern": {keys[name]: alpha for name, (_, alpha) in ranks.items() if alpha != lora_alpha},
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        "bias": bias,
        "init_lora_weights": True,
        "modules_to_save": None,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _whole(number):
    return int(number) if number == int(number) else number


@torch.no_grad()
def load_adapter(model, folder, dtype=None):
    """Load an adapter in PEFT's folder format, in place; a plain model is injected with what the folder holds.

    A model that has adapters must have them on the same layers with the same ranks. New adapters are float32 unless
    `dtype` says otherwise. Returns the model. Raises ValueError, before anything changes, for a layer that is missing,
    a shape that differs, or a config or tensor that means more than LoRA (DoRA, modules_to_save, PiSSA's base).
    """
    plan, config, base = read_adapter(model, folder)
    if not any(isinstance(module, LoRALayer) for module in model.modules()):
        targets = {planned.path: (planned.r, planned.lora_alpha) for planned in plan.values()}
        adapt(model, targets, config.get("lora_dropout", 0.0), dtype)
    layers = lora_layers(model)
    _warn_of_convolutions(layers)
    have, want = {name: layer.r for name, layer in layers.items()}, {name: p.r for name, p in plan.items()}
    wrong = sorted(name for name in have | want if have.get(name) != want.get(name))
    check.value(not wrong, "model", f"ranks {[have.get(n) for n in wrong[:3]]} at {wrong[:3]}",
                f"{[want.get(n) for n in wrong[:3]]}, as in {folder}, or a plain model")  # fmt: skip
    for name, layer in layers.items():
        layer.lora_alpha = plan[name].lora_alpha
        layer.lora_A.copy_(plan[name].lora_A)
        layer.lora_B.copy_(plan[name].lora_B)
        layer.set_scale(1.0)
        layer.refresh()
    for parameter, tensor in base:
        parameter.copy_(tensor)
        # as the adapters, and so saved with them again
        parameter.requires_grad = isinstance(parameter, torch.nn.Parameter)
    return model


def read_adapter(model, source, dora=False, unsafe=False):
    """(plan, config, base) of an adapter, checked against the model, which may be plain, and left as it is.

    `source`: a folder in PEFT's format, or its tensors by name, in any library's names (lora_alpha is then r). plan:
    {layer's name: Planned}; base: [(parameter, its trained value)] of biases. Raises ValueError as `load_adapter` does.
    With `dora` its magnitudes are config["magnitudes"], by layer; with `unsafe` a pickled .bin file is read as well.
    """
    config, stored = open_adapter(source, dora, unsafe)
    factors, magnitudes, others = {}, {}, {}
    for key, tensor in stored.items():
        magnitude = dora and "lora_magnitude_vector" in key
        name = from_any_name(key.replace("lora_magnitude_vector", "lora_A") if magnitude else key)
        factor = re.search(r"(^|\.)lora_[AB]$", name)
        put(magnitudes if magnitude else factors if factor else others, name, tensor)
    config = {**config, "magnitudes": {name.removesuffix(".lora_A"): m for name, m in magnitudes.items()}}
    return _plan(model, config, factors), config, _check_base_tensors(model, config, others)


def open_adapter(source, dora=False, unsafe=False):
    """(config, tensors by the names that they have there) of a folder in PEFT's format; ({}, tensors) of tensors."""
    if isinstance(source, dict):
        return {}, source
    folder = pathlib.Path(source)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    check.value(config.get("peft_type") == "LORA", "peft_type", repr(config.get("peft_type")), "'LORA'")
    understood = _UNDERSTOOD | {"use_dora"} if dora else _UNDERSTOOD
    extra = sorted(key for key, value in config.items() if value and key not in understood)
    got = ", ".join(f"{key} = {config[key]!r}" for key in extra)
    check.value(not extra, "adapter_config.json", got, "plain LoRA")
    start = config.get("init_lora_weights", True)
    check.value(start in _INITIALISATIONS, "init_lora_weights", repr(start), "one that leaves the base's weights alone")
    pickled = folder / "adapter_model.bin"
    if unsafe and pickled.exists():
        return config, torch.load(pickled, map_location="cpu", weights_only=True)
    return config, load_file(folder / "adapter_model.safetensors")


# one adapter of a file, as this library's layer `path` or a projection of it takes it
Planned = collections.namedtuple("Planned", ["path", "r", "lora_alpha", "lora_A", "lora_B"])


def _plan(model, config, factors):
    """{adapter's name: Planned} of what a file holds, its shapes checked against the model's layers."""
    plan, modules = {}, dict(model.named_modules())
    for path, entries in _by_layer(modules, factors).items():
        module = modules.get(path)
        kind = type(module) if holds_adapters(module) else kind_of(module)
        got = f"a {type(model).__name__} without a layer {path!r} that can have one"
        check.value(kind, "model", got, "the adapter's base model")
        if "out_proj.lora_B" in entries and not _adds_twice(config):
            entries["out_proj.lora_B"] = entries["out_proj.lora_B"] / PEFT_OUT
        ours = read(module, entries, kind.kind, path and f"{path}.")
        for name in sorted({name.rpartition(".")[0] for name in ours}):
            A, B = (ours.get(join(name, key)) for key in ("lora_A", "lora_B"))
            stored, r = (0 if t is None else len(t) for t in (entries.get("lora_A"), A))
            check.value(stored, path, "no adapter but out_proj's, which PEFT never runs", "one of q, k and v")
            r //= max(sum(module.enable_lora), 1) if kind.kind == "merged" else 1
            got = [t if t is None else tuple(t.shape) for t in (A, B)]
            # an attention layer's has the sizes that it has in PEFT
            attention = kind.kind == "attention" and ((r, module.embed_dim), (module.embed_dim, r))
            expected = [*map(tuple, attention or kind.adapter_shapes(module, r))]
            check.value(r and got == expected, join(path, name), "lora_A {} and lora_B {}".format(*got),
                        "lora_A {} and lora_B {}".format(*expected))  # fmt: skip
            alpha = alpha_of(config, path, stored)
            plan[join(path, name)] = Planned(path, r, alpha if r == stored else _whole(alpha * r / stored), A, B)
    check.value(plan, "adapter_model.safetensors", "no lora_A", "an adapter")
    return plan


def _adds_twice(config):
    """Whether the PEFT that wrote this adds an attention layer's out_proj twice; of later ones it is not known."""
    version = config.get("peft_version") or PEFT_VERSION
    known = [int(n) for n in re.findall(r"\d+", version)[:3]] <= [int(n) for n in PEFT_VERSION.split(".")]
    if not known:
        warnings.warn(f"fastlora: an attention layer's out_proj, which PEFT added twice up to {PEFT_VERSION}, is taken "
                      f"once from PEFT {version}", stacklevel=4)  # fmt: skip
    return known


def alpha_of(config, path, r):
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", path)), config.get("lora_alpha", r))
    return alpha * math.sqrt(r) if config.get("use_rslora") else alpha


def _by_layer(modules, factors):
    """{layer's name: {name below it: tensor}} of adapters; an attention layer's output projection is its own."""
    found = {}
    for name, tensor in factors.items():
        path, _, key = name.rpartition(".")
        above, _, child = path.rpartition(".")
        if child == "out_proj" and isinstance(modules.get(above), nn.MultiheadAttention):
            path, key = above, f"out_proj.{key}"
        found.setdefault(path, {})[key] = tensor
    return found


def _check_base_tensors(model, config, tensors):
    """[(parameter, its trained value)]: biases. PEFT also saves copies of embeddings, which must be the model's own."""
    state, trained = model.state_dict(keep_vars=True), []
    for name, tensor in tensors.items():
        known = name in state and state[name].shape == tensor.shape
        check.value(known, "adapter_model.safetensors", f"the tensor {name!r}", "lora_A, lora_B or one of the model's")
        if "bias" in name and config.get("bias", "none") != "none":
            trained.append((state[name], tensor))
        else:
            same = torch.equal(state[name].cpu(), tensor.to(state[name].dtype))
            check.value(same, name, "another value in the adapter's file than in the model", "the adapter's base model")
    return trained
