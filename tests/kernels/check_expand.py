"""lora_expand and lora_expand_backward of the Triton back-end against float64."""

import harness
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_accurate, poison

from fastlora.kernels import expand, tile

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "plain": dict(lead=(2, 33), N=72, ranks=(16,)),
    "odd": dict(lead=(37,), N=53, ranks=(3,)),
    "one row": dict(lead=(1,), N=520, ranks=(1,), gates="row"),
    "columns": dict(lead=(19,), N=40, ranks=(20,), columns=[7, 30], gates="token"),
    "columns of wide y": dict(lead=(19,), N=300, ranks=(4,), columns=[150, 180]),
    "adapters": dict(lead=(19,), N=40, ranks=(3, 16, 1), gates="token"),
    "no rank among them": dict(lead=(33,), N=300, ranks=(1, 3, 8, 0, 70), gates="token"),
    "hundreds of adapters": dict(lead=(5,), N=24, ranks=(1, 2) * 150, gates="token"),
    "gates of rank rows": dict(lead=(2, 19), N=40, ranks=(70,), gates="token"),
    "strided adapters": dict(lead=(3, 6), N=40, ranks=(2, 5, 2), gates="row", layout="strided"),
    "strided": dict(lead=(3, 6), N=40, ranks=(8,), layout="strided"),
    "many ranks": dict(lead=(20,), N=40, ranks=(130,), gates="row"),
    "empty": dict(lead=(2, 0), N=16, ranks=(4,)),
    "empty, adapters": dict(lead=(2, 0), N=16, ranks=(4, 3), gates="row"),
    "no columns": dict(lead=(5,), N=16, ranks=(4, 3), gates="token", columns=[3, 3]),
    "ranks 0": dict(lead=(3,), N=16, ranks=(0, 0), gates="token"),
    "rank 0": dict(lead=(3,), N=16, ranks=(0,)),
    "a vector": dict(lead=(), N=24, ranks=(4,), gates="token"),
    "a table": dict(lead=(2, 33), N=300, ranks=(16,), table=11, gates="token", columns=[3, 261]),
    "a table, one row": dict(lead=(1,), N=53, ranks=(3,), table=1),
    "a table, many ranks": dict(lead=(20,), N=40, ranks=(130,), table=7, gates="row"),
    "a table, adapters": dict(lead=(19,), N=40, ranks=(3, 16, 1, 0), table=9, gates="token"),
    "a table, strided": dict(lead=(3, 6), N=40, ranks=(8,), table=9, layout="strided", gates="token"),
    "a table, empty": dict(lead=(2, 0), N=16, ranks=(4,), table=3),
    "a table, a vector": dict(lead=(), N=24, ranks=(4,), table=5, gates="token"),
}
NAMES = ("y", "z", "lora_B", "scaling", "gates")


def by_torch(call, y, z, dy, columns, ids, to):
    """(result, gradients of NAMES) by autograd in one type."""
    start, stop = columns or (0, y.shape[-1])
    c = harness.cast(call, to)
    low = call.x.dtype if to != torch.float64 else torch.float64
    y, z = y.to(to).requires_grad_(), z.to(low).to(to).requires_grad_()
    delta = ((z if ids is None else F.embedding(ids, z)) * harness.gate(c)) @ torch.cat(list(c.lora_B), 1).t()
    out = torch.cat([y[..., :start], y[..., start:stop] + delta, y[..., stop:]], -1)
    out.backward(dy.to(to))
    gates = None if c.gates is None else c.gates.grad
    return out.detach(), [z.grad, [b.grad for b in c.lora_B], c.scaling.grad, gates]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_expand(case, dtype):
    fields = dict(CASES[case])
    columns, N, table = fields.pop("columns", []), fields.pop("N"), fields.pop("table", 0)
    call = harness.problem(K=1, N=columns[1] - columns[0] if columns else N, dtype=dtype, **fields)
    rng = torch.Generator().manual_seed(1)
    if call.gates is None:
        call.scaling = torch.rand(sum(fields["ranks"]), generator=rng)
    y, dy = (torch.randn(*fields["lead"], N, generator=rng).to(dtype) for _ in range(2))
    z = torch.randn(*((table,) if table else fields["lead"]), sum(fields["ranks"]), generator=rng)
    ids = torch.randint(table, fields["lead"], generator=rng) if table else None
    if table and dtype == torch.float16:
        ids, z = ids.int(), z.to(dtype)
    if fields.get("layout") == "strided":
        y, z, dy = harness.strided(y), harness.strided(z), harness.strided(dy)
        ids = None if ids is None else torch.stack([ids, ids], -1)[..., 0]
    y_, z_, B, scaling, gates, dy_ = map(harness.to_device, (y, z, call.lora_B, call.scaling, call.gates, dy))
    shared = (z_, B, scaling, gates, call.ranks, columns, None if ids is None else harness.to_device(ids))
    assert tile.objection(y_, *shared) is None
    before = y_.clone()
    needs = [True, True, True, gates is not None]
    with poison():
        got = expand.lora_expand(y_, *shared)
        grads = expand.lora_expand_backward(dy_, *shared, needs)
    assert torch.equal(y_, before) and (got.data_ptr() != y_.data_ptr() or not y.numel())
    (exact, exact_grads), (same, same_grads) = (
        by_torch(call, y, z, dy, columns, ids, to) for to in (torch.float64, dtype)
    )
    assert got.dtype == dtype and grads[0].dtype == z.dtype and all(b.dtype == dtype for b in grads[1])
    for actual, right, plain in zip((got, *grads), (exact, *exact_grads), (same, *same_grads), strict=True):
        if isinstance(actual, list):
            pairs = zip(actual, right, plain, strict=True)
        else:
            # No gates, no gradient; a scaling of no dimension is one number, checked in check_linear.py.
            pairs = [(actual, right, plain)] if right is not None and right.dim() else []
        for a, e, s in pairs:
            assert a.shape == e.shape
            assert_accurate(a.cpu(), e, s)


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_is_needed(wanted):
    call = harness.problem((9,), 1, 24, (4,), torch.float32, gates="token")
    z, dy = torch.randn(9, 4), torch.randn(9, 24)
    shared = [harness.to_device(t) for t in (dy, z, call.lora_B, call.scaling, call.gates, [], [], None)]
    every = expand.lora_expand_backward(*shared, [True] * 4)
    got = expand.lora_expand_backward(*shared, [i == wanted for i in range(4)])
    for i, (mine, full) in enumerate(zip(got, every, strict=True)):
        if i == wanted:
            assert torch.equal(*(torch.atleast_1d(*[t]) if isinstance(t, torch.Tensor) else t[0] for t in (mine, full)))
        else:
            assert not len(mine)


def test_ids_that_the_table_has_not():
    """y is as it was there."""
    call = harness.problem((30,), 1, 40, (8,), torch.float32, gates="token")
    y, table, ids = torch.randn(30, 40), torch.randn(11, 8), torch.arange(30) % 11
    ids[::3] = torch.tensor([-1, 11, 2**40, -(2**40), 12, -11, 11, 99, 2**31, 11])
    run = [harness.to_device(t) for t in (y, table, call.lora_B, call.scaling, call.gates, [], [], ids)]
    out, wrong = expand.lora_expand(*run).cpu(), torch.arange(30) % 3 == 0
    few = [
        harness.to_device(t)
        for t in (y[~wrong], table, call.lora_B, call.scaling, call.gates[~wrong], [], [], ids[~wrong])
    ]
    assert torch.equal(out[wrong], y[wrong]) and torch.equal(out[~wrong], expand.lora_expand(*few).cpu())
