"""lora_shrink and lora_shrink_backward of the Triton back-end against float64."""

import harness
import pytest
import torch
from exactness import assert_accurate, poison

from fastlora.kernels import shrink, tile

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "plain": dict(lead=(2, 33), K=96, ranks=(16,)),
    "odd": dict(lead=(37,), K=67, ranks=(3,)),
    "one row": dict(lead=(1,), K=520, ranks=(1,)),
    "adapters": dict(lead=(19,), K=40, ranks=(3, 16, 20)),
    "strided": dict(lead=(3, 6), K=40, ranks=(8,), layout="strided"),
    "many ranks": dict(lead=(20,), K=40, ranks=(130,)),
    "dropout": dict(lead=(2, 35), K=200, ranks=(16,), p=0.25),
    "dropout, odd": dict(lead=(21,), K=67, ranks=(3, 2), p=0.5),
    "empty": dict(lead=(2, 0), K=16, ranks=(4,)),
    "no columns": dict(lead=(3,), K=0, ranks=(4,)),
    "rank 0": dict(lead=(3,), K=16, ranks=(0,)),
    "a vector": dict(lead=(), K=24, ranks=(4,), p=0.5),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_shrink(case, dtype):
    call = harness.problem(N=1, dtype=dtype, **CASES[case])
    dz = torch.randn(*call.x.shape[:-1], sum(CASES[case]["ranks"]), generator=torch.Generator().manual_seed(1))
    x, lora_A, seed, dz_ = map(harness.to_device, (call.x, call.lora_A, call.seed, dz))
    assert tile.objection(x, lora_A, call.dropout_p, seed) is None
    with poison():
        z = shrink.lora_shrink(x, lora_A, call.dropout_p, seed)
        dx, dA = shrink.lora_shrink_backward(dz_, x, lora_A, call.dropout_p, seed, [True, True])
    want = []
    for to in (torch.float64, dtype):
        c = harness.cast(call, to)
        exact = harness.shrink(c)
        exact.backward(dz.to(to))
        want.append([exact.detach(), c.x.grad, *[a.grad for a in c.lora_A]])
    got = [z, dx, *dA]
    assert z.dtype == torch.float32 and dx.dtype == dtype and all(d.dtype == dtype for d in dA)
    for actual, exact, same in zip(got, *want, strict=True):
        assert actual.shape == exact.shape
        assert_accurate(actual.cpu(), exact, same)
    assert not len(shrink.lora_shrink_backward(dz_, x, lora_A, call.dropout_p, seed, [False, True])[0])
    assert not len(shrink.lora_shrink_backward(dz_, x, lora_A, call.dropout_p, seed, [True, False])[1])
