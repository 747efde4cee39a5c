"""lora_expand and lora_expand_backward of the Triton back-end against float64."""

import harness
import pytest
import torch
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
}
NAMES = ("y", "z", "lora_B", "scaling", "gates")


def by_torch(call, y, z, dy, columns, to):
    """(result, gradients of NAMES) by autograd in one type."""
    start, stop = columns or (0, y.shape[-1])
    c = harness.cast(call, to)
    low = call.x.dtype if to != torch.float64 else torch.float64
    y, z = y.to(to).requires_grad_(), z.to(low).to(to).requires_grad_()
    delta = (z * harness.gate(c)) @ torch.cat(list(c.lora_B), 1).t()
    out = torch.cat([y[..., :start], y[..., start:stop] + delta, y[..., stop:]], -1)
    out.backward(dy.to(to))
    gates = None if c.gates is None else c.gates.grad
    return out.detach(), [z.grad, [b.grad for b in c.lora_B], c.scaling.grad, gates]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_expand(case, dtype):
    fields = dict(CASES[case])
    columns, N = fields.pop("columns", []), fields.pop("N")
    call = harness.problem(K=1, N=columns[1] - columns[0] if columns else N, dtype=dtype, **fields)
    rng = torch.Generator().manual_seed(1)
    if call.gates is None:
        call.scaling = torch.rand(sum(fields["ranks"]), generator=rng)
    y, dy = (torch.randn(*fields["lead"], N, generator=rng).to(dtype) for _ in range(2))
    z = torch.randn(*fields["lead"], sum(fields["ranks"]), generator=rng)
    if fields.get("layout") == "strided":
        y, z, dy = harness.strided(y), harness.strided(z), harness.strided(dy)
    y_, z_, B, scaling, gates, dy_ = map(harness.to_device, (y, z, call.lora_B, call.scaling, call.gates, dy))
    shared = (z_, B, scaling, gates, call.ranks, columns)
    assert tile.objection(y_, *shared) is None
    before = y_.clone()
    needs = [True, True, True, gates is not None]
    with poison():
        got = expand.lora_expand(y_, *shared)
        grads = expand.lora_expand_backward(dy_, *shared, needs)
    assert torch.equal(y_, before) and (got.data_ptr() != y_.data_ptr() or not y.numel())
    (exact, exact_grads), (same, same_grads) = (by_torch(call, y, z, dy, columns, to) for to in (torch.float64, dtype))
    assert got.dtype == dtype and grads[0].dtype == torch.float32 and all(b.dtype == dtype for b in grads[1])
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
    shared = [harness.to_device(t) for t in (dy, z, call.lora_B, call.scaling, call.gates, [], [])]
    every = expand.lora_expand_backward(*shared, [True] * 4)
    got = expand.lora_expand_backward(*shared, [i == wanted for i in range(4)])
    for i, (mine, full) in enumerate(zip(got, every, strict=True)):
        if i == wanted:
            assert torch.equal(*(torch.atleast_1d(*[t]) if isinstance(t, torch.Tensor) else t[0] for t in (mine, full)))
        else:
            assert not len(mine)
