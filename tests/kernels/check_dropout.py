"""Dropout's mask, bit for bit, against Philox written in NumPy."""

import harness
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastlora.kernels import dropout, shrink, tile


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


@triton.jit
def _far_kernel(seed, out, row, width, BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr):
    keep = tile.kept(tl.load(seed), row + tl.arange(0, BM).to(tl.int64), 8, width, 20000, BM, BN, ALIGNED)
    place = out + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(place, keep.to(tl.int8))


@pytest.mark.parametrize("width", [4096, 4097])
def test_far_elements(width):
    """Elements beyond 2**35, whose counters need both words."""
    row, seed = 2**31 - 100, 2**40 + 3
    out = harness.to_device(torch.full((4, 16), -1, dtype=torch.int8))
    arguments = (harness.to_device(torch.tensor(seed)), out, row, width)
    tile.launch(_far_kernel, (1,), out, *arguments, BM=4, BN=16, ALIGNED=width % 8 == 0)
    element = np.arange(row, row + 4)[:, None] * width + 8 + np.arange(16)
    words = harness.philox(seed, element.ravel() // 8)
    lane = element.ravel() % 8
    halves = words[np.arange(64), lane // 2] >> (16 * (lane % 2)).astype(np.uint32) & 0xFFFF
    assert element.min() // 8 > 2**32
    assert torch.equal(out.cpu().bool(), torch.from_numpy((halves >= 20000).reshape(4, 16)))
