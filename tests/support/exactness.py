"""What tests share: the error rule, hostile inputs, NaN-filled fresh memory, plain-torch formulas."""

import contextlib

import torch
import torch.nn.functional as F

from fastlora.ops.dropout import dropout_mask, scale


def assert_accurate(actual, exact, plain, name="result"):
    """The error rule: |actual − exact| is at most twice |plain − exact|, plus one rounding unit of the largest value.

    `exact` is the result in float64, `plain` that of plain torch at the dtype under test. Raises AssertionError with
    `name`, the errors and where the worst element is. In float64 nothing is more exact than `exact`, which has its own
    rounding: there the allowance is 64 units.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    error = (actual.detach().double() - exact).abs()
    unit = torch.finfo(plain.dtype).eps * exact.abs().max() * (64 if plain.dtype == torch.float64 else 1)
    allowed = 2 * (plain.detach().double() - exact).abs().max() + unit
    # written so that NaN fails
    if not error.max() <= allowed:
        where = torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape)
        raise AssertionError(
            f"{name}: error {error.max():.3g} > {allowed:.3g} at {tuple(int(i) for i in where)}: "
            f"{actual[where]} for {exact[where]:.6g}"
        )


def formula(
    x, weight, lora_A, lora_B, scaling=1.0, bias=None, gates=None, ranks=None, column_scale=None, p=0.0, seed=None
):
    """y in plain torch and torch's own autograd, at the dtype of its arguments; lora_A and lora_B are lists."""
    v = F.linear(x, weight)
    d = x if not p else torch.where(dropout_mask(x.shape, p, seed), x * scale(p), torch.zeros_like(x))
    E = len(ranks) if ranks else sum(a.shape[0] for a in lora_A)
    g = torch.as_tensor(scaling, dtype=x.dtype) * (1 if gates is None else gates.to(x.dtype))
    g = g.expand(*(x.shape[:-1] if g.dim() > 1 else ()), E)
    if ranks:
        g = g.repeat_interleave(torch.tensor(ranks), dim=-1)
    for a, b, part in zip(lora_A, lora_B, g.split([a.shape[0] for a in lora_A], -1), strict=True):
        v = v + F.linear(F.linear(d, a.to(x.dtype)) * part, b.to(x.dtype))
    v = v if column_scale is None else v * column_scale.to(x.dtype)
    return v if bias is None else v + bias


def rounded(t, dtype):
    """t in float64 after rounding to `dtype`: the same numbers for the exact result as for the one under test."""
    return t.detach().to(dtype).double()


def strided(t):
    """The values of t with a gap between elements and a nonzero offset."""
    if not t.dim():
        return t
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))
    wide[..., 1::2] = t.detach()
    return wide[..., 1::2]


def transposed(t):
    """The values of t with the last two strides exchanged."""
    return t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach().clone()


@contextlib.contextmanager
def poison():
    """Fill fresh uninitialised tensors with NaN, in C++ as in Python, while the block runs."""
    was, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        torch.utils.deterministic.fill_uninitialized_memory = filled
