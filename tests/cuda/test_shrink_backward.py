"""da on the emulator, against float64: values, masks, the order of sums, counters, workspace, refusals."""

import functools
from dataclasses import dataclass, replace

import harness
import pytest
import torch
from harness import SEED, assert_close, mask, set_matrix, set_parts

from fastlora.ops.dropout import scale
from fastlora.ops.shrink import lora_shrink_backward_reference

SCHEDULES = {"plain": (0, 1, 2, 3, 7), "checked": (0, 3), "gpu": (0, 1)}


@dataclass(frozen=True)
class Case:
    m: int
    k: int
    ranks: tuple = (16,)
    splits: int = 1
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    cancel: bool = False
    p: float = 0.0
    wide: str = ""  # which of dz and da are fp32
    shift: int = 0
    pad: int = 0
    name: str = ""

    def __str__(self):
        return self.name or f"{self.m}x{self.k} {'+'.join(map(str, self.ranks))} split {self.splits}"


class Problem:
    """Guarded tensors of a case, its workspace, and the float64 truth."""

    def __init__(self, case):
        self.case, self.total = case, sum(case.ranks)
        rng = torch.Generator().manual_seed(0)
        tensor = functools.partial(harness.draw, case, rng)
        self.x = tensor(case.m, case.k)
        self.dz = tensor(case.m, self.total, dtype=torch.float32 if "dz" in case.wide else case.dtype)
        if case.cancel:
            # The second half of the rows undoes the first: what is left is rounding, and shows the order of the sum.
            half = case.m // 2
            self.x[half:], self.dz[half:] = self.x[:half], -self.dz[:half]
        self.seed = harness.guarded((1,), torch.int64).fill_(SEED) if case.p else None
        self.solve()

    def solve(self):
        x, dz = self.x.double(), self.dz.to(self.case.dtype).double()
        if self.case.p:
            x = torch.where(mask(x.shape, self.case.p), x, 0.0) * scale(self.case.p)
        self.da, self.size = (t.split(self.case.ranks) for t in (dz.t() @ x, dz.abs().t() @ x.abs()))

    def workspace(self, library):
        """(parts, counters): as large as the library asks for, and the counters zero."""
        counters = library.library.fastlora_shrink_backward_counters(self.case.k, self.total)
        parts = counters * self.case.splits * 2 * library.constants["FASTLORA_TILE"] if self.case.splits > 1 else 1
        return harness.guarded((parts,), torch.float32), harness.guarded((counters,), torch.int32).zero_()

    def prepare(self, library, workspace):
        """(params, da of each part, tensors to declare)"""
        case, (parts, counters) = self.case, workspace
        dtype = torch.float32 if "da" in case.wide else case.dtype
        da = [harness.guarded((r, case.k), dtype, case.k + case.pad, case.shift) for r in case.ranks]
        p = library.structs["Shrink_backwardParams"]()
        set_matrix(p.x, self.x)
        set_matrix(p.dz, self.dz)
        set_parts(p.parts, da, case.ranks, [0] * len(da))
        p.seed = None if self.seed is None else self.seed.data_ptr()
        p.partial, p.partials = parts.data_ptr(), parts.numel()
        p.arrived, p.counters = counters.data_ptr(), counters.numel()
        p.m, p.k, p.count, p.splits, p.dropped = case.m, case.k, len(da), case.splits, round(case.p * 65536)
        p.fp32_dz, p.fp32_da = "dz" in case.wide, "da" in case.wide
        p.type = library.constants["FASTLORA_FP16" if case.dtype == torch.float16 else "FASTLORA_BF16"]
        tensors = dict(x=(self.x, 0), dz=(self.dz, 0), seed=(self.seed, 0), parts=(parts, 1), counters=(counters, 1))
        return p, da, tensors | {f"da{i}": (t, 1) for i, t in enumerate(da)}

    def run(self, library, schedule, workspace=None):
        """da of one launch, written into NaNs."""
        workspace = workspace or self.workspace(library)
        params, da, tensors = self.prepare(library, workspace)
        library.launch("launch_shrink_backward", params, tensors, schedule)
        assert not workspace[1].any(), "counters are not back at zero"
        for t in (*da, *workspace):
            assert harness.outside(t) == 0, "wrote outside"
        return da

    def check(self, da):
        for actual, truth, size in zip(da, self.da, self.size, strict=True):
            assert_close(actual, truth, size, self.case.exact)


