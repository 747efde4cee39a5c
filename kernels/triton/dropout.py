"""D(x): dropout whose mask is a function of the seed and the element's index alone."""

import torch

import triton
import triton.language as tl

from . import tile
from .config import cdiv

BLOCK = 4096


@triton.jit
def _dropout_kernel(x, y, seed, threshold, keep_scale, count, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    keep = tile.kept(tl.load(seed), tl.zeros((1,), tl.int64), first, 0, threshold, 1, BLOCK, True)
    value = tl.load(x + offsets, mask=offsets < count, other=0.0).to(tl.float32) * keep_scale
    value = tl.where(tl.reshape(keep, (BLOCK,)), value, 0.0)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=offsets < count)


def lora_dropout(x, dropout_p, seed):
    """x with a lane below round(p·65536) dropped and the others scaled; contiguous."""
    x = x.contiguous()
    if not dropout_p:
        return x.clone()
    y, count = torch.empty_like(x), x.numel()
    if count:
        tile.launch(_dropout_kernel, (cdiv(count, BLOCK),), x, x, y, *tile.dropout(dropout_p, seed), count, BLOCK=BLOCK)
    return y
