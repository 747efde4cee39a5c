"""A program written for loratorch, with its import changed: its names, and every gradient exact."""

import torch
from torch import nn

import fastlora.integrations.loratorch as lora


def build():
    torch.manual_seed(0)
    layers = [lora.Embedding(9, 8, r=2), lora.Linear(8, 8, r=2, lora_alpha=4), lora.MultiheadAttention(8, 2, r=2)]
    return nn.ModuleList([*layers, lora.MergedLinear(8, 12, r=2, enable_lora=[True, False, True])])


def run(model, ids):
    embedding, linear, attention, merged = model
    x = linear(embedding(ids))
    return merged(attention(x, x, x)[0])


def test_a_program_trains_saves_and_loads():
    model, ids = build(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    lora.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = run(model, ids).detach()
    for _ in range(3):
        run(model, ids).square().sum().backward()
        lora.register_model_param_after_backward(model)
        optimizer.step()
        optimizer.zero_grad()
    after = run(model, ids).detach()
    assert not torch.allclose(after, before)
    state = lora.lora_state_dict(model)
    assert {name: tuple(t.shape) for name, t in state.items() if name.startswith("0.")} == {
        "0.w_lora_A": (2, 8),
        "0.w_lora_B": (9, 2),
    }
    assert all("_lora_" in name for name in state)
    fresh = build()
    fresh.load_state_dict(state, strict=False)
    torch.testing.assert_close(run(fresh, ids), after)
