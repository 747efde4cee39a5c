"""Inputs for the kernels and what they should give: plain torch with autograd in any type, dropout from a NumPy Philox.

On a GPU the same checks run the compiled kernels; elsewhere Triton's interpreter runs them on CPU tensors.
"""

import os
from types import SimpleNamespace

import numpy as np
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NAMES = ("x", "weight", "lora_A", "lora_B", "scaling", "bias", "gates", "column_scale")


def philox(seed, groups):
    """Philox 4x32-10 (Salmon et al. 2011) of counters (group, 0, 0): (n, 4) uint32."""
    mask = np.uint64(0xFFFFFFFF)
    groups = np.asarray(groups, np.uint64)
    c = [groups & mask, groups >> np.uint64(32), np.zeros_like(groups), np.zeros_like(groups)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(q >> np.uint64(32)) ^ c[1] ^ key[0], q & mask, (p >> np.uint64(32)) ^ c[3] ^ key[1], p & mask]
        key = [(key[0] + np.uint64(0x9E3779B9)) & mask, (key[1] + np.uint64(0xBB67AE85)) & mask]
    return np.stack(c, -1).astype(np.uint32)


def kept(seed, shape, p):
    """Which elements of a tensor dropout keeps, and their scale."""
    count, dropped = int(np.prod(shape)), round(p * 65536)
    words = philox(seed, np.arange(-(-count // 8)))
    lanes = np.stack([words & 0xFFFF, words >> 16], -1).reshape(-1)[:count]
    return torch.from_numpy((lanes >= dropped).reshape(shape)), 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def shuffle_programs(monkeypatch, seed):
    """The interpreter's programs run in another order from now on; {grid: the order} of what was launched."""
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    rng, order = torch.Generator().manual_seed(seed), {}

    def shuffled(builder, *index):
        grid = tuple(builder.grid_dim)
        if grid not in order:
            places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3)
            order[grid] = places[torch.randperm(len(places), generator=rng)].tolist()
        x, y, z = index
        builder.grid_idx = tuple(order[grid][(x * grid[1] + y) * grid[2] + z])

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", shuffled)
    assert interpreter_builder.set_grid_idx.__func__ is shuffled
    return order


def strided(t):
    """The same values with no stride of 1."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def problem(lead, K, N, ranks=(16,), dtype=torch.bfloat16, adapters=None, gates=None, bias=False, column_scale=False,
            p=0.0, layout="plain", grouped=False, seed=0):  # fmt: skip
    """Random arguments of lora_linear. gates: None, "row" (E,), "token" (…, E); layout: plain, transposed, strided."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape, to=dtype, by=1.0):
        return (torch.randn(shape, generator=rng) * by).to(to)

    R, one = sum(ranks), max(K, 1) ** -0.5
    E = len(ranks) if grouped or len(ranks) > 1 else R
    weight = draw(K, N, by=one).t() if layout == "transposed" else draw(N, K, by=one)
    call = SimpleNamespace(
        x=draw(*lead, K),
        weight=weight,
        lora_A=[draw(r, K, to=adapters or dtype, by=one) for r in ranks],
        lora_B=[draw(N, r, to=adapters or dtype, by=0.5) for r in ranks],
        scaling=torch.tensor(1.25),
        bias=draw(N) if bias else None,
        gates={None: None, "row": (E,), "token": (*lead, E)}[gates],
        ranks=list(ranks) if E != R or grouped else [],
        column_scale=1 + 0.1 * draw(N, to=torch.float32) if column_scale else None,
        dropout_p=p,
        seed=torch.tensor(0x1234_5678_9ABC_DEF) if p else None,
        dy=draw(*lead, N),
    )
    if call.gates is not None:
        call.gates = draw(*call.gates, to=torch.float32)
    if layout == "strided":
        call.x, call.weight, call.dy = strided(call.x), strided(call.weight), strided(call.dy)
        call.lora_A, call.lora_B = list(map(strided, call.lora_A)), list(map(strided, call.lora_B))
    return call


def to_device(value):
    """The tensors of an argument on the device, strides kept; a scaling of no dimension stays on the host."""
    if isinstance(value, (list, tuple)):
        return [to_device(v) for v in value]
    if not isinstance(value, torch.Tensor) or DEVICE == "cpu" or (value.dim() == 0 and value.is_floating_point()):
        return value
    out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
    return out.copy_(value)


def cast(call, dtype):
    """The call with every float in `dtype` and gradients on; adapters are rounded to x's type first, as in the op."""
    low = call.x.dtype

    def leaf(t, first=None):
        return t if t is None else t.detach().to(first or t.dtype).to(dtype).clone().requires_grad_()

    out = SimpleNamespace(**vars(call))
    for name in NAMES:
        value = getattr(call, name)
        setattr(out, name, [leaf(t, low) for t in value] if isinstance(value, list) else leaf(value))
    return out


def gate(c):
    """g (…, R)."""
    g = c.scaling if c.gates is None else c.scaling * c.gates
    return g.repeat_interleave(torch.tensor(c.ranks), -1) if c.ranks and g.dim() else g


def shrink(c):
    a = torch.cat(list(c.lora_A))
    if not c.dropout_p:
        return c.x @ a.t()
    keep, scale = kept(int(c.seed), c.x.shape, c.dropout_p)
    return (c.x * (keep.to(c.x.dtype) * scale)) @ a.t()


def linear(c):
    """(y, z, u) by plain torch."""
    z = shrink(c)
    u = c.x @ c.weight.t() + (z * gate(c)) @ torch.cat(list(c.lora_B), 1).t()
    y = u if c.column_scale is None else u * c.column_scale
    return y if c.bias is None else y + c.bias, z, u


def gradients(c, y, dy):
    """name → gradient of every float argument of the call."""
    y.backward(dy.to(y.dtype))
    leaves = {name: getattr(c, name) for name in NAMES if getattr(c, name) is not None}
    return {name: [t.grad for t in v] if isinstance(v, list) else v.grad for name, v in leaves.items()}
