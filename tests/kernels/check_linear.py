"""lora_linear_forward and _backward of the Triton back-end against float64."""

import harness
import pytest
import torch
from exactness import assert_accurate, poison

from fastlora.kernels import linear, tile

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "plain": dict(lead=(2, 33), K=96, N=72),
    "odd": dict(lead=(37,), K=67, N=53, ranks=(3,), bias=True),
    "one row, r = 1": dict(lead=(1,), K=100, N=1, ranks=(1,), gates="row"),
    "r = 20, transposed, bias, c": dict(
        lead=(5, 3), K=63, N=80, ranks=(20,), layout="transposed", bias=True, column_scale=True
    ),
    "token gates": dict(lead=(3, 7), K=40, N=72, ranks=(16,), gates="token"),
    "adapters, token gates": dict(lead=(19,), K=40, N=36, ranks=(3, 16, 1), gates="token", bias=True),
    "equal adapters, strided": dict(lead=(18,), K=40, N=36, ranks=(4, 4), gates="row", layout="strided"),
    "one adapter, one gate": dict(lead=(18,), K=40, N=36, ranks=(8,), gates="token", grouped=True),
    "many ranks": dict(lead=(70,), K=40, N=36, ranks=(65, 40), gates="token"),
    "dropout": dict(lead=(2, 35), K=200, N=72, ranks=(16,), p=0.25, bias=True),
    "dropout, odd, token gates": dict(lead=(21,), K=67, N=30, ranks=(3, 2), p=0.5, gates="token"),
    "dropout of all": dict(lead=(4,), K=16, N=16, ranks=(4,), p=1.0),
    "no columns of x": dict(lead=(4,), K=0, N=24, ranks=(4,), bias=True),
    "rank 0": dict(lead=(4,), K=16, N=24, ranks=(0,), bias=True),
    "a vector": dict(lead=(), K=24, N=17, ranks=(4,), gates="row", bias=True),
}
FIELDS = ("dx", "dweight", "dA", "dB", "dscaling", "dbias", "dgates", "dcolumn_scale")
ARGUMENT = dict(zip(FIELDS, harness.NAMES, strict=True))


def run(call, needs=None):
    """Both launchers on one call: name → result."""
    c = harness.SimpleNamespace(**{name: harness.to_device(value) for name, value in vars(call).items()})
    inputs, dropout = (c.x, c.weight, c.lora_A, c.lora_B, c.scaling), (c.column_scale, c.dropout_p, c.seed)
    forward = (*inputs, c.bias, c.gates, c.ranks, *dropout)
    assert tile.objection(*forward) is None
    with poison():
        y, z, u = linear.lora_linear_forward(*forward)
    needs = needs or [getattr(call, ARGUMENT[f]) is not None for f in FIELDS]
    backward = (c.dy, *inputs, c.gates, c.ranks, *dropout, z, u, needs)
    assert tile.objection(*backward) is None
    with poison():
        grads = linear.lora_linear_backward(*backward)
    return dict(y=y, z=z, u=u, **dict(zip(FIELDS, grads, strict=True)))


def compare(call, got):
    results = []
    for dtype in (torch.float64, call.x.dtype):
        c = harness.cast(call, dtype)
        y, z, u = harness.linear(c)
        grads = harness.gradients(c, y, call.dy)
        want = dict(y=y.detach(), z=z.detach(), u=u.detach())
        want.update({f: grads[name] for f, name in ARGUMENT.items() if name in grads})
        results.append(want)
    exact, same = results
    if call.column_scale is None:
        exact.pop("u")
    # One number, the rest of a sum that cancels: plain torch's error in it is luck. See test_gradient_of_one_scaling.
    if not call.scaling.dim():
        exact.pop("dscaling")
    for name, wanted in exact.items():
        pairs = (got[name], wanted, same[name])
        for actual, right, plain in zip(*pairs, strict=True) if isinstance(wanted, list) else [pairs]:
            assert actual.shape == right.shape, name
            assert_accurate(actual.cpu(), right, plain, name)
    return exact


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_linear(case, dtype):
    call = harness.problem(dtype=dtype, **CASES[case])
    got = run(call)
    compare(call, got)
    assert got["y"].dtype == dtype and got["z"].dtype == torch.float32
    grads = got["dA"] + got["dB"]
    assert all(d.dtype == dtype and d.is_contiguous() for d in grads)
    # Memory of their own: a caller may write into one of them.
    assert len({d.untyped_storage().data_ptr() for d in grads if d.numel()}) == sum(d.numel() > 0 for d in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_adapters(dtype):
    """fp32 adapters beside a 16-bit base give fp32 gradients."""
    call = harness.problem((40,), 96, 72, (8, 5), dtype, adapters=torch.float32, gates="row", p=0.1)
    got = run(call)
    compare(call, got)
    assert all(d.dtype == torch.float32 for d in got["dA"] + got["dB"])


def test_large_tiles(monkeypatch):
    """The tile of large shapes, more than one of them, with rows and columns that do not fill the last."""
    monkeypatch.setattr(tile, "device_of", lambda x: tile.Device(90, 1))
    call = harness.problem((140,), 130, 264, (16,), gates="token", p=0.25)
    compare(call, run(call))


def test_scaling_on_the_device():
    """A scaling for each adapter, and one of no dimension that the host must not read."""
    call = harness.problem((9,), 32, 24, (2, 3), gates="token")
    call.scaling = torch.tensor([0.5, 2.0])
    call.gates = call.gates.double()
    compare(call, run(call))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_of_one_scaling(dtype):
    """Sixteen draws together, which no luck makes exact."""
    got, exact, plain = [], [], []
    for seed in range(16):
        call = harness.problem((9,), 32, 24, (2, 3), dtype, gates=("row", "token", None)[seed % 3], seed=seed)
        got.append(run(call, [f == "dscaling" for f in FIELDS])["dscaling"])
        for results, to in ((exact, torch.float64), (plain, dtype)):
            c = harness.cast(call, to)
            results.append(harness.gradients(c, harness.linear(c)[0], call.dy)["scaling"])
    assert got[0].shape == () and got[0].dtype == torch.float32 and got[0].device.type == "cpu"
    assert_accurate(torch.stack(got), torch.stack(exact), torch.stack(plain).to(dtype))


def test_broadcast_dy():
    """The gradient of a sum has a stride of 0 everywhere."""
    call = harness.problem((3, 5), 32, 24, (2,), torch.float32)
    call.dy = torch.ones(1, 1, 1).expand(3, 5, 24)
    compare(call, run(call))


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty_batch(lead):
    call = harness.problem(lead, 32, 24, (4,), bias=True)
    got = run(call)
    assert got["y"].shape == (*lead, 24) and got["dx"].shape == (*lead, 32)
    assert all(not got[name][0].any() and got[name][0].numel() for name in ("dA", "dB"))


@pytest.mark.parametrize("wanted", ["dx", "dA", "dB", "dgates"])
def test_only_what_is_needed(wanted):
    call = harness.problem((9,), 32, 24, (4,), torch.float32, gates="token")
    got = run(call, [f == wanted for f in FIELDS])
    every = run(call)
    for name in FIELDS:
        mine, full = got[name], every[name]
        if name == wanted:
            assert torch.equal(torch.cat([*mine]), torch.cat([*full]))
        else:
            assert not len(mine)


def test_twice_the_same():
    call = harness.problem((300,), 64, 40, (16,), p=0.1)
    first, second = run(call), run(call)
    assert all(torch.equal(first[n], second[n]) for n in ("y", "z", "dx"))
    assert all(torch.equal(first[n][0], second[n][0]) for n in ("dA", "dB"))
