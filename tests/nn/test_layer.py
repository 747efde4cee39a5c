"""The scale and the merged copy: what they follow, and that no copy outlives what it was made of."""

import pytest
import torch
from torch import nn

import fastlora.nn as lora
from fastlora.model import inject, merge, refresh, set_scale, unmerge


def layer_in_eval():
    torch.manual_seed(0)
    layer = lora.Linear(12, 8, r=4, lora_alpha=16).eval()
    nn.init.normal_(layer.lora_B)
    return layer


def unmerged(layer, x):
    weight = layer.base_weight() + layer.scaling * layer.lora_B @ layer.lora_A
    return nn.functional.linear(x, weight, layer.bias)


def agrees(layer, x):
    with torch.no_grad():
        torch.testing.assert_close(layer(x), unmerged(layer, x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def x():
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def test_merged_forward_is_used_and_lazy(x):
    layer = layer_in_eval()
    assert layer._merged_copy is None
    agrees(layer, x)
    first = layer._merged_copy[0]
    agrees(layer, x)
    assert layer._merged_copy[0] is first
    assert "_merged_copy" not in layer.state_dict() and len(list(layer.buffers())) == 0
    with torch.no_grad():
        first.zero_()
        torch.testing.assert_close(layer(x), layer.bias.expand(3, -1))


@pytest.mark.parametrize("drop", [
    lambda layer: layer.train(),
    lambda layer: layer.eval(),
    lambda layer: layer.to(torch.float64),
    lambda layer: layer.load_state_dict(layer.state_dict()),
    refresh,
    unmerge,
    merge,
])  # fmt: skip
def test_what_drops_the_copy(drop, x):
    layer = layer_in_eval()
    agrees(layer, x)
    drop(layer)
    assert layer._merged_copy is None


def test_gradients_never_come_from_the_merged_weight(x):
    layer = layer_in_eval()
    agrees(layer, x)
    layer(x).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    frozen = layer_in_eval().requires_grad_(False)
    x = x.requires_grad_()
    agrees(frozen, x)
    (dx,) = torch.autograd.grad(frozen(x).sum(), x)
    assert frozen._merged_copy
    torch.testing.assert_close(dx, torch.autograd.grad(unmerged(frozen, x).sum(), x)[0])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("validate", ["before the step", "between backward and step", "before eval"])
def test_an_optimizer_step_in_eval_mode_is_seen(fused, validate, x):
    layer = layer_in_eval()
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=fused)
    if validate == "before eval":
        layer.train()
    for _ in range(3):
        agrees(layer, x)
        layer(x).square().sum().backward()
        if validate != "before the step":
            layer.train(validate == "before eval").eval()
            agrees(layer, x)
        optimizer.step()
        agrees(layer, x)
        optimizer.zero_grad()
        agrees(layer, x)


def share_and_write(layer):
    """Another parameter on the same memory, written until its version is that of the first."""
    other = nn.Parameter(layer.lora_B.data)
    while other._version < layer.lora_B._version:
        other.mul_(2)
    layer.lora_B = other


@pytest.mark.parametrize("write", [
    share_and_write,
    lambda layer: layer.lora_B.mul_(2),
    lambda layer: layer.lora_A.copy_(torch.ones(4, 12)),
    lambda layer: layer.weight.zero_(),
    lambda layer: layer.scaling.fill_(7.0),
    lambda layer: set_scale(layer, 0.5),
    lambda layer: setattr(layer.lora_B, "data", torch.ones(8, 4)),
    lambda layer: setattr(layer, "lora_B", nn.Parameter(torch.ones(8, 4))),
])  # fmt: skip
def test_a_write_is_seen(write, x):
    layer = layer_in_eval()
    agrees(layer, x)
    with torch.no_grad():
        write(layer)
    agrees(layer, x)


def test_a_write_past_the_version_is_seen_after_refresh(x):
    layer = layer_in_eval()
    agrees(layer, x)
    layer.lora_B.data.mul_(2)
    refresh(layer)
    agrees(layer, x)


def test_a_step_in_training_mode_set_by_hand_is_seen(x):
    layer = layer_in_eval()
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=True)
    agrees(layer, x)
    layer.training = True
    layer(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    layer.training = False
    agrees(layer, x)


def test_functional_call_with_other_adapters(x):
    layer = layer_in_eval()
    agrees(layer, x)
    other = {"lora_B": torch.zeros(8, 4)}
    with torch.no_grad():
        out = torch.func.functional_call(layer, other, (x,))
    torch.testing.assert_close(out, nn.functional.linear(x, layer.weight, layer.bias))
    # no copy is kept of tensors that are only lent
    assert layer._merged_copy[1][2] is layer.lora_B
    agrees(layer, x)


def test_inference_mode(x):
    layer = layer_in_eval()
    with torch.inference_mode():
        inside = layer(x)
        assert layer._merged_copy
    torch.testing.assert_close(inside, unmerged(layer, x), rtol=1e-4, atol=1e-4)
    layer.requires_grad_(False)
    # a copy built in inference mode must be fit for autograd afterwards
    layer(x.requires_grad_()).sum().backward()
    with torch.inference_mode():
        built_inside = lora.Linear(12, 8, r=4).eval()
        nn.init.normal_(built_inside.lora_B)
        # inference tensors have no version, so no copy of them is kept
        torch.testing.assert_close(built_inside(x), unmerged(built_inside, x), rtol=1e-4, atol=1e-4)
        assert not built_inside._merged_copy
        built_inside.lora_B.mul_(2)
        torch.testing.assert_close(built_inside(x), unmerged(built_inside, x), rtol=1e-4, atol=1e-4)


def test_a_compiled_graph_never_holds_a_stale_copy(x):
    layer = layer_in_eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=True)
    with torch.no_grad():
        for _ in range(2):
            agrees(layer, x)
            agrees(compiled, x)
            layer.lora_B.data.mul_(2)
            torch.testing.assert_close(compiled(x), unmerged(layer, x), rtol=1e-4, atol=1e-4)
            layer.refresh()
    for _ in range(3):
        agrees(layer, x)
        compiled(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        agrees(layer, x)
        agrees(compiled, x)
    set_scale(layer, 3.0)
    agrees(compiled, x)


def test_injected_layers_merge_only_when_told(x):
    layer = inject(nn.Linear(12, 8), r=4).eval()
    nn.init.normal_(layer.lora_B)
    agrees(layer, x)
    assert not layer.merged and layer._merged_copy is None
    assert merge(layer) is layer
    agrees(layer, x)
    assert layer._merged_copy
    layer.train().eval()
    assert not layer.merged
    agrees(layer, x)
    merge(layer)
    assert unmerge(layer) is layer and not layer.merged


def test_the_scale_keeps_its_precision():
    layer = lora.Linear(6, 5, r=3, lora_alpha=4)
    exact = torch.tensor(4 / 3)
    for move in (lambda: layer.to(torch.bfloat16), layer.half, layer.double, lambda: layer.to("meta")):
        move()
        assert layer.scaling.dtype == torch.float32 and torch.equal(layer.scaling.cpu(), exact)
    layer.to_empty(device="cpu")
    assert torch.equal(layer.scaling, exact)
    set_scale(layer, 2.0)
    assert torch.equal(layer.scaling, 2 * exact)
    layer.reset_parameters()
    assert torch.equal(layer.scaling, exact)
    assert "scaling" not in layer.state_dict()


def test_meta_device():
    with torch.device("meta"):
        layer = lora.Linear(6, 5, r=3, lora_alpha=4)
    assert layer.lora_A.is_meta and layer(torch.empty(2, 6, device="meta")).shape == (2, 5)
    layer.to_empty(device="cpu").reset_parameters()
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.lora_A.abs().max() > 0
