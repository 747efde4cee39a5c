"""lora_embedding's launcher against float64: torch's embedding of each table, and the formula."""

import harness
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_accurate, poison

from fastlora.kernels import expand, tile

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
    "int32": dict(lead=(70,), N=24, ranks=(4,), to=torch.int32),
    "empty": dict(lead=(2, 0), N=16, ranks=(4,)),
    "empty, adapters": dict(lead=(0,), N=16, ranks=(4, 2), gates="token"),
    "no columns": dict(lead=(5,), N=0, ranks=(4,), gates="token"),
    "rank 0": dict(lead=(3,), N=16, ranks=(0,)),
    "a vector": dict(lead=(), N=24, ranks=(4,), gates="token"),
}


def problem(lead, N, V=11, to=torch.int64, **fields):
    """Arguments of the launcher."""
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
    return c


def by_torch(call, to):
    c = harness.cast(call, to)
    z = torch.cat([F.embedding(c.ids, a.t()) for a in c.lora_A], -1)
    return (c.y.to(to) + (z * harness.gate(c)) @ torch.cat(list(c.lora_B), 1).t()).detach()


def run(c):
    y, *shared = map(harness.to_device, (c.y, c.ids, c.lora_A, c.lora_B, c.scaling, c.gates))
    assert tile.objection(y, *shared, c.ranks, -1, False) is None
    before = y.clone()
    with poison():
        out = expand.lora_embedding(y, *shared, c.ranks, -1, False)
    assert torch.equal(y, before) and (out.data_ptr() != y.data_ptr() or not y.numel()) and out.is_contiguous()
    return out.cpu()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_embedding(case, dtype):
    c = problem(**CASES[case], dtype=dtype)
    out = run(c)
    assert out.dtype == dtype
    assert_accurate(out, by_torch(c, torch.float64), by_torch(c, dtype))


@pytest.mark.parametrize("ranks", [(8,), (4, 3)])
def test_master_adapters(ranks):
    c = problem((33,), 40, ranks=ranks, adapters=torch.float32, gates="token")
    assert_accurate(run(c), by_torch(c, torch.float64), by_torch(c, c.x.dtype))


@pytest.mark.parametrize("ranks", [(8,), (70,)])
def test_ids_that_the_table_has_not(ranks):
    """y is as it was there."""
    c = problem((30,), 40, ranks=ranks, dtype=torch.float32, gates="token")
    c.ids[::3] = torch.tensor([-1, 11, 2**40, -(2**40), 12, -11, 11, 99, 2**31, 11])
    out, wrong = run(c), torch.arange(30) % 3 == 0
    assert torch.equal(out[wrong], c.y[wrong])
    for name in ("y", "gates", "ids"):
        setattr(c, name, getattr(c, name)[~wrong])
    assert torch.equal(out[~wrong], run(c))
