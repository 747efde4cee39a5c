"""State dicts, and the one table of adapter names.

here, loralib      model.layers.0.q_proj.lora_A                            (r, in)
PEFT, in a file    base_model.model.model.layers.0.q_proj.lora_A.weight    (r, in)
PEFT, in memory    base_model.model.model.layers.0.q_proj.lora_A.default.weight
base tensors       model.layers.0.q_proj.bias  <->  base_model.model.model.layers.0.q_proj.base_layer.bias
"""

import collections
import json
import math
import pathlib
import re
import warnings

import torch
from safetensors.torch import load_file, save_file

from fastlora.model import adapt, lora_layers
from fastlora.nn.convert import factor_shapes, is_linear
from fastlora.nn.layer import LoRALayer
from fastlora.nn.names import from_any_name
from fastlora.ops import check

# what PEFT's config may say without changing the layer's formula; any other field that is set is refused
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# initialisations that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and others change them
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def to_peft_name(name, adapted):
    """The name in PEFT's files; `adapted` are the names of the layers that have an adapter."""
    path, _, kind = name.rpartition(".")
    if kind in ("lora_A", "lora_B"):
        kind += ".weight"
    elif path in adapted:
        kind = f"base_layer.{kind}"
    return ".".join(part for part in ("base_model.model", path, kind) if part)


def lora_state_dict(model, bias="none"):
    """The lora_* entries of the model's state dict, with all biases ("all") or those of LoRA layers ("lora_only")."""
    check.value(bias in ("none", "all", "lora_only"), "bias", repr(bias), "'none', 'all' or 'lora_only'")
    state = model.state_dict()
    adapters = [name for name in state if re.search(r"(^|\.)lora_", name)]
    wanted = set(adapters)
    if bias == "all":
        wanted.update(name for name in state if "bias" in name)
    elif bias == "lora_only":
        wanted.update(re.sub(r"lora_[^.]*$", "bias", name) for name in adapters)
    return {name: tensor for name, tensor in state.items() if name in wanted}


def save_adapter(model, folder):
    """Write the adapter in PEFT's folder format: adapter_config.json and adapter_model.safetensors, which PEFT loads.

    Biases that are trained are saved with it; any other trained parameter is no part of an adapter: a warning says so.
    """
    layers = lora_layers(model)
    bias = _trained_biases(model, layers)
    tensors = {}
    for name, tensor in _tensors(model, layers, bias):
        # a copy: safetensors refuses tensors that share memory, as a tied lora_A does
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        tensors[to_peft_name(name, layers)] = copy
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_config(model, layers, bias), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _tensors(model, layers, bias):
    """(name, tensor) of what a file holds, once for a layer that stands under two names."""
    for name, layer in layers.items():
        yield f"{name}.lora_A".lstrip("."), layer.lora_A
        yield f"{name}.lora_B".lstrip("."), layer.lora_B
    for name, parameter in model.named_parameters():
        if "bias" in name and (bias == "all" or bias == "lora_only" and name.rpartition(".")[0] in layers):
            yield name, parameter


def _trained_biases(model, layers):
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not re.search(r"(^|\.)lora_[AB]", n)]
    unsaved = [name for name in trained if "bias" not in name]
    if unsaved:
        warnings.warn(f"fastlora: {', '.join(unsaved[:3])}: trained, but not saved with an adapter", stacklevel=3)
    owners = {name.rpartition(".")[0] for name in trained if "bias" in name}
    return "none" if not owners else "lora_only" if owners <= set(layers) else "all"


def _config(model, layers, bias):
    r, lora_alpha = collections.Counter((layer.r, layer.lora_alpha) for layer in layers.values()).most_common(1)[0][0]
    dropout = max(getattr(layer.lora_dropout, "p", 0.0) for layer in layers.values())
    # a pattern's key is the end of a name
    keys = {name: f"^{name}" if any(n.endswith(f".{name}") for n in layers) else name for name in layers}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": dropout,
        "target_modules": _short_targets(model, layers),
        "rank_pattern": {keys[name]: layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {keys[n]: layer.lora_alpha for n, layer in layers.items() if layer.lora_alpha != lora_alpha},
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "bias": bias,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _short_targets(model, layers):
    """The last parts of the layers' names, where those mean no other module; else the whole names."""
    ends = {name.rpartition(".")[2] for name in layers}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == set(layers) else layers)


