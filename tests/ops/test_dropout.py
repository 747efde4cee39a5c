"""D(x): the mask against Philox written anew in numpy, its statistics, and that it is the same everywhere."""

import numpy as np
import pytest
import torch

from fastlora import backends, lora_linear, lora_shrink, use_backend
from fastlora.ops.dropout import dropout_mask

ops = torch.ops.fastlora


def philox_lanes(count, seed):
    """The first `count` 16-bit lanes, straight from the definition: Python integers, one block at a time."""
    lanes = []
    for block in range((count + 7) // 8):
        c = [block & 0xFFFFFFFF, block >> 32, 0, 0]
        k = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        for word in c:
            lanes += [word & 0xFFFF, word >> 16]
    return np.array(lanes[:count])


def test_known_answers_of_philox():
    """Random123's published vectors for philox4x32-10: counter and key of zeros."""
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], dtype=np.int64)
    lanes = philox_lanes(8, 0)
    assert [int(lanes[2 * i]) | int(lanes[2 * i + 1]) << 16 for i in range(4)] == words.tolist()


@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 7, 2**63 - 1])
@pytest.mark.parametrize("shape, p", [((7, 33), 0.1), ((3, 5, 64), 0.5), ((1,), 0.9), ((100, 129), 0.00001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_mask_and_scale(shape, p, seed, dtype):
    x = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float64).reshape(shape).div(1000).to(dtype)
    threshold = round(p * 65536)
    keep = torch.from_numpy(philox_lanes(x.numel(), seed) >= threshold).reshape(shape)
    expected = torch.where(keep, x.double() * (65536 / (65536 - threshold)), 0.0)
    tensor_seed = torch.tensor(seed)
    assert torch.equal(dropout_mask(shape, p, tensor_seed), keep)
    for name in ("reference", "native"):
        if name == "native" and backends.native()[1]:
            continue
        with use_backend(name):
            found = ops.lora_dropout(x, p, tensor_seed)
        assert torch.equal(found != 0, keep), name
        torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_far_element_counts_in_64_bits():
    """Blocks past 2³² take the counter's second word."""
    from fastlora.ops.dropout import philox

    blocks = torch.tensor([2**32 + 5, 5])
    one, other = philox(blocks, torch.tensor(1))
    assert not torch.equal(one, other)


def test_rate():
    keep = dropout_mask((1000, 1000), 0.3, torch.tensor(5)).double()
    assert abs(keep.mean() - 0.7) < 0.002
    assert (keep.mean(0) - 0.7).abs().max() < 0.08


def test_every_op_uses_the_same_mask(backend):
    """z, and the gradients of x and lora_A, follow from the one mask."""
    torch.manual_seed(0)
    x = torch.randn(9, 40, requires_grad=True)
    a = torch.eye(40).requires_grad_()
    seed = torch.tensor(77)
    keep = dropout_mask(x.shape, 0.4, seed)
    z = lora_shrink(x, a, dropout_p=0.4, training=True, seed=seed)
    assert torch.equal(z != 0, keep)
    dx, da = torch.autograd.grad(z, (x, a), torch.ones_like(z))
    assert torch.equal(dx != 0, keep)
    torch.testing.assert_close(da, (x.detach() * keep / 0.6).sum(0).expand(40, 40), rtol=1e-4, atol=1e-4)
    w = torch.zeros(40, 40)
    y = lora_linear(x, w, a, torch.eye(40), dropout_p=0.4, training=True, seed=seed)
    torch.testing.assert_close(y, z.detach().to(y.dtype))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx != 0, keep)


def test_eval_and_zero_p_drop_nothing(backend):
    x, w, a, b = torch.randn(4, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    y = lora_linear(x, w, a, b)
    assert torch.equal(y, lora_linear(x, w, a, b, dropout_p=0.5))
    assert torch.equal(y, lora_linear(x, w, a, b, dropout_p=0.0, training=True))
