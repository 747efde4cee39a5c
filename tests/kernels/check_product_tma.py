"""The product's persistent form by TMA against float64; what the interpreter cannot show stands in aot.py."""

import harness
import pytest
import torch
from check_linear import compare, run

from fastlora.kernels import config, product, tile

CASES = {
    "off every grid": dict(lead=(2, 75), K=200, N=264, ranks=(3,), gates="token", bias=True),
    "one step of K, narrow": dict(lead=(65,), K=8, N=8, ranks=(1,), gates="row"),
    "transposed, c": dict(lead=(130,), K=136, N=272, ranks=(20,), layout="transposed", bias=True, column_scale=True),
    "adapters": dict(lead=(140,), K=72, N=280, ranks=(16, 24), gates="token"),
    "rank 0": dict(lead=(70,), K=64, N=24, ranks=(0,), bias=True),
}


@pytest.fixture
def launched(monkeypatch):
    """The form is asked for; [(kernel, programs)] of the products that were launched."""
    if harness.DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    launch, seen = tile.launch, []

    def watch(kernel, grid, x, *args, **options):
        if kernel in (product._product_kernel, product._product_tma_kernel):
            seen.append((kernel, grid[0]))
        launch(kernel, grid, x, *args, **options)

    monkeypatch.setattr(tile, "FORM", "tma")
    monkeypatch.setattr(tile, "launch", watch)
    return seen


@pytest.mark.parametrize("case,sms", [*zip(CASES, [3, 132, 3, 1, 132], strict=True), (next(iter(CASES)), 132)])
def test_product(case, sms, monkeypatch, launched):
    """Forward and dx; one program for all tiles, fewer than tiles, and one for each."""
    monkeypatch.setattr(tile, "device_of", lambda x: tile.Device(90, sms))
    dtype = torch.float16 if sms == 3 else torch.bfloat16
    call = harness.problem(dtype=dtype, adapters=torch.float32 if sms == 132 else None, **CASES[case])
    compare(call, run(call))
    assert [kernel for kernel, _ in launched] == [product._product_tma_kernel] * 2
    assert sms == 132 or all(programs == sms for _, programs in launched)


@pytest.mark.parametrize("change", [
    dict(p=0.5), dict(dtype=torch.float32), dict(K=68), dict(N=68), dict(lead=(64,)), dict(layout="strided"),
], ids=str)  # fmt: skip
def test_left_to_pointers(change, launched):
    """dx with dropout; fp32, rows that do not start on 16 bytes, few tokens (a forward of its own), strides."""
    call = harness.problem(**{**dict(lead=(70,), K=64, N=64, ranks=(8,)), **change})
    compare(call, run(call))
    forward = {"p": [product._product_tma_kernel], "lead": []}.get(next(iter(change)), [product._product_kernel])
    assert [kernel for kernel, _ in launched] == [*forward, product._product_kernel]


def test_not_the_default(monkeypatch):
    """Unless it is asked for, the form is not even looked at."""
    monkeypatch.setattr(product, "_product_tma", None)
    assert tile.FORM == ""
    run(harness.problem((70,), 64, 64, (8,)))
    monkeypatch.setattr(tile, "FORM", "fast")
    assert "FASTLORA_TRITON=fast" in tile.objection(torch.ones(2))


@pytest.mark.parametrize("M,N,K,itemsize,arch,stages", [
    (8192, 4096, 4096, 2, 90, 3), (512, 4096, 4096, 2, 90, 4), (65, 8, 8, 2, 90, 4),
    (8192, 4096, 4096, 2, 80, None), (8192, 4096, 4096, 2, 100, None), (8192, 4096, 4096, 4, 90, None),
    (64, 4096, 4096, 2, 90, None), (8192, 4001, 4096, 2, 90, None), (8192, 4096, 0, 2, 90, None),
])  # fmt: skip
def test_choice(M, N, K, itemsize, arch, stages):
    c = config.product_tma(M, N, K, itemsize, arch, 132)
    assert stages == (c and c.stages)
    # the pipeline, and beside it the tile that is stored
    assert c is None or ((c.BM + c.BN) * c.BK * c.stages + c.BM * c.BN) * itemsize <= 232448


def test_describes():
    x = torch.empty(33, 64, dtype=torch.bfloat16)
    assert config.describes(x) and config.describes(x[:, 8:16]) and config.describes(x[::2])
    for t in (x[:, 1:], x.t(), x[:, ::2], x[:1].expand(9, 64), x.flatten()[:66].view(2, 33)):
        assert not config.describes(t)
