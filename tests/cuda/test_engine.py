"""The emulator's verdicts: it must object to each planted fault, in one of eight schedules, and to nothing else."""

import ctypes
import re

import harness
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(harness.DEVICE != "cpu", reason="about the emulator")
RIGHT = None
# name: (case, blocks, what the plain build says, what the checked build says)
VERDICTS = {
    "shuffles": (0, 3, RIGHT, RIGHT),
    "exchange in a warp": (1, 3, RIGHT, RIGHT),
    "exchange in a warp without __syncwarp": (2, 1, RIGHT, "never written|race in shared"),
    "exchange between warps with __syncwarp": (3, 1, RIGHT, "never written|race in shared"),
    "exchange in a block": (4, 3, RIGHT, RIGHT),
    "two barriers that are not one": (5, 1, "divergent __syncthreads", "divergent __syncthreads"),
    "a thread that skips the barrier": (6, 1, "returned", "returned"),
    "a warp in two instructions": (7, 1, "divergent warp", "divergent warp"),
    "half a warp": (8, 1, "returned|deadlock", "returned|deadlock"),
    "last arriver": (9, 6, RIGHT, RIGHT),
    "last arriver, all threads fence": (10, 6, RIGHT, RIGHT),
    "last arriver without release": (11, 6, RIGHT, "race in global"),
    "last arriver without acquire": (12, 6, RIGHT, "race in global"),
    "last arriver without a barrier before": (13, 6, RIGHT, "race in global"),
    "last arriver without a barrier after": (14, 6, RIGHT, "never written|race in shared"),
    "last arriver through the read-only path": (15, 6, RIGHT, "read-only path"),
    "atomic increments": (16, 4, RIGHT, RIGHT),
    "plain increments": (17, 2, RIGHT, "race in global"),
    "write past a buffer": (18, 1, RIGHT, "outside every buffer|cross the end"),
    "read past a shared array": (19, 1, RIGHT, "outside every array"),
    "read of unwritten shared memory": (20, 1, RIGHT, "never written"),
    "write to an input": (21, 1, RIGHT, "only read"),
    "misaligned read": (22, 1, RIGHT, "misaligned"),
    "ring": (23, 1, RIGHT, RIGHT),
    "ring without a wait": (24, 1, "values", "cp.async to it is under way"),
    "ring, waiting for the step before": (25, 1, "values", "cp.async to it is under way"),
    "ring without a barrier": (26, 1, "values", "cp.async to it is under way|never written|race in shared"),
    "ring filled before the barrier": (27, 1, "values", "race in shared|under way"),
    "ldmatrix and mma": (28, 1, RIGHT, RIGHT),
    "write past dynamic shared memory": (30, 1, "beyond its 16384 bytes", "outside every array"),
    "cp.async off the grid": (31, 1, "misaligned", "misaligned"),
    "all threads write one place": (32, 1, RIGHT, "race in shared"),
    "cp.async past shared memory": (33, 1, "outside dynamic", "outside dynamic"),
}
SIZE = 2048


class Probe(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("input", ctypes.c_void_p),
        ("which", ctypes.c_int),
    ]


def run(library, which, blocks, schedule, values=None):
    """(what the emulator says or None, data, counters, bank conflicts)."""
    # more room than is declared: one case writes past the end
    data, count, given = (torch.zeros(2 * n, dtype=torch.int32)[:n] for n in (SIZE, 2, 1024))
    given[:] = torch.arange(1024, dtype=torch.int32) if values is None else values
    library.declare({"data": (data, 1), "count": (count, 1), "input": (given, 0)}, schedule)
    probe = Probe(data.data_ptr(), count.data_ptr(), given.data_ptr(), which)
    status = library.library.launch_engine(ctypes.byref(probe), blocks, 0)
    heard = library.sentence(library.constants["FASTLORA_CUDA"] + status) if status else None
    return heard, data.numpy(), count.numpy(), library.library.emulate_conflicts()


def right(which, blocks, data, count):
    """Whether a case that has values has the right ones."""
    t = np.arange(64)
    expected = {
        0: (t % 32 ^ 5) + 300, 1: t ^ 31, 4: t ^ 33,
        9: (t + 1) % 64 * blocks, 10: (t + 1) % 64 * blocks,
    }  # fmt: skip
    ring = sum(step * 256 + (t * 4 + 5) % 256 for step in range(4))
    expected |= dict.fromkeys((23, 24, 25, 26, 27), ring)
    if which == 16:
        return count[1] == 64 * blocks
    return which not in expected or (data[:64] == expected[which]).all() and not count[0]


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name, mode):
    which, blocks, *verdicts = VERDICTS[name]
    wanted, heard = verdicts[mode == "checked"], []
    for schedule in range(8):
        sentence, data, count, _ = run(harness.library(mode), which, blocks, schedule)
        heard.append(sentence or (None if right(which, blocks, data, count) else "values"))
    if wanted is RIGHT and verdicts[1] is RIGHT:
        assert not any(heard), heard
    elif wanted is not RIGHT:
        assert any(heard), "nothing was found"
        assert all(re.search(wanted, h) for h in heard if h), heard


def test_matrices():
    """Fragments and products are those of the PTX ISA, written here as whole matrices."""
    values = np.random.default_rng(0).integers(-3, 4, (32, 8)).astype(np.float32)
    bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.int32).reshape(-1)
    given = torch.zeros(1024, dtype=torch.int32)
    given[:128] = bits
    _, data, _, conflicts = run(harness.library("plain"), 28, 1, 3, given)
    assert conflicts == 0
    lanes = data[: 32 * 12].reshape(32, 12)
    fragments = torch.from_numpy(lanes[:, :8].copy()).view(torch.bfloat16).float().numpy().reshape(32, 2, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            m = values[matrix * 8 : matrix * 8 + 8]
            assert (fragments[lane, 0, matrix] == m[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]).all()
            assert (fragments[lane, 1, matrix] == m[lane % 4 * 2 : lane % 4 * 2 + 2, lane // 4]).all()
    a = np.block([[values[:8], values[16:24]], [values[8:16], values[24:]]])
    product = a @ np.concatenate([values[:8], values[8:16]])
    for lane in range(32):
        rows, columns = [lane // 4] * 2 + [lane // 4 + 8] * 2, [lane % 4 * 2, lane % 4 * 2 + 1] * 2
        assert (lanes[lane, 8:] == product[rows, columns] + [1, 2, 3, 4]).all()


def test_conflicts_are_counted():
    """Rows of 128 bytes without a swizzle lie in the same banks: seven passes more for each of four matrices."""
    *_, conflicts = run(harness.library("plain"), 29, 1, 0)
    assert conflicts == 2 * 2 * 4 * 7


def test_structs_are_read_from_the_header():
    constants, structs = harness.declarations(harness.KERNELS / "params.h")
    assert constants["FASTLORA_NO_DEVICE"] == 1 and constants["FASTLORA_CUDA"] == 1000
    fields = dict(structs["LinearParams"]._fields_)
    assert fields["parts"]._length_ == constants["FASTLORA_PARTS"] and fields["m"] is ctypes.c_longlong
    assert fields["bias"] is ctypes.c_void_p and ctypes.sizeof(structs["Matrix"]) == 16
