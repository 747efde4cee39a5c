"""The forward of few tokens, one launch with K split over programs, against float64."""

import harness
import pytest
import torch
from check_linear import compare, run
from exactness import poison

from fastlora.kernels import decode, linear, tile

CASES = {
    "one token": dict(lead=(1,), K=1000, N=70, ranks=(3,), bias=True),
    "gates of tokens": dict(lead=(3, 7), K=520, N=130, ranks=(4, 8), gates="token", column_scale=True),
    "fp32 adapters": dict(lead=(33,), K=384, N=64, ranks=(16,), adapters=torch.float32, gates="row"),
    "transposed": dict(lead=(64,), K=300, N=65, ranks=(32,), layout="transposed", bias=True),
    "strided": dict(lead=(5,), K=257, N=40, ranks=(1,), layout="strided"),
}


def forward(call):
    c = harness.SimpleNamespace(**{name: harness.to_device(value) for name, value in vars(call).items()})
    inputs = c.x, c.weight, c.lora_A, c.lora_B, c.scaling, c.bias, c.gates, c.ranks, c.column_scale, 0.0, None
    return linear.lora_linear_forward(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_decode(case, dtype, monkeypatch):
    launched = []
    launch = tile.launch
    monkeypatch.setattr(tile, "launch", lambda kernel, *args, **o: launched.append(o) or launch(kernel, *args, **o))
    call = harness.problem(dtype=dtype, **CASES[case])
    compare(call, run(call))
    assert launched[0]["SPLITS"] > 1, "nothing was split"
    assert not any(counters.any() for counters in tile._counters.values())


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="a GPU orders its programs itself")
def test_any_order_of_programs(monkeypatch):
    call = harness.problem(**CASES["gates of tokens"])
    want = forward(call)
    for seed in range(2):
        order = harness.shuffle_programs(monkeypatch, seed)
        got = forward(call)
        assert len(order) == 1 and all(map(torch.equal, got, want))


def test_only_the_last_adds(monkeypatch):
    """Counters that start one behind: nobody is the last, so nothing is stored and no counter is reset."""
    call = harness.problem(**CASES["one token"])
    tickets = harness.to_device(torch.full((2,), -1, dtype=torch.int32))
    monkeypatch.setattr(tile, "tickets", lambda count, x: tickets)
    with poison():
        y, z, _ = forward(call)
    assert y.isnan().all() and z.isnan().all() and tickets[0] == tickets[1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parts_that_cancel(dtype):
    """The second half of K undoes the first but for noise: z is far smaller than its parts."""
    call = harness.problem((3,), 1024, 64, (8,), dtype)
    half, noise = 100 * call.x[:, :512], call.x[:, 512:].clone()
    call.x[:, :512], call.x[:, 512:] = half, noise - half
    for t in (call.weight, call.lora_A[0]):
        t[:, 512:] = t[:, :512]
    compare(call, run(call))


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
def test_rows_far_apart():
    """Offsets beyond 2^31 elements."""
    call = harness.problem((3,), 16, 24, (4,), torch.float16)
    far = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((3, 16), (2**30, 1))
    call.x = far.copy_(call.x)
    y, _, _ = forward(call)
    call.x = call.x.contiguous()
    assert torch.equal(y, forward(call)[0])


def test_what_fits():
    """Few tokens with a rank that one tile holds; more of either takes two launches."""
    assert decode.fits(1, 8, 8, 1) and decode.fits(64, 8, 8, 32)
    more = (65, 8, 8, 1), (0, 8, 8, 1), (1, 8, 8, 33), (1, 8, 8, 0), (1, 8, 0, 1), (1, 0, 8, 1)
    assert not any(decode.fits(*shape) for shape in more)
