"""Several adapters, from PEFT's folders or from tensors, in one model whose layers become banks of them."""

import torch
from torch import nn

from fastlora.checkpoint.folder import read_adapter, write_adapter
from fastlora.nn.bank import Bank, TaskAdapter, escape, open_banks
from fastlora.nn.convert import like
from fastlora.nn.fastpath import holds_adapters, update_fast_paths
from fastlora.ops import check


@torch.no_grad()
def open_experts(model, adapters, owner, bank=Bank, dtype=None):
    """Make the layers of a plain model, in place, banks of the frozen adapters {name: folder or tensors by name}.

    Returns {name: layer} in the model's order; `layer.place` is its number. Ranks, lora_alpha and the layers adapted
    may differ. `owner` is the key of the selection (`nn/switch.py`); `bank` the mixin. Adapters are float32 (float64 on
    a float64 base) unless `dtype` says otherwise; a layer has one dropout, the adapters' largest.
    Raises ValueError, naming the adapter and what was expected, before anything changes.
    """
    check.kind(isinstance(model, nn.Module), "model", type(model).__name__, "an nn.Module")
    check.value(not any(map(holds_adapters, model.modules())), "model", "a model with adapters", "a plain one")
    check.value(adapters, "adapters", "none", "at least one")
    read = {name: _read(model, name, source) for name, source in adapters.items()}
    dropout = max(config.get("lora_dropout", 0.0) for _, config in read.values())
    adapted = dict.fromkeys(planned.path for plan, _ in read.values() for planned in plan.values())
    layers = open_banks(model, adapted, owner, dropout, bank)
    for place, layer in enumerate(layers.values()):
        layer.place = place
    for name, (plan, _) in read.items():
        for layer, planned in plan.items():
            base, pair = like(model.get_submodule(planned.path)), (planned.lora_A, planned.lora_B)
            own = dtype or (torch.float64 if base.dtype == torch.float64 else torch.float32)
            adapter = TaskAdapter()
            adapter.attach_factors([t.shape for t in pair], planned.r, planned.lora_alpha, own, base.device)
            for factor, given in zip(adapter.parameters(), pair, strict=True):
                factor.copy_(given)
            layers[layer].tasks[escape(name)] = adapter.requires_grad_(False)
    update_fast_paths(model)
    return layers


def _read(model, name, source):
    check.kind(isinstance(name, str) and name, "adapters", repr(name), "a name")
    try:
        plan, config, base = read_adapter(model, source)
    except (ValueError, OSError) as error:
        raise type(error)(f"fastlora: adapters[{name!r}]: {error}") from error
    check.value(not base, f"adapters[{name!r}]", "biases that were trained with it", "an adapter alone")
    return plan, config


class _Expert:
    """One adapter of a bank, described as the layer that has it alone; an attention layer's are its projections'."""

    def __init__(self, layer, key):
        self._layer, self._key = layer, key

    def __getattr__(self, name):
        own = name in ("r", "lora_alpha", "lora_A", "lora_B")
        return getattr(self._layer.tasks[self._key] if own else self._layer, name)

    def projections(self):
        return {name: _Expert(projection, self._key) for name, projection in self._layer.projections().items()}


def save_expert(model, name, folder):
    """Write one adapter of the banks as a folder in PEFT's format."""
    key, modules = escape(name), dict(model.named_modules())
    held = {path: m for path, m in modules.items() if isinstance(m, Bank) and key in m.tasks}
    own = [path if m.kind != "projection" else path.rpartition(".")[0] for path, m in held.items()]
    write_adapter(model, {path: _Expert(modules[path], key) for path in own}, folder)
