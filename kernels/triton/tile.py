"""What several kernels share: device helpers; on the host the one place that launches, and the objections."""

import os
from functools import cache, lru_cache
from typing import NamedTuple

import torch

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
# "tma" asks for the product's persistent form, wherever it can run.
FORM = os.environ.get("FASTLORA_TRITON", "")


@triton.jit
def kept(seed, rows, first, width, threshold, BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr):
    """Dropout's mask of rows (BM, int64) × columns first … of a matrix `width` wide: a lane ≥ threshold is kept.

    The eight 16-bit halves of Philox 4x32-10's four words decide elements 8·group … 8·group + 7. Where every row starts
    a group (ALIGNED) one call of the generator makes eight decisions.
    """
    if ALIGNED:
        group = rows[:, None] * (width // 8) + (first // 8 + tl.arange(0, BN // 8))[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, group)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BM, BN))
    else:
        element = rows[:, None] * width + (first + tl.arange(0, BN))[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, element >> 3)
        lane = (element & 7).to(tl.int32)
        word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
        lanes = (word >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF
    return lanes.to(tl.int32) >= threshold


@triton.jit
def load_gated(z, zm, zr, g, gm, gr, scale, rows, ranks, M, R, to: tl.constexpr):
    """(z ⊙ scale·g)[rows, ranks] in the GEMM's type. The gate is applied where z is read: only z itself is stored."""
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    tile = tl.load(z + rows[:, None] * zm + ranks[None, :] * zr, mask=inside, other=0.0).to(tl.float32) * scale
    if g is not None:
        tile *= tl.load(g + rows[:, None] * gm + ranks[None, :] * gr, mask=inside, other=0.0).to(tl.float32)
    return tile.to(to)


@triton.jit
def update(
    acc, z, zm, zr, g, gm, gr, scale, b, bn, br, rows, cols, M, N, R,
    to: tl.constexpr, RP: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """acc + (z ⊙ g) b, RP rank rows a step; b [R, N] may be fp32 beside a 16-bit GEMM."""
    for first in tl.range(0, 1 if ONE else R, RP, num_stages=1):
        ranks = first + tl.arange(0, RP)
        zt = load_gated(z, zm, zr, g, gm, gr, scale, rows, ranks, M, R, to)
        inside = (ranks < R)[:, None] & ((cols >= 0) & (cols < N))[None, :]
        bt = tl.load(b + ranks[:, None] * br + cols[None, :] * bn, mask=inside, other=0.0).to(to)
        acc = tl.dot(zt, bt, acc, input_precision="ieee")
    return acc


class Device(NamedTuple):
    arch: int
    sms: int


@lru_cache
def device_of(device):
    """Architecture and multiprocessors; the interpreter plays an H200."""
    if device.type != "cuda":
        return Device(90, 132)
    found = torch.cuda.get_device_properties(device)
    return Device(10 * found.major + found.minor, found.multi_processor_count)


def launch(kernel, grid, x, *args, **options):
    """Run `kernel` on x's device. Every launch goes through here, where tests without a GPU catch it."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def dropout(p, seed):
    """(seed, lanes that are dropped, scale of what is kept) as the kernels take them: p in steps of 1/65536."""
    if not p:
        return None, 0, 1.0
    dropped = round(p * 65536)
    return seed, dropped, 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def rows_of(x):
    """x (…, n) as a matrix: a view wherever strides allow one."""
    return x if x.dim() == 2 else x[None] if x.dim() == 1 else x.flatten(0, -2)


def join(pairs, dim):
    """All adapters' rank rows in one matrix: a single pair in place, several concatenated, small beside x and w."""
    return pairs[0] if len(pairs) == 1 else torch.cat(list(pairs), dim)


def split(gradient, adapters, dim):
    """One gradient for each adapter, in its type and in memory of its own."""
    parts, several = gradient.split([a.shape[dim] for a in adapters], dim), len(adapters) > 1
    return [part.to(a.dtype, copy=several) for part, a in zip(parts, adapters, strict=True)]


def partial(count, shape, x):
    """Room for `count` fp32 parts of a sum, and the sum itself where there is one part only."""
    return torch.empty(shape if count == 1 else (count, *shape), dtype=torch.float32, device=x.device)


def total(parts, count):
    """The parts added in their order, if there are any."""
    return parts if count == 1 or parts is None else parts.sum(0)


class Gate(NamedTuple):
    """g = scale · rows[m·gm + row·gr]; a stride of 0 broadcasts."""

    rows: torch.Tensor | None
    gm: int
    gr: int
    scale: float


NO_GATE = Gate(None, 0, 0, 1.0)


@cache  # a captured graph reads them
def rank_rows(ranks, device):
    """(the adapter of each rank row, where each adapter's rows begin and the last one's end)."""
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks, dtype=torch.int64))
    return owner.to(device), torch.tensor([0, *ranks]).cumsum(0, dtype=torch.int32).to(device)


def gate(scaling, gates, ranks, z):
    """The gate of z (…, R). A scaling on the host becomes an argument; one on the device is not read by the host."""
    scale, rows = 1.0, gates
    if scaling.dim() == 0 and scaling.device.type == "cpu":
        scale = float(scaling)
    else:
        scaling = scaling.to(z.device, torch.float32)
        rows = scaling if gates is None else scaling * gates.float()
    if rows is None:
        return Gate(None, 0, 0, scale)
    if rows.dim() and rows.shape[-1] > 1 and any(r != 1 for r in ranks):
        rows = rows.index_select(-1, rank_rows(tuple(ranks), z.device)[0])
    rows = rows_of(rows.expand(*z.shape[:-1], rows.shape[-1:].numel())).expand(-1, z.shape[-1])
    return Gate(rows, *rows.stride(), scale)


_counters = {}


def tickets(count, x):
    """Counters at zero, left at zero by every launch; a stream has its own, and so has every captured launch."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    key = x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    found = _counters.get(key)
    if found is None or len(found) < count:
        found = _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=x.device)
    return found


@lru_cache
def _unsupported(device):
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 6):
        return f"Triton {triton.__version__} is older than 3.6"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"needs an NVIDIA GPU (or TRITON_INTERPRET=1, for tests), the input is on {device}"
    if device.type == "cuda" and torch.version.hip:
        return "the tiles are chosen for NVIDIA GPUs and were never tried on an AMD GPU"
    if device.type == "cuda" and device_of(device).arch < 80:
        return f"needs compute capability 8.0, this GPU has {device_of(device).arch / 10}"
    return None


def objection(*args):
    """The sentence that says why Triton cannot take tensors such as these, or None."""
    if FORM not in ("", "tma"):
        return f"FASTLORA_TRITON={FORM}: expected tma or nothing"
    flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, torch.Tensor)]
    x = flat[0]
    if x.dtype == torch.float64:
        return "the kernels accumulate in fp32 and take no float64"
    for t in flat:
        if t.device != x.device and (t.dim() or t.dtype == torch.int64):
            return f"the tensors lie on {x.device} and {t.device}"
    return _unsupported(x.device)
