"""Behaviour 12: a checkpoint saved while merged is recognised, and its update is never there twice."""

import pytest
import torch
from torch import nn

import fastlora
from fastlora.checkpoint import load_lora_state_dict
from fastlora.checkpoint.state import unmerged


class Net(nn.Module):
    def __init__(self, lib=fastlora):
        super().__init__()
        self.embed = lib.Embedding(11, 6, r=2, lora_alpha=3)
        self.fc = lib.Linear(6, 8, r=2, lora_alpha=3, fan_in_fan_out=True)
        self.qkv = lib.MergedLinear(8, 12, r=2, lora_alpha=3, enable_lora=[True, False, True])
        self.conv, self.norm = lib.Conv2d(1, 3, 3, r=2, lora_alpha=3), nn.LayerNorm(12)

    def forward(self, ids):
        return self.conv(self.norm(self.qkv(self.fc(self.embed(ids)))).unsqueeze(1))


IDS = torch.arange(10).view(2, 5)


def wake(model, seed=0, std=0.3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=std)
    return model


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def merged_checkpoint(dtype=torch.float32, cycles=0):
    """(loralib's model, its state dict while merged, its state dict before)"""
    theirs = wake(Net(pytest.importorskip("loralib"))).to(dtype)
    before = copied(theirs.state_dict())
    for _ in range(cycles):
        theirs.eval()
        theirs.train()
    theirs.eval()
    return theirs, copied(theirs.state_dict()), before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cycles", [0, 5])
def test_behaviour_12_a_merged_checkpoint_loads_once(dtype, cycles):
    theirs, stored, before = merged_checkpoint(dtype, cycles)
    model = wake(Net(), 1).to(dtype)
    # without the base it cannot be known
    load_lora_state_dict(model, stored)
    assert torch.equal(model.fc.weight, stored["fc.weight"]) and not torch.equal(model.fc.weight, before["fc.weight"])
    base = {name: tensor for name, tensor in before.items() if "lora_" not in name}
    assert load_lora_state_dict(model, stored, base=base) == ([], [])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name.replace("conv.", "conv.conv.") if "conv.lora" not in name else name])
    if dtype != torch.bfloat16:
        torch.testing.assert_close(model(IDS), theirs(IDS))


def test_the_trace_of_many_evaluations_in_training_is_no_other_base():
    theirs, _, before = merged_checkpoint(cycles=1)
    for _ in range(200):
        theirs.train()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
        theirs.eval()
    for _ in range(2):
        stored, model = theirs.state_dict(), wake(Net(), 1)
        assert (stored["fc.weight"] - before["fc.weight"]).abs().max() > 0
        load_lora_state_dict(model, stored, base=before)
        assert torch.equal(model.fc.weight, before["fc.weight"])
        theirs.train()


def test_what_was_not_merged_stays():
    _, _, before = merged_checkpoint()
    model = wake(Net(), 1)
    stored = copied(before)
    # layers are told apart one by one, and other parameters are the checkpoint's
    stored["fc.weight"] += ((stored["fc.lora_B"] @ stored["fc.lora_A"]) * 1.5).T
    stored["norm.bias"] += 1
    load_lora_state_dict(model, stored, base=before)
    assert torch.equal(model.fc.weight, before["fc.weight"]) and torch.equal(model.qkv.weight, before["qkv.weight"])
    assert torch.equal(model.norm.bias, stored["norm.bias"])
    adapters = {name: tensor for name, tensor in stored.items() if "lora_" in name}
    load_lora_state_dict(model, adapters, base={})
    assert torch.equal(model.fc.weight, before["fc.weight"])


@pytest.mark.parametrize("change", [
    lambda s: s["fc.weight"].mul_(1.0001),
    lambda s: s["fc.weight"][1].add_(0.001),
    lambda s: s["fc.weight"].add_(((s["fc.lora_B"] @ s["fc.lora_A"]) * 1.5).T),
])  # fmt: skip
def test_another_base_is_refused(change):
    _, stored, before = merged_checkpoint()
    change(stored)
    model = wake(Net(), 1)
    held = copied(model.state_dict())
    with pytest.raises(ValueError, match="fc.weight: got a weight that is .* off the base's, expected the base's, or"):
        load_lora_state_dict(model, stored, base=before)
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())


def test_a_base_that_lacks_or_misshapes_a_weight():
    _, stored, before = merged_checkpoint()
    model = Net()
    with pytest.raises(ValueError, match="base: got no fc.weight"):
        load_lora_state_dict(model, stored, base={n: t for n, t in before.items() if n != "fc.weight"})
    with pytest.raises(ValueError, match="base: got fc.weight of shape"):
        load_lora_state_dict(model, stored, base={**before, "fc.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("joint", [True, False])
def test_loratorch_attention(joint):
    sizes = {} if joint else {"kdim": 5, "vdim": 7}
    layer = fastlora.MultiheadAttention(8, 2, enable_lora=["q", "v", "o"], r=2, lora_alpha=3, **sizes)
    before = copied(wake(layer).state_dict())
    stored, parts = copied(before), layer.projections()
    places = {"q": "in_proj_weight", "v": "in_proj_weight", "o": "out_proj.weight"}
    rows = {"q": slice(8), "v": slice(16, 24), "o": slice(8)}
    if not joint:
        places, rows = {**places, "q": "q_proj_weight", "v": "v_proj_weight"}, dict.fromkeys("qvo", slice(8))
    with torch.no_grad():
        for name, part in parts.items():
            stored[places[name]][rows[name]] += part.lora_B @ part.lora_A * 1.5
    assert load_lora_state_dict(layer, stored, base=before) == ([], [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    if joint:
        stored["in_proj_weight"][9] += 0.01
        with pytest.raises(ValueError, match="in_proj_weight: got a weight"):
            load_lora_state_dict(layer, stored, base=before)


def test_a_grouped_convolution_in_pefts_form_is_never_merged():
    layer = wake(fastlora.Conv2d(4, 6, 3, r=2, form="peft", groups=2))
    stored = copied(layer.state_dict())
    assert load_lora_state_dict(layer, stored, base=copied(stored)) == ([], [])


def test_the_given_dict_is_left_alone():
    layer, stored = wake(fastlora.Linear(6, 4, r=2)), {"weight": torch.ones(4, 6)}
    stored.update(lora_A=torch.zeros(2, 6), lora_B=torch.zeros(4, 2))
    found = unmerged({"": layer}, stored, {"weight": torch.ones(4, 6) * (1 + 1e-7)})
    assert found["weight"] is not stored["weight"] and torch.equal(stored["weight"], torch.ones(4, 6))


def test_a_quantised_weight_is_no_merged_one():
    layer = wake(fastlora.Linear(6, 4, r=2))
    stored = {**copied(layer.state_dict()), "weight": torch.ones(4, 6, dtype=torch.int8)}
    assert unmerged({"": layer}, stored, {}) == stored
