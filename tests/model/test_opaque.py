"""Layers without a dense weight: their own forward, then the update."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastlora.model import inject, merge, remove
from fastlora.nn.linear import OpaqueLoRA


def wake(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


class Quantised(nn.Module):
    """Stands for layers that hide their weight: int8 with one scale."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", (linear.weight.detach() * 100).to(torch.int8))

    def forward(self, x):
        return x @ (self.codes.to(x.dtype).T / 100)


def test_opaque_layers_keep_their_forward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Quantised(nn.Linear(6, 4)))
    x = torch.randn(3, 5)
    before = model(x)
    wake(inject(model, r=2, lora_alpha=3))
    assert type(model[1]).__name__ == "LoRAQuantised" and model[1].lora_A.shape == (2, 6)
    hidden = model[0](x)
    want = Quantised.forward(model[1], hidden) + 1.5 * hidden @ model[1].lora_A.T @ model[1].lora_B.T
    torch.testing.assert_close(model(x), want)
    model(x).sum().backward()
    assert model[1].lora_B.grad.abs().max() > 0 and model[0].lora_A.grad.abs().max() > 0
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    with pytest.raises(ValueError, match="1: got a LoRAQuantised, which has no dense weight"):
        merge(model)
    assert type(remove(model)[1]) is Quantised
    torch.testing.assert_close(model(x), before)


def test_a_linear_with_another_kind_of_weight_is_opaque():
    x = torch.randn(3, 5)
    spectral = parametrizations.weight_norm(nn.Linear(5, 4))
    pruned = prune.l1_unstructured(nn.Linear(5, 4), "weight", 0.5)
    integer = nn.Linear(5, 4)
    integer.weight = nn.Parameter(torch.ones(4, 5, dtype=torch.int8), requires_grad=False)
    sparse = nn.Linear(5, 4)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse(), requires_grad=False)
    for layer in (spectral, pruned):
        before = layer(x)
        inject(layer, r=2)
        assert isinstance(layer, OpaqueLoRA)
        torch.testing.assert_close(layer(x), before)
        wake(layer)
        assert (layer(x) - before).abs().max() > 0.01
    for layer in (integer, sparse):
        assert isinstance(inject(layer, r=2), OpaqueLoRA)