SMALLEST = Case(1, 1, (1,))
CASES = [
    SMALLEST,
    Case(100, 3, (3,), wide="dz"),
    Case(136, 200, (16,), 2, wide="da"),
    Case(200, 65, (8, 3, 20), 3, wide="dz da"),
    Case(328, 130, (64,), dtype=torch.float16),
    Case(72, 40, (130,), 2, dtype=torch.float16, wide="dz"),
    Case(700, 24, (16,), 2, name="ring wraps in each split"),
    Case(100, 40, (16,), 5, name="splits without rows"),
    Case(0, 40, (3, 2), 2, name="no rows"),
    Case(20, 72, (8,), shift=1, name="bases off the grid"),
    Case(20, 67, (5, 6), pad=3, wide="dz da", name="padded rows off the grid"),
    Case(20, 67, (5,), pad=5, name="padded rows on the grid"),
    Case(40, 9, (4, 0, 60, 5), 2, name="a part without ranks"),
    Case(40, 9, (2,) * 8, name="eight parts"),
    Case(136, 136, (16,), p=0.5, name="p 0.5"),
    Case(136, 136, (72,), 2, p=0.5, wide="dz da", name="p 0.5, split, two tiles of ranks"),
    Case(130, 61, (3,), 2, p=0.5, name="p 0.5, groups straddle rows"),
    Case(40, 72, (8,), p=0.25, name="p 0.25"),
    Case(20, 40, (8,), p=1.0, name="p 1"),
]
CANCEL = [
    Case(512, 16, (16,), 4, cancel=True, name="halves cancel"),
    Case(1024, 70, (8,), 8, cancel=True, name="they too"),
]


def both(cases):
    """Each case exact and random; kept elements are scaled by a power of two in exact cases."""
    for case in cases:
        for exact in (True, False):
            if not (exact and case.p == 0.25):
                yield replace(case, exact=exact, name=f"{case}{', exact' if exact else ''}")


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*both(CASES), *CANCEL], ids=str)
def test_shrink_backward(case, mode):
    """Right, and the same bits in whatever order threads and blocks run, launch after launch on one workspace."""
    problem, library, first = Problem(case), harness.library(mode), None
    workspace = problem.workspace(library)
    for schedule in SCHEDULES[mode]:
        da = problem.run(library, schedule, workspace)
        problem.check(da)
        bits = [t.view(torch.int32 if t.dtype == torch.float32 else torch.int16) for t in da]
        first = first or bits
        assert all(map(torch.equal, bits, first)), f"schedule {schedule} gives other bits"


def test_the_truth_is_the_reference():
    problem = Problem(Case(40, 72, (8, 3), p=0.5, exact=True))
    a = [torch.zeros(r, 72, dtype=torch.float64) for r in problem.case.ranks]
    _, da = lora_shrink_backward_reference(
        problem.dz.double(), problem.x.double(), a, 0.5, torch.tensor(SEED), (False, True)
    )
    assert all(map(torch.equal, da, problem.da))


@pytest.mark.parametrize("p", [0.3, harness.edge()])
@pytest.mark.parametrize("k", [128, 61, 136])
def test_mask(k, p):
    """dz is the identity: da is the mask itself, bit for bit."""
    problem = Problem(Case(67, k, (67,), p=p, wide="da"))
    problem.x.fill_(1)
    problem.dz.copy_(torch.eye(67))
    (da,) = problem.run(harness.library(), 3)
    assert torch.equal(da, torch.where(mask((67, k), p), scale(p), 0.0).float())


