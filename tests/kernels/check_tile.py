"""What is decided on the host: objections, tiles, the order of sums."""

import harness
import pytest
import torch
import triton
import triton.language as tl

from fastlora.kernels import config, tile


def test_objections(monkeypatch):
    x, scaling = harness.to_device(torch.zeros(2, 3)), torch.tensor(1.0, dtype=torch.float64)
    assert tile.objection(x, [x], scaling, None, 0.5) is None
    assert "float64" in tile.objection(x.double(), [x])
    assert "meta" in tile.objection(x, [x, x.to("meta")])
    assert "meta" in tile.objection(x, [x], 0.5, torch.empty((), dtype=torch.int64, device="meta"))
    monkeypatch.setattr(tile, "_unsupported", tile._unsupported.__wrapped__)
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1" in tile.objection(x)
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    assert tile.objection(x) is None
    monkeypatch.setattr(tile, "INTERPRETED", False)
    x = x.cpu()
    assert "GPU" in tile.objection(x, x, [x], [x], scaling, None, None, [], None, 0.0, None)


@pytest.mark.parametrize("arch,shared", [(80, 166912), (86, 101376), (90, 232448), (100, 232448), (120, 101376)])
@pytest.mark.parametrize("M", [1, 16, 17, 64, 65, 512, 8192])
@pytest.mark.parametrize("N", [1, 576, 4096, 14336])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit(M, N, itemsize, arch, shared):
    """The pipeline of the GEMM's operands fits in the shared memory of a block."""
    c = config.linear(M, N, itemsize, arch, 132)
    assert c.stages * (c.BM + c.BN) * c.BK * itemsize <= shared
    assert 128 * 32 * c.warps >= c.BM * c.BN


@pytest.mark.parametrize("programs,steps", [(1, 1), (1, 1000), (32, 64), (500, 64), (3, 2)])
def test_splits(programs, steps):
    count = config.splits(programs, steps, 132)
    assert 1 <= count <= min(32, steps)
    assert count == 1 or programs < 264
    # Every part has something to add.
    assert (count - 1) * config.cdiv(steps, count) < steps
    assert programs * count >= min(132, programs * min(32, steps) / 2)


@pytest.mark.parametrize("R,block", [(0, 0), (1, 16), (16, 16), (17, 32), (64, 64), (65, 64)])
def test_rank_block(R, block):
    assert config.rank_block(R) == block


def test_threshold():
    assert tile.dropout(0.5, "seed") == ("seed", 32768, 2.0)
    assert tile.dropout(1.0, "seed") == ("seed", 65536, 0.0)
    assert tile.dropout(1e-9, "seed") == ("seed", 0, 1.0)
    assert tile.dropout(0.0, None) == (None, 0, 1.0)


@triton.jit
def _order_kernel(out, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    row, column = tl.swizzle2d(0, tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize("tall,wide", [(1, 1), (3, 5), (8, 2), (9, 3), (20, 4)])
def test_every_tile_once(tall, wide):
    """In groups of 8 rows of tiles, the last group shorter."""
    out = harness.to_device(torch.full((tall * wide, 2), -1, dtype=torch.int32))
    tile.launch(_order_kernel, (tall * wide,), out, out, 16 * tall - 3, 16 * wide, BM=16, BN=16, GROUP=8)
    order = [tuple(pair) for pair in out.tolist()]
    assert sorted(order) == [(row, column) for row in range(tall) for column in range(wide)]
    assert order == sorted(order, key=lambda pair: (pair[0] // 8, pair[1], pair[0]))
