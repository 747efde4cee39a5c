"""lora_embedding's launchers against float64: torch's embedding of each table, and the formula."""

import harness
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_accurate, poison

from fastlora.kernels import embedding, tile

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "plain": dict(lead=(2, 33), N=72, ranks=(16,)),
    "odd, one row": dict(lead=(1,), N=53, ranks=(3,), V=1),
    "many columns": dict(lead=(37,), N=300, ranks=(5,), gates="row"),
    "token gates": dict(lead=(3, 7), N=40, ranks=(16,), gates="token"),
    "many ranks": dict(lead=(20,), N=40, ranks=(130,), gates="row"),
    "adapters": dict(lead=(19,), N=40, ranks=(3, 16, 1, 0), gates="token"),
    "strided": dict(lead=(3, 6), N=40, ranks=(8,), layout="strided", gates="token"),
    "strided adapters": dict(lead=(3, 6), N=40, ranks=(2, 5), layout="strided", gates="row"),
    "padding": dict(lead=(40,), N=24, ranks=(4,), padding=3),
    "frequencies": dict(lead=(2, 40), N=24, ranks=(4, 2), gates="row", padding=0, frequencies=True),
    "int32": dict(lead=(70,), N=24, ranks=(4,), to=torch.int32),
    "empty": dict(lead=(2, 0), N=16, ranks=(4,)),
    "empty, adapters": dict(lead=(0,), N=16, ranks=(4, 2), gates="token"),
    "no columns": dict(lead=(5,), N=0, ranks=(4,), gates="token"),
    "rank 0": dict(lead=(3,), N=16, ranks=(0,)),
    "a vector": dict(lead=(), N=24, ranks=(4,), gates="token"),
}


def problem(lead, N, V=11, padding=-1, frequencies=False, to=torch.int64, **fields):
    """Arguments of both launchers but z and dy, y and dy."""
    c = harness.problem(lead, V, N, **fields)
    rng = torch.Generator().manual_seed(2)
    c.ids = torch.randint(V, lead, generator=rng).to(to)
    c.y = torch.randn(*lead, N, generator=rng).to(c.x.dtype)
    if fields.get("layout") == "strided":
        c.y, c.ids = harness.strided(c.y), torch.stack([c.ids, c.ids], -1)[..., 0]
    # Values of size 1, of which a table's column is one.
    c.lora_A = [a * V**0.5 for a in c.lora_A]
    if c.gates is None:
        c.scaling = torch.rand(sum(c.ranks) or fields["ranks"][0], generator=rng)
    c.options = padding, frequencies
    return c


def by_torch(call, to):
    """(result, z, gradients) by autograd in one type."""
    c, (padding, frequencies) = harness.cast(call, to), call.options
    options = dict(padding_idx=None if padding < 0 else padding, scale_grad_by_freq=frequencies)
    z = torch.cat([F.embedding(c.ids, a.t(), **options) for a in c.lora_A], -1)
    out = c.y.to(to) + (z * harness.gate(c)) @ torch.cat(list(c.lora_B), 1).t()
    out.backward(c.dy.to(to))
    gates = None if c.gates is None else c.gates.grad
    return out.detach(), z.detach(), [a.grad for a in c.lora_A], [b.grad for b in c.lora_B], c.scaling.grad, gates


def run(c, needs=None):
    y, dy, *shared = map(harness.to_device, (c.y, c.dy, c.ids, c.lora_A, c.lora_B, c.scaling, c.gates))
    shared += [c.ranks, *c.options]
    assert tile.objection(y, *shared) is None
    before = y.clone()
    with poison():
        out, z = embedding.lora_embedding_forward(y, *shared)
        needs = needs or [True, True, True, c.gates is not None]
        grads = embedding.lora_embedding_backward(dy, *shared, z, needs)
    assert torch.equal(y, before) and (out.data_ptr() != y.data_ptr() or not y.numel()) and out.is_contiguous()
    return out, z, *grads


def pairs_of(*results):
    """Tensor by tensor; a scaling of no dimension is one number, checked in check_linear.py."""
    for part in zip(*results, strict=True):
        if isinstance(part[1], list):
            yield from zip(*part, strict=True)
        elif part[1] is not None and part[1].dim():
            yield part


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_embedding(case, dtype):
    c = problem(**CASES[case], dtype=dtype)
    got = run(c)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert all(t.dtype == dtype and t.is_contiguous() for t in (*got[2], *got[3]))
    for actual, exact, plain in pairs_of(got, by_torch(c, torch.float64), by_torch(c, dtype)):
        assert_accurate(actual.cpu(), exact, plain)


@pytest.mark.parametrize("ranks", [(8,), (4, 3)])
def test_master_adapters(ranks):
    c = problem((33,), 40, ranks=ranks, adapters=torch.float32, gates="token")
    got = run(c)
    assert all(t.dtype == torch.float32 for t in (*got[2], *got[3]))
    # z is gathered from the masters themselves.
    z = torch.cat([F.embedding(c.ids, a.t()) for a in c.lora_A], -1)
    assert torch.equal(got[1].cpu(), z)
    for actual, exact, plain in pairs_of(got, by_torch(c, torch.float64), by_torch(c, c.x.dtype)):
        assert_accurate(actual.cpu().float(), exact, plain)


@pytest.mark.parametrize("ranks", [(8,), (4, 3), (70,)])
def test_ids_that_no_table_has(ranks):
    """z is 0 there, y as it was, and neither adapter sees the token."""
    c = problem((30,), 40, ranks=ranks, dtype=torch.float32, gates="token", padding=2)
    c.ids[::3] = torch.tensor([-1, 11, 2**40, -(2**40), 12, -11, 11, 99, 2**31, 11])
    out, z, dA, dB, _, dgates = run(c)
    wrong = torch.arange(30) % 3 == 0
    assert torch.equal(out[wrong].cpu(), c.y[wrong]) and not z[wrong].any() and not dgates[wrong].any()
    for name in ("y", "dy", "gates", "ids"):
        setattr(c, name, getattr(c, name)[~wrong])
    for mine, right in zip((*dA, *dB), (*(few := run(c))[2], *few[3]), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_is_needed(wanted):
    c = problem((9,), 24, ranks=(4,), dtype=torch.float32, gates="token")
    every, got = run(c)[2:], run(c, [i == wanted for i in range(4)])[2:]
    for i, (mine, full) in enumerate(zip(got, every, strict=True)):
        if i == wanted:
            assert torch.equal(*(torch.atleast_1d(*[t]) if isinstance(t, torch.Tensor) else t[0] for t in (mine, full)))
        else:
            assert not len(mine)
