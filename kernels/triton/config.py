"""Which tiles a kernel uses: pure functions of shape, element size and architecture, so that they are tested without a GPU."""

from functools import lru_cache
from typing import NamedTuple


class Config(NamedTuple):
    """One program's rows, columns and reduction step, its warps and the depth of its load pipeline."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def cdiv(a, b):
    return -(-a // b)


def rank_block(R):
    """Rank rows that one step takes: R padded to a power of two, at least a tensor core's 16, at most 64."""
    return min(max(16, 1 << (R - 1).bit_length()), 64) if R else 0


def splits(programs, steps, sms):
    """Into how many parts a reduction of `steps` steps is cut so that two programs per multiprocessor have work.

    A function of the shape and the device alone: the same call always adds in the same order.
    """
    return max(1, min(steps, cdiv(2 * sms, max(programs, 1)), 32))


@lru_cache(maxsize=4096)
def linear(M, N, itemsize, arch, sms):
    """The K-extended GEMM. 255 registers a thread bound 4 warps to 128 x 128; 8 warps carry 128 x 256."""
    if itemsize == 4:
        return Config(16 if M <= 16 else 64, 64, 32, 4, 3)
    if M <= 64:
        return Config(16 if M <= 16 else 32 if M <= 32 else 64, 64, 128, 4, 4 if arch in (80, 90) else 2)
    if arch not in (80, 90):
        return Config(128, 128, 32, 4, 3)
    if cdiv(M, 128) * cdiv(N, 256) >= sms:
        return Config(128, 256, 64, 8, 3)
    return Config(128, 128, 64, 8, 3)


def shrink(M, itemsize):
    """z = D(x) aᵀ: x is streamed once, so small rows and a long step."""
    return Config(16 if M <= 16 else 64, 0, 32 if itemsize == 4 else 128, 4, 2 if itemsize == 4 else 4)


def shrink_backward(itemsize):
    """da: BK columns of x against every row."""
    return Config(32 if itemsize == 4 else 64, 0, 32 if itemsize == 4 else 128, 4, 2 if itemsize == 4 else 3)


def expand(M, itemsize):
    """y + (z ⊙ g) b: one tile, no loop."""
    return Config(16 if M <= 16 else 64, 64 if itemsize == 4 else 128, 0, 4, 2)


def expand_backward(M, itemsize):
    """t = dy bᵀ and db from one read of dy: more rows a program mean fewer partial db to write."""
    if itemsize == 4:
        return Config(16 if M <= 16 else 32, 32, 0, 4, 2)
    return Config(16, 64, 0, 4, 3) if M <= 16 else Config(64, 64, 0, 4, 3) if M <= 2048 else Config(128, 64, 0, 8, 3)
