"""An adapter that is trained beside those that are served: it owns its parameters."""

from types import SimpleNamespace

import torch

from fastlora.checkpoint.folder import write_adapter
from fastlora.nn.bank import TaskAdapter
from fastlora.nn.convert import dense_weight, kind_of
from fastlora.nn.layer import check_adapter, identity


class Trained:
    """float32 lora_A (r, in) and lora_B (out, r) on each of {name: layer}."""

    def __init__(self, layers, r, lora_alpha):
        check_adapter(r, lora_alpha, 0.0, least=1)
        self.adapters, self.transposed = {}, {}
        for name, layer in layers.items():
            adapter, weight = TaskAdapter(), dense_weight(layer)
            out, inner = weight.shape
            adapter.attach_factors(((r, inner), (out, r)), r, lora_alpha, torch.float32, weight.device)
            kind_of(layer).init_adapter(layer, adapter.lora_A, adapter.lora_B)
            adapter.set_scale(1.0)
            self.adapters[name], self.transposed[name] = adapter, weight is not layer.weight

    def parameters(self):
        return [p for adapter in self.adapters.values() for p in adapter.parameters()]

    def save(self, model, folder):
        described = {
            name: SimpleNamespace(kind="linear", r=a.r, lora_alpha=a.lora_alpha, lora_A=a.lora_A, lora_B=a.lora_B,
                                  lora_dropout=identity, fan_in_fan_out=self.transposed[name])
            for name, a in self.adapters.items()
        }  # fmt: skip
        write_adapter(model, described, folder)
