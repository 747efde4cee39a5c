"""Dropout's mask, bit for bit, against Philox written in NumPy."""

import harness
import pytest
import torch
from fastlora.kernels import dropout, shrink


def test_numpy_philox():
    """The yardstick itself: counter and key of zeros give the words that Random123 publishes."""
    assert [hex(w) for w in harness.philox(0, [0])[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 61), (1,), (2, 4100)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_values(shape, dtype, p):
    x = (1 + torch.rand(shape)).to(dtype)
    seed = torch.tensor(0x7FED_CBA9_8765_4321)
    got = dropout.lora_dropout(harness.to_device(x), p, harness.to_device(seed)).cpu()
    keep, scale = harness.kept(int(seed), shape, p)
    assert torch.equal(got, torch.where(keep, (x.float() * scale).to(dtype), 0))


def test_any_strides():
    x = torch.rand(6, 40).t()
    seed = torch.tensor(11)
    got = dropout.lora_dropout(harness.to_device(x), 0.3, harness.to_device(seed)).cpu()
    keep, scale = harness.kept(11, (40, 6), 0.3)
    assert torch.equal(got, torch.where(keep, x * scale, 0))


@pytest.mark.parametrize("K", [64, 61, 200])
def test_mask_in_the_products(K):
    """An identity for a lets z, da and dx show the mask itself: forward, backward and the elementwise kernel agree."""
    M, p, seed = 70, 0.4, torch.tensor(2**62 + 12345)
    keep, scale = harness.kept(int(seed), (M, K), p)
    expected = keep.float() * scale
    x, eye, dz = torch.ones(M, K), torch.eye(K), torch.ones(M, K)
    x, eye, dz, seed = map(harness.to_device, (x, eye, dz, seed))
    torch.testing.assert_close(shrink.lora_shrink(x, [eye], p, seed).cpu(), expected, rtol=1e-6, atol=0)
    dx, da = shrink.lora_shrink_backward(dz, x, [eye], p, seed, [True, True])
    torch.testing.assert_close(dx.cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(da[0].cpu(), expected.sum(0).expand(K, K), rtol=1e-5, atol=0)