@torch.no_grad()
def load_adapter(model, folder, dtype=None):
    """Load an adapter in PEFT's folder format, in place; a plain model is injected with what the folder holds.

    A model that has adapters must have them on the same layers with the same ranks. New adapters are float32 unless
    `dtype` says otherwise. Returns the model. Raises ValueError, before anything changes, for a layer that is missing,
    a shape that differs, or a config or tensor that means more than LoRA (DoRA, modules_to_save, PiSSA's base).
    """
    folder = pathlib.Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check_config(config)
    stored = load_file(folder / "adapter_model.safetensors")
    tensors = {from_any_name(key): tensor for key, tensor in stored.items()}
    plan = _plan(model, config, tensors)
    base = _check_base_tensors(model, config, tensors)
    if not any(isinstance(module, LoRALayer) for module in model.modules()):
        adapt(model, plan, config.get("lora_dropout", 0.0), dtype)
    layers = lora_layers(model)
    have, want = {name: layer.r for name, layer in layers.items()}, {name: r for name, (r, _) in plan.items()}
    wrong = sorted(name for name in have | want if have.get(name) != want.get(name))
    check.value(not wrong, "model", f"ranks {[have.get(n) for n in wrong[:3]]} at {wrong[:3]}",
                f"{[want.get(n) for n in wrong[:3]]}, as in {folder}, or a plain model")  # fmt: skip
    for name, layer in layers.items():
        layer.lora_alpha = plan[name][1]
        layer.lora_A.copy_(tensors[f"{name}.lora_A".lstrip(".")])
        layer.lora_B.copy_(tensors[f"{name}.lora_B".lstrip(".")])
        layer.set_scale(1.0)
        layer.refresh()
    for parameter, tensor in base:
        parameter.copy_(tensor)
        # as the adapters, and so saved with them again
        parameter.requires_grad = isinstance(parameter, torch.nn.Parameter)
    return model


def _check_config(config):
    check.value(config.get("peft_type") == "LORA", "peft_type", repr(config.get("peft_type")), "'LORA'")
    extra = sorted(key for key, value in config.items() if value and key not in _UNDERSTOOD)
    got = ", ".join(f"{key} = {config[key]!r}" for key in extra)
    check.value(not extra, "adapter_config.json", got, "plain LoRA")
    start = config.get("init_lora_weights", True)
    check.value(start in _INITIALISATIONS, "init_lora_weights", repr(start), "one that leaves the base's weights alone")


def _plan(model, config, tensors):
    """{layer name: (r, lora_alpha)} of what the file holds, its shapes checked against the model's layers."""
    plan, modules = {}, dict(model.named_modules())
    for key in (key for key in tensors if re.search(r"(^|\.)lora_A$", key)):
        name = key.rpartition(".")[0]
        lora_A, lora_B = tensors[key], tensors.get(key[:-1] + "B")
        linear = name in modules and is_linear(modules[name])
        check.value(linear, "model", f"a {type(model).__name__} without a linear {name!r}", "the adapter's base model")
        r = lora_A.shape[0]
        shape_A, shape_B = factor_shapes(modules[name], r)
        fits = lora_A.shape == shape_A and lora_B is not None and lora_B.shape == shape_B
        expected = f"lora_A {shape_A} and lora_B {shape_B}"
        check.value(fits, name, f"lora_A {tuple(lora_A.shape)} and its lora_B", expected)
        patterns = config.get("alpha_pattern") or {}
        alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), config["lora_alpha"])
        plan[name] = r, alpha * math.sqrt(r) if config.get("use_rslora") else alpha
    check.value(plan, "adapter_model.safetensors", "no lora_A", "an adapter")
    return plan


def _check_base_tensors(model, config, tensors):
    """[(parameter, its trained value)]: biases. PEFT also saves copies of embeddings, which must be the model's own."""
    state, trained = model.state_dict(keep_vars=True), []
    for name, tensor in tensors.items():
        if re.search(r"(^|\.)lora_[AB]$", name):
            continue
        known = name in state and state[name].shape == tensor.shape
        check.value(known, "adapter_model.safetensors", f"the tensor {name!r}", "lora_A, lora_B or one of the model's")
        if "bias" in name and config.get("bias", "none") != "none":
            trained.append((state[name], tensor))
        else:
            same = torch.equal(state[name].cpu(), tensor.to(state[name].dtype))
            check.value(same, name, "another value in the adapter's file than in the model", "the adapter's base model")
    return trained
