"""torch's paths that read weights past forward: adapters are never lost in them."""

import copy

import pytest
import torch
from torch import nn

import fastlora.nn as lora
from fastlora.model import inject, merge_and_export, remove

FEED_FORWARD = ["linear1", "linear2"]


def encoder(layers=1, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, layers).eval() if layers > 1 else layer.eval()


def wake(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def without_fast_path(model, x, **options):
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return model(x, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_fused_path_would_lose_the_adapter(x):
    """The trap itself: were torch to drop this path, the rest of this file would test nothing."""
    layer = encoder()
    layer.linear1.register_parameter("unused", None)
    layer.linear1.forward = lambda x: pytest.fail("the fused path calls no forward")
    with torch.no_grad():
        layer(x)


def test_an_injected_encoder_layer_leaves_the_fused_path(x):
    layer = encoder()
    with torch.no_grad():
        before = layer(x)
        inject(layer, r=2, target_modules=FEED_FORWARD)
        torch.testing.assert_close(layer(x), before)
        wake(layer)
        out = layer(x)
        assert (out - before).abs().max() > 0.1
        torch.testing.assert_close(out, without_fast_path(layer, x))
        torch.testing.assert_close(merge_and_export(layer)(x), out, rtol=1e-4, atol=1e-4)
        assert merge_and_export(layer).activation_relu_or_gelu == 1
        torch.testing.assert_close(remove(layer)(x), before)
    assert layer.activation_relu_or_gelu == 1


def test_an_injected_encoder_does_without_nested_tensors(x):
    model = encoder(layers=2)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=mask)
        inject(model, r=2, target_modules=FEED_FORWARD)
        keep = ~mask
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[keep], before[keep])
        wake(model)
        out = model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(out, without_fast_path(model, x, src_key_padding_mask=mask))
        assert (out - before)[keep].abs().max() > 0.1
    assert remove(model).use_nested_tensor


def test_a_layer_assigned_by_hand_is_seen(x):
    layer = encoder()
    base = copy.deepcopy(layer)
    layer.linear1 = lora.Linear(8, 16, r=2, merge_weights=False).eval()
    layer.linear1.load_state_dict(base.linear1.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), base(x))
        wake(layer)
        assert (layer(x) - base(x)).abs().max() > 0.1


def test_attention_output_is_refused_by_name_and_adapted_with_its_layer():
    model = encoder()
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match="self_attn.out_proj: got the out_proj of nn.MultiheadAttention"):
        inject(model, target_modules=["linear1", "out_proj"])
    assert [(n, type(m)) for n, m in model.named_modules()] == before
    inject(model)
    assert not hasattr(model.self_attn.out_proj, "lora_A") and hasattr(model.linear2, "lora_A")
    assert hasattr(model.self_attn.lora_o, "lora_A")
    with pytest.raises(ValueError, match="out_proj"):
        nn.MultiheadAttention(8, 2).out_proj = lora.Linear(8, 8, r=2)
