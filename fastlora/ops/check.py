"""Argument checks of the ops, by name: what was given and what was expected. (`csrc/check.cpp` asks the same.)"""

import functools

import torch

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _expect(error, ok, name, got, expected):
    if not ok:
        raise error(f"fastlora: {name}: got {got}, expected {expected}")


value, kind = functools.partial(_expect, ValueError), functools.partial(_expect, TypeError)


def tensors(name, given):
    if isinstance(given, torch.Tensor):
        return [given]
    kind(isinstance(given, (list, tuple)), name, type(given).__name__, "a tensor or a sequence of tensors")
    for t in given:
        kind(isinstance(t, torch.Tensor), name, f"a {type(t).__name__} in the sequence", "tensors only")
    return list(given)


def dense(name, t, *dtypes):
    """A dense tensor of one of these dtypes, or of any that floats."""
    kind(t.layout == torch.strided, name, t.layout, "a dense tensor")
    kind(t.dtype in (dtypes or _FLOATS), name, t.dtype, " or ".join(map(str, dict.fromkeys(dtypes or _FLOATS))))


def tensor(name, t, x, shape, *dtypes):
    """A dense tensor on x's device, of this shape, in which None is any size."""
    dense(name, t, *dtypes)
    fits = t.dim() == len(shape) and all(n is None or n == size for n, size in zip(shape, t.shape, strict=True))
    value(fits, name, f"shape {tuple(t.shape)}", str(tuple("r" if n is None else n for n in shape)).replace("'", ""))
    value(t.device == x.device, name, f"a tensor on {t.device}", f"{x.device}, as the others")


def adapter(name, t, rows, columns, x):
    """A matrix in which None is the adapter's rank; of a half type's layer it may be a float32 master."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    tensor(name, t, x, (rows, columns), x.dtype, *([torch.float32] if half else []))


def probability(p):
    value(0 <= p <= 1, "dropout_p", p, "a number from 0 to 1")


def dropout(x, dropout_p, seed):
    probability(dropout_p)
    if dropout_p > 0:
        value(seed is not None, "seed", None, "a 0-d int64 tensor when dropout_p > 0")
        tensor("seed", seed, x, (), torch.int64)


def scale(scaling, E):
    dense("scaling", scaling)
    shape = tuple(scaling.shape)
    value(shape in ((), (E,)), "scaling", f"shape {shape}", f"() or ({E},)")


def gate(scaling, gates, ranks, count, R, leading, device):
    """scaling () or (E,); gates broadcastable to (*leading, E); ranks sum to R."""
    if ranks:
        value(min(ranks) >= 0 and sum(ranks) == R, "ranks", list(ranks), f"non-negative ranks that sum to R = {R}")
    value(bool(ranks) or count <= 1, "ranks", list(ranks), "one rank per adapter, as lora_A is a sequence")
    E = len(ranks) if ranks else R
    scale(scaling, E)
    on = scaling.device == device or (scaling.dim() == 0 and scaling.device.type == "cpu")
    value(on, "scaling", f"a tensor on {scaling.device}", f"{device} (or a 0-d CPU tensor)")
    if gates is None:
        return
    dense("gates", gates)
    value(gates.device == device, "gates", f"a tensor on {gates.device}", f"{device}, as x")
    full = (*leading, E)
    pairs = zip(reversed(gates.shape), reversed(full), strict=False)
    fits = gates.dim() <= len(full) and all(g == 1 or g == f for g, f in pairs)
    value(fits, "gates", f"shape {tuple(gates.shape)}", f"a shape that broadcasts to {full}")


def shrink(x, lora_A, dropout_p, seed):
    dense("x", x)
    value(x.dim() >= 1, "x", "a 0-d tensor", "(..., in)")
    for a in lora_A:
        adapter("lora_A", a, None, x.shape[-1], x)
    dropout(x, dropout_p, seed)


def base(x, weight, bias):
    dense("x", x)
    value(x.dim() >= 1, "x", "a 0-d tensor", "(..., in)")
    value(weight.dim() == 2, "weight", f"shape {tuple(weight.shape)}", "(out, in)")
    value(x.shape[-1] == weight.shape[1], "x", f"shape {tuple(x.shape)}", f"(..., {weight.shape[1]}), as weight's in")
    tensor("weight", weight, x, weight.shape, x.dtype)
    if bias is not None:
        tensor("bias", bias, x, weight.shape[:1], x.dtype)


def linear(x, weight, lora_A, lora_B, scaling, bias, gates, ranks, column_scale, dropout_p, seed):
    base(x, weight, bias)
    shrink(x, lora_A, dropout_p, seed)
    out = weight.shape[0]
    value(len(lora_A) == len(lora_B), "lora_B", f"{len(lora_B)} tensors", f"{len(lora_A)}, as lora_A")
    for a, b in zip(lora_A, lora_B, strict=True):
        adapter("lora_B", b, out, a.shape[0], x)
    gate(scaling, gates, ranks, len(lora_A), sum(a.shape[0] for a in lora_A), x.shape[:-1], x.device)
    if column_scale is not None:
        tensor("column_scale", column_scale, x, (out,), *_FLOATS)


def expand(y, z, lora_B, scaling, gates, ranks, columns, ids):
    dense("y", y)
    value(y.dim() >= 1, "y", "a 0-d tensor", "(..., out)")
    value(len(columns) in (0, 2), "columns", list(columns), "(start, stop)")
    start, stop = columns or (0, y.shape[-1])
    value(0 <= start <= stop <= y.shape[-1], "columns", (start, stop), f"0 <= start <= stop <= {y.shape[-1]}")
    for b in lora_B:
        adapter("lora_B", b, stop - start, None, y)
    R = sum(b.shape[1] for b in lora_B)
    rows = y.shape[:-1] if ids is None else (None,)
    tensor("z", z, y, (*rows, R), torch.float64 if y.dtype == torch.float64 else torch.float32, y.dtype)
    if ids is not None:
        tensor("ids", ids, y, y.shape[:-1], torch.int64, torch.int32)
    gate(scaling, gates, ranks, len(lora_B), R, y.shape[:-1], y.device)
