"""The dropout D(x) of the adapter branch: a mask from a seed, the same on every back-end, never stored.

Philox 4x32-10 (Salmon et al., 2011) with the seed's low and high 32 bits as key. Element i of x in logical order takes
16-bit lane i % 8 of the block with counter (low, high 32 bits of i // 8, 0, 0) and is kept where
lane >= round(p * 65536), scaled by 65536 / (65536 - round(p * 65536)); p = 1 gives zeros.
"""

import functools
import math

import torch
from torch._functorch import compile_utils

from fastlora import backends
from fastlora.ops import check
from fastlora.ops.library import define, lib

_WORD = 0xFFFFFFFF


def scale(p):
    """What a kept element is multiplied by."""
    kept = 65536 - round(p * 65536)
    return 65536 / kept if kept else 0.0


def philox(blocks, seed):
    """Four 32-bit words, as int64 (len(blocks), 4), of the counters `blocks`."""
    c0, c1 = blocks & _WORD, (blocks >> 32) & _WORD
    c2 = c3 = torch.zeros_like(blocks)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # the products wrap in int64, their 64 bits are right all the same
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def dropout_mask(shape, p, seed):
    """True where D keeps an element of a tensor of this shape."""
    n = math.prod(shape)
    words = philox(torch.arange((n + 7) // 8, device=seed.device), seed)
    lanes = torch.stack((words & 0xFFFF, words >> 16), -1)
    return (lanes.reshape(-1)[:n] >= round(p * 65536)).reshape(shape)


def wide(x):
    """The dtype that sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dropped(x, p, seed):
    """D(x) in the accumulation dtype."""
    if not p:
        return x.to(wide(x))
    return torch.where(dropout_mask(x.shape, p, seed), x.to(wide(x)) * scale(p), 0.0)


def lora_dropout_reference(x, dropout_p, seed):
    return dropped(x, dropout_p, seed).to(x.dtype, copy=True, memory_format=torch.contiguous_format)


@functools.cache
def _other_mask(implementation, device):
    """None if Triton's D agrees with the reference's, bit for bit, on 4,096 elements; else a sentence."""
    x = torch.arange(1, 4097, dtype=torch.float32, device=device)
    seed = torch.tensor(0x0123456789ABCDEF, device=device)
    same = torch.equal(implementation(x, 0.1, seed), lora_dropout_reference(x, 0.1, seed))
    return None if same else f"Triton's dropout kernel gives another mask than the reference on {device}"


backends.verifications["lora_dropout", "triton"] = lambda implementation, x, *_: _other_mask(implementation, x.device)
lora_dropout_op = define(
    "lora_dropout", "Tensor x, float dropout_p, Tensor seed", "Tensor", lambda x, *_: x.new_empty(x.shape),
    check.dropout, lora_dropout_reference,
)  # fmt: skip

lib.define("draw_seed(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded))
# from torch's generator of x's device, in [0, 2⁶³)
lib.impl("draw_seed", lambda x: torch.randint(2**63 - 1, (), device=x.device), "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::draw_seed", lambda x: x.new_empty((), dtype=torch.int64), lib=lib)
draw_seed = torch.ops.fastlora.draw_seed.default
# torch's common-subexpression pass knows random ops by this list alone, not by their tag: two layers on one x would
# share a mask in a compiled graph
compile_utils.rand_ops.append(torch.ops.fastlora.draw_seed)
