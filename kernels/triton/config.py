"""Which tiles a kernel uses: pure functions of shape, element size and architecture."""

from typing import NamedTuple

FEW = 64  # tokens up to which a forward is one launch: a guess


class Config(NamedTuple):
    """One program's rows, columns and reduction step, its warps and the depth of its load pipeline."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def cdiv(a, b):
    return -(-a // b)


def rank_block(R, most=64):
    """Rank rows that one step takes: R padded to a power of two, at least a tensor core's 16."""
    return min(max(16, 1 << (R - 1).bit_length()), most) if R else 0


def splits(programs, steps, sms):
    """Into how many parts a reduction of `steps` steps is cut so that two programs per multiprocessor have work.

    A function of the shape and the device alone: the same call always adds in the same order. No part is empty.
    """
    count = max(1, min(steps, cdiv(2 * sms, max(programs, 1)), 32))
    return cdiv(steps, cdiv(steps, count)) if steps else 1


def linear(M, N, itemsize, arch, sms):
    """The K-extended GEMM; with 4 warps a tile of 128 x 128 already spills once an epilogue joins it."""
    if itemsize == 4:
        return Config(16 if M <= 16 else 64, 64, 32, 4, 3)
    if M <= 64:
        return Config(16 if M <= 16 else 32 if M <= 32 else 64, 64, 128, 4, 4 if arch in (80, 90) else 2)
    if arch not in (80, 90):
        return Config(128, 128, 32, 8, 3)
    if cdiv(M, 128) * cdiv(N, 256) >= sms:
        return Config(128, 256, 64, 8, 3)
    return Config(128, 128, 64, 8, 3)


def product_tma(M, N, K, itemsize, arch, sms):
    """The persistent TMA form of it, or None where it cannot run: rows of y must start on 16 bytes."""
    if arch != 90 or itemsize != 2 or M <= 64 or N % 8 or not K:
        return None
    c = linear(M, N, itemsize, arch, sms)
    # The tile that is stored lies beside the pipeline: 128 x 256 has no room for a fourth stage.
    return c if c.BN == 256 else c._replace(stages=4)


def describes(t):
    """Whether a TMA descriptor can name this matrix."""
    (outer, inner), size = t.stride(), t.element_size()
    return inner == 1 and outer >= t.shape[1] and outer * size % 16 == 0 and t.data_ptr() % 16 == 0


def decode(M, itemsize, RP, aligned):
    """Few tokens on the short side of the product; long steps of K, so that W streams, where registers allow them."""
    BM = max(16, 1 << (M - 1).bit_length())
    if itemsize == 4 or not aligned:
        return Config(BM, 64, 32, 4, 3)
    return Config(BM, 64, 128 if RP == 16 else 64, 4, 4)


def shrink(M, itemsize, RP, aligned):
    """z = D(x) aᵀ: x is streamed once, so few rows and a long step; a short one where Philox runs per element."""
    if itemsize == 4 or not aligned:
        return Config(16 if M <= 16 else 64, 0, 32, 4, 2)
    return Config(16 if M <= 16 else 64, 0, 128 if RP == 16 else 64, 4, 4)


def shrink_backward(M, itemsize, RP, aligned):
    """da: BK columns of x against every row."""
    if itemsize == 4 or not aligned:
        return Config(32, 0, 32 if itemsize == 4 else 64, 4, 2)
    return Config(64, 0, 128, 4, 3)


def expand(M, itemsize):
    """y + (z ⊙ g) b: one tile, no loop."""
    return Config(16 if M <= 16 else 64, 64 if itemsize == 4 else 128, 0, 4, 2)


def expand_backward(M, itemsize, RP, arch):
    """t = dy bᵀ and db from one read of dy: more rows a program mean fewer partial db to write."""
    if itemsize == 4:
        return Config(16 if M <= 16 else 32, 32, 0, 4, 2)
    if M <= 2048 or (RP > 32 and arch != 90):
        return Config(16 if M <= 16 else 64, 64, 0, 4, 3)
    return Config(128, 64, 0, 8, 3)
