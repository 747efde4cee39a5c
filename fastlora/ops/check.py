"""Argument checks of the ops, by name: what was given and what was expected. (`csrc/check.cpp` asks the same.)"""

import math

import torch

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def value(ok, name, got, expected):
    if not ok:
        raise ValueError(f"fastlora: {name}: got {got}, expected {expected}")


def kind(ok, name, got, expected):
    if not ok:
        raise TypeError(f"fastlora: {name}: got {got}, expected {expected}")


def tensors(name, given):
    if isinstance(given, torch.Tensor):
        return [given]
    kind(isinstance(given, (list, tuple)), name, type(given).__name__, "a tensor or a sequence of tensors")
    for t in given:
        kind(isinstance(t, torch.Tensor), name, f"a {type(t).__name__} in the sequence", "tensors only")
    return list(given)


def dense(name, t):
    kind(t.layout == torch.strided, name, t.layout, "a dense tensor")


def same(name, t, x):
    dense(name, t)
    kind(t.dtype == x.dtype, name, t.dtype, f"{x.dtype}, as x")
    value(t.device == x.device, name, f"a tensor on {t.device}", f"{x.device}, as x")


def matrix(name, t, rows, columns, x):
    dense(name, t)
    fits = t.dim() == 2 and all(n is None or n == size for n, size in zip((rows, columns), t.shape, strict=True))
    wanted = ", ".join("r" if n is None else str(n) for n in (rows, columns))
    value(fits, name, f"shape {tuple(t.shape)}", f"({wanted})")
    half = x.dtype in (torch.bfloat16, torch.float16)
    same_type = t.dtype == x.dtype or half and t.dtype == torch.float32
    kind(same_type, name, t.dtype, f"{x.dtype}, as x{', or torch.float32' if half else ''}")
    value(t.device == x.device, name, f"a tensor on {t.device}", f"{x.device}, as x")


def floating(name, t):
    dense(name, t)
    kind(t.dtype in _FLOATS, name, t.dtype, "float32, bfloat16, float16 or float64")


def probability(p):
    value(math.isfinite(p) and 0 <= p <= 1, "dropout_p", p, "a number from 0 to 1")


def dropout(x, dropout_p, seed):
    probability(dropout_p)
    if dropout_p > 0:
        value(seed is not None, "seed", None, "a 0-d int64 tensor when dropout_p > 0")
        kind(seed.dtype == torch.int64, "seed", seed.dtype, "torch.int64")
        value(seed.dim() == 0, "seed", f"shape {tuple(seed.shape)}", "a 0-d tensor")
        value(seed.device == x.device, "seed", f"a tensor on {seed.device}", f"{x.device}, as x")


def gate(scaling, gates, ranks, count, R, leading, device):
    """scaling () or (E,); gates broadcastable to (*leading, E); ranks sum to R."""
    if ranks:
        value(min(ranks) >= 0 and sum(ranks) == R, "ranks", list(ranks), f"non-negative ranks that sum to R = {R}")
    value(bool(ranks) or count <= 1, "ranks", list(ranks), "one rank per adapter, as lora_A is a sequence")
    E = len(ranks) if ranks else R
    floating("scaling", scaling)
    shape = tuple(scaling.shape)
    value(shape in ((), (E,)), "scaling", f"shape {shape}", f"() or ({E},)")
    on = scaling.device == device or (scaling.dim() == 0 and scaling.device.type == "cpu")
    value(on, "scaling", f"a tensor on {scaling.device}", f"{device} (or a 0-d CPU tensor)")
    if gates is None:
        return
    floating("gates", gates)
    value(gates.device == device, "gates", f"a tensor on {gates.device}", f"{device}, as x")
    full = (*leading, E)
    pairs = zip(reversed(gates.shape), reversed(full), strict=False)
    fits = gates.dim() <= len(full) and all(g == 1 or g == f for g, f in pairs)
    value(fits, "gates", f"shape {tuple(gates.shape)}", f"a shape that broadcasts to {full}")


def shrink(x, lora_A, dropout_p, seed):
    floating("x", x)
    value(x.dim() >= 1, "x", "a 0-d tensor", "(..., in)")
    for a in lora_A:
        matrix("lora_A", a, None, x.shape[-1], x)
    dropout(x, dropout_p, seed)


def base(x, weight, bias):
    floating("x", x)
    value(x.dim() >= 1, "x", "a 0-d tensor", "(..., in)")
    value(weight.dim() == 2, "weight", f"shape {tuple(weight.shape)}", "(out, in)")
    value(x.shape[-1] == weight.shape[1], "x", f"shape {tuple(x.shape)}", f"(..., {weight.shape[1]}), as weight's in")
    same("weight", weight, x)
    if bias is not None:
        value(bias.shape == weight.shape[:1], "bias", f"shape {tuple(bias.shape)}", f"({weight.shape[0]},)")
        same("bias", bias, x)


def linear(x, weight, lora_A, lora_B, scaling, bias, gates, ranks, column_scale, dropout_p, seed):
    base(x, weight, bias)
    shrink(x, lora_A, dropout_p, seed)
    out = weight.shape[0]
    value(len(lora_A) == len(lora_B), "lora_B", f"{len(lora_B)} tensors", f"{len(lora_A)}, as lora_A")
    for a, b in zip(lora_A, lora_B, strict=True):
        matrix("lora_B", b, out, a.shape[0], x)
    gate(scaling, gates, ranks, len(lora_A), sum(a.shape[0] for a in lora_A), x.shape[:-1], x.device)
    if column_scale is not None:
        value(tuple(column_scale.shape) == (out,), "column_scale", f"shape {tuple(column_scale.shape)}", f"({out},)")
        floating("column_scale", column_scale)
        on = column_scale.device
        value(on == x.device, "column_scale", f"a tensor on {on}", f"{x.device}, as x")


def expand(y, z, lora_B, scaling, gates, ranks, columns):
    floating("y", y)
    value(y.dim() >= 1, "y", "a 0-d tensor", "(..., out)")
    value(len(columns) in (0, 2), "columns", list(columns), "(start, stop)")
    start, stop = columns or (0, y.shape[-1])
    value(0 <= start <= stop <= y.shape[-1], "columns", (start, stop), f"0 <= start <= stop <= {y.shape[-1]}")
    for b in lora_B:
        matrix("lora_B", b, stop - start, None, y)
    R = sum(b.shape[1] for b in lora_B)
    value(tuple(z.shape) == (*y.shape[:-1], R), "z", f"shape {tuple(z.shape)}", f"{(*y.shape[:-1], R)}")
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    kind(z.dtype in (wide, y.dtype), "z", z.dtype, f"{wide} (what lora_shrink returns) or y's dtype")
    value(z.device == y.device, "z", f"a tensor on {z.device}", f"{y.device}, as y")
    gate(scaling, gates, ranks, len(lora_B), R, y.shape[:-1], y.device)