def test_dropped_values_may_be_anything():
    """A dropped infinity is zero, as in the reference, and no NaN."""
    problem = Problem(Case(16, 40, (16,), p=0.5))
    keep = mask((16, 40), 0.5)
    problem.x[:, 7] = float("inf")
    problem.dz.fill_(1)
    problem.dz[keep[:, 7]] = 0
    problem.x[:, 7][keep[:, 7]] = 1
    (da,) = problem.run(harness.library(), 0)
    assert not da[:, 7].any() and torch.isfinite(da).all()


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", ["x", "dz", "da"])
def test_rows_far_apart(name):
    """Offsets beyond 2^31 elements."""
    problem, library = Problem(Case(4, 40, (4,))), harness.library()
    params, (da,), tensors = problem.prepare(library, problem.workspace(library))
    near = dict(x=problem.x, dz=problem.dz, da=da)[name]
    far = harness.far_apart(*near.shape, near.dtype, 2**31 // 3 + 8).copy_(near)
    set_matrix(params.parts[0].m if name == "da" else getattr(params, name), far)
    library.launch("launch_shrink_backward", params, tensors | {"far": (far, 1)}, 2)
    problem.check([far if name == "da" else da])


REFUSALS = [
    ("NULL", "x.data", None),
    ("NULL", "dz.data", None),
    ("NULL", "parts.0.m.data", None),
    ("NULL", "partial", None),
    ("NULL", "arrived", None),
    ("MISALIGNED", "x.data", lambda v: v + 1),
    ("MISALIGNED", "dz.data", lambda v: v + 2),
    ("MISALIGNED", "parts.1.m.data", lambda v: v + 2),
    ("MISALIGNED", "partial", lambda v: v + 4),
    ("FOREIGN", "x.data", "foreign"),
    ("FOREIGN", "seed", "foreign"),
    pytest.param("FOREIGN", "parts.0.m.data", "elsewhere", marks=harness.ON_THE_HOST),
    ("SHAPE", "m", -1),
    ("SHAPE", "k", -1),
    ("SHAPE", "count", 9),
    ("SHAPE", "splits", 0),
    ("SHAPE", "splits", 65536),
    ("SHAPE", "type", -1),
    ("SHAPE", "dropped", 65537),
    ("SHAPE", "dropped", -1),
    ("SHAPE", "parts.0.m.stride", 39),
    ("SHAPE", "parts.1.ranks", -1),
    ("SHAPE", "parts.1.rank", 7),
    ("TOO_LARGE", "m", 2**31),
    ("TOO_LARGE", "dz.stride", 2**31),
    ("TOO_LARGE", "parts.1.ranks", 2**23),
    ("WORKSPACE", "partials", lambda v: v - 1),
    ("WORKSPACE", "counters", lambda v: v - 1),
]


@pytest.mark.parametrize("status, path, value", REFUSALS)
def test_refusals(status, path, value):
    library, problem = harness.library(), Problem(Case(80, 40, (8, 4), 2, p=0.5, wide="dz da"))
    params, da, tensors = problem.prepare(library, problem.workspace(library))
    library.declare(tensors)
    assert harness.refused(library, "launch_shrink_backward", params, path, value) == f"FASTLORA_{status}"
    assert all(torch.isnan(t).all() for t in da), "refused, and written all the same"


def test_no_params():
    library = harness.library()
    assert library.call("launch_shrink_backward", None) == library.constants["FASTLORA_NULL"]


@pytest.mark.parametrize("k, ranks", [(0, (8,)), (40, (0,)), (40, ())])
def test_nothing_to_do(k, ranks):
    library, problem = harness.library(), Problem(Case(20, k, ranks or (0,)))
    params, _, tensors = problem.prepare(library, (torch.zeros(1), torch.zeros(1)))
    params.count = len(ranks)
    library.declare(tensors)
    assert library.call("launch_shrink_backward", params) == 0
