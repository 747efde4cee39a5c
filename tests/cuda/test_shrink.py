"""The shrink on the emulator, against float64: values, masks, the order of sums, counters, workspace, refusals."""

import functools
from dataclasses import dataclass, replace

import harness
import pytest
import torch
from harness import SEED, assert_close, mask, set_matrix, set_parts

from fastlora.ops.dropout import scale

SCHEDULES = {"plain": (0, 1, 2, 3, 6, 7), "checked": (0, 3), "gpu": (0, 1)}


@dataclass(frozen=True)
class Case:
    m: int
    k: int
    ranks: tuple = (16,)
    splits: int = 1
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    cancel: bool = False
    gate: str = ""  # "", "row", "token"
    p: float = 0.0
    shift: int = 0
    pad: int = 0
    only: str = ""  # z or zg
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
        self.a = [tensor(r, case.k) for r in case.ranks]
        if case.cancel:
            # The second half of K undoes the first: what is left is rounding, and shows the order of the sum.
            half = case.k // 2
            self.x[:, half:] = self.x[:, :half]
            for a in self.a:
                a[:, half:] = -a[:, :half]
        self.g = None
        if case.gate:
            self.g = tensor(case.m if case.gate == "token" else 1, self.total, dtype=torch.float32, shift=0)
        self.seed = harness.guarded((1,), torch.int64).fill_(SEED) if case.p else None
        self.scale = 2.0 if case.exact else 1.25
        wide = torch.float64
        x, a = self.x.to(wide), torch.cat([a.to(wide) for a in self.a])
        if case.p:
            x = torch.where(mask(x.shape, case.p), x, 0.0) * scale(case.p)
        self.z, self.size = x @ a.t(), x.abs() @ a.abs().t()
        g = self.scale * (1 if self.g is None else self.g.to(wide))
        self.zg, self.zg_size = self.z * g, self.size * abs(g)

    def workspace(self, library):
        """(parts, counters): as large as the library asks for, and the counters zero."""
        counters = library.library.fastlora_shrink_counters(self.case.m, self.total)
        parts = counters * self.case.splits * library.constants["FASTLORA_TILE"] if self.case.splits > 1 else 1
        return harness.guarded((parts,), torch.float32), harness.guarded((counters,), torch.int32).zero_()

    def params(self, library, z, zg, workspace):
        case, (parts, counters) = self.case, workspace
        p = library.structs["ShrinkParams"]()
        for name, t in dict(x=self.x, z=z, zg=zg, g=self.g).items():
            set_matrix(getattr(p, name), t)
        if case.gate == "row":
            p.g.stride = 0
        set_parts(p.parts, self.a, case.ranks, [0] * len(case.ranks))
        p.seed = None if self.seed is None else self.seed.data_ptr()
        p.partial, p.partials = parts.data_ptr(), parts.numel()
        p.arrived, p.counters = counters.data_ptr(), counters.numel()
        p.m, p.k, p.count, p.splits, p.scale = case.m, case.k, len(case.ranks), case.splits, self.scale
        p.dropped = round(case.p * 65536)
        p.type = library.constants["FASTLORA_FP16" if case.dtype == torch.float16 else "FASTLORA_BF16"]
        return p

    def outputs(self):
        case, shape = self.case, (self.case.m, self.total)
        z = None if case.only == "zg" else harness.guarded(shape, torch.float32, self.total + case.pad)
        zg = None if case.only == "z" else harness.guarded(shape, case.dtype, self.total + case.pad, case.shift)
        return z, zg

    def run(self, library, schedule, workspace=None):
        """(z, zg) of one launch, written into NaNs."""
        (z, zg), (parts, counters) = self.outputs(), workspace or self.workspace(library)
        inputs = dict(x=self.x, g=self.g, seed=self.seed) | {f"a{i}": a for i, a in enumerate(self.a)}
        tensors = {name: (t, 0) for name, t in inputs.items()}
        tensors |= dict(z=(z, 1), zg=(zg, 1), parts=(parts, 1), counters=(counters, 1))
        library.launch("launch_shrink", self.params(library, z, zg, (parts, counters)), tensors, schedule)
        assert not counters.any(), "counters are not back at zero"
        for t in (z, zg, parts, counters):
            assert t is None or harness.outside(t) == 0, "wrote outside"
        return z, zg

    def check(self, z, zg):
        if z is not None:
            assert_close(z, self.z, self.size, self.case.exact)
        if zg is not None:
            assert_close(zg, self.zg, self.zg_size, self.case.exact)


SMALLEST = Case(1, 1, (1,))
CASES = [
    SMALLEST,
    Case(3, 100, (3,), gate="row"),
    Case(63, 136, (16,), 2, gate="token"),
    Case(65, 200, (8, 3, 20), gate="token"),
    Case(64, 328, (64,), 3, torch.float16),
    Case(16, 72, (130,), dtype=torch.float16, gate="row"),
    Case(70, 35, (5,), 2),
    Case(16, 1096, (16,), 8, name="ring wraps in each split"),
    Case(16, 576, (16,), name="ring wraps"),
    Case(20, 100, (16,), 5, name="splits without columns"),
    Case(4, 0, (3,), 2, name="no columns"),
    Case(20, 72, (8,), shift=1, name="bases off the grid"),
    Case(20, 67, (5, 6), pad=3, gate="token", name="padded rows off the grid"),
    Case(20, 67, (5,), pad=5, name="padded rows on the grid"),
    Case(9, 40, (4, 0, 60, 5), 2, name="a part without ranks"),
    Case(9, 40, (2,) * 8, name="eight parts"),
    Case(20, 40, (8,), only="z", name="z alone"),
    Case(20, 40, (8,), gate="row", only="zg", name="z ⊙ g alone"),
    Case(67, 136, (16,), p=0.5, name="p 0.5"),
    Case(67, 136, (72,), 2, p=0.5, gate="token", name="p 0.5, split, two tiles of ranks"),
    Case(20, 61, (3,), 2, p=0.5, name="p 0.5, groups straddle rows"),
    Case(20, 72, (8,), p=0.25, name="p 0.25"),
    Case(20, 40, (8,), p=1.0, name="p 1"),
]


def both(cases):
    """Each case exact and random; kept elements are scaled by a power of two in exact cases."""
    for case in cases:
        for exact in (True, False):
            if not (exact and case.p == 0.25):
                yield replace(case, exact=exact, name=f"{case}{', exact' if exact else ''}")


CANCEL = [
    Case(16, 512, (16,), 4, cancel=True, name="halves cancel"),
    Case(70, 1024, (8,), 8, cancel=True, name="they too"),
]


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*both(CASES), *CANCEL], ids=str)
def test_shrink(case, mode):
    """Right, and the same bits in whatever order threads and blocks run, two launches in a row on one workspace."""
    problem, library, first = Problem(case), harness.library(mode), None
    workspace = problem.workspace(library)
    for schedule in SCHEDULES[mode]:
        z, zg = problem.run(library, schedule, workspace)
        problem.check(z, zg)
        bits = [t.view(torch.int32 if t.dtype == torch.float32 else torch.int16) for t in (z, zg) if t is not None]
        first = first or bits
        assert all(map(torch.equal, bits, first)), f"schedule {schedule} gives other bits"


@pytest.mark.parametrize("p", [0.3, harness.edge()])
@pytest.mark.parametrize("k", [64, 61, 72])
def test_mask(k, p):
    """a is the identity: z is the mask itself, bit for bit."""
    problem = Problem(Case(67, k, (k,), p=p))
    problem.x.fill_(1)
    problem.a[0].copy_(torch.eye(k))
    z, _ = problem.run(harness.library(), 3)
    assert torch.equal(z, torch.where(mask((67, k), p), scale(p), 0.0).float())


def test_dropped_values_may_be_anything():
    """A dropped infinity is zero, as in the reference, and no NaN."""
    problem = Problem(Case(16, 40, (8,), p=0.5))
    keep = mask((16, 40), 0.5)
    problem.x[:, 7] = float("inf")
    problem.a[0].fill_(1)
    z, _ = problem.run(harness.library(), 0)
    assert torch.equal(torch.isinf(z[:, 0]), keep[:, 7]) and not torch.isnan(z).any()


REFUSALS = [
    ("NULL", "x.data", None),
    ("NULL", "parts.0.m.data", None),
    ("NULL", "partial", None),
    ("NULL", "arrived", None),
    ("MISALIGNED", "x.data", lambda v: v + 1),
    ("MISALIGNED", "z.data", lambda v: v + 2),
    ("MISALIGNED", "partial", lambda v: v + 4),
    ("MISALIGNED", "g.data", lambda v: v + 2),
    ("FOREIGN", "x.data", "foreign"),
    ("FOREIGN", "zg.data", "foreign"),
    ("FOREIGN", "g.data", "foreign"),
    ("FOREIGN", "arrived", "foreign"),
    ("FOREIGN", "seed", "foreign"),
    pytest.param("FOREIGN", "parts.0.m.data", "elsewhere", marks=harness.ON_THE_HOST),
    pytest.param("FOREIGN", "partial", "elsewhere", marks=harness.ON_THE_HOST),
    ("SHAPE", "m", -1),
    ("SHAPE", "k", -1),
    ("SHAPE", "count", 9),
    ("SHAPE", "count", -1),
    ("SHAPE", "splits", 0),
    ("SHAPE", "splits", 65536),
    ("SHAPE", "type", -1),
    ("SHAPE", "dropped", 65537),
    ("SHAPE", "z.stride", 11),
    ("SHAPE", "zg.stride", 11),
    ("SHAPE", "parts.1.ranks", -1),
    ("SHAPE", "parts.1.rank", 7),
    ("SHAPE", "parts.1.column", 1),
    ("TOO_LARGE", "m", 2**31),
    ("TOO_LARGE", "x.stride", 2**31),
    ("TOO_LARGE", "parts.1.ranks", 2**23),
    ("WORKSPACE", "partials", lambda v: v - 1),
    ("WORKSPACE", "counters", lambda v: v - 1),
]


@pytest.mark.parametrize("status, path, value", REFUSALS)
def test_refusals(status, path, value):
    library, problem = harness.library(), Problem(Case(20, 40, (8, 4), 2, p=0.5, gate="token"))
    (z, zg), workspace = problem.outputs(), problem.workspace(library)
    tensors = [problem.x, *problem.a, problem.g, problem.seed, z, zg, *workspace]
    params = problem.params(library, z, zg, workspace)
    library.declare({str(i): (t, 1) for i, t in enumerate(tensors)})
    assert harness.refused(library, "launch_shrink", params, path, value) == f"FASTLORA_{status}"
    assert torch.isnan(z).all() and torch.isnan(zg).all(), "refused, and written all the same"


def test_no_params_and_no_outputs():
    library = harness.library()
    assert library.call("launch_shrink", None) == library.constants["FASTLORA_NULL"]
    problem = Problem(Case(20, 40, (8,)))
    params = problem.params(library, None, None, problem.workspace(library))
    library.declare({"x": (problem.x, 0), "a": (problem.a[0], 0)})
    assert library.call("launch_shrink", params) == library.constants["FASTLORA_NULL"]


@pytest.mark.parametrize("m, ranks", [(0, (8,)), (20, (0,)), (20, ())])
def test_nothing_to_do(m, ranks):
    library, problem = harness.library(), Problem(Case(max(m, 1), 40, ranks or (0,)))
    params = problem.params(library, None, None, (torch.zeros(1), torch.zeros(1)))
    params.m, params.count = m, len(ranks)
    library.declare({"x": (problem.x, 0), "a": (problem.a[0], 0)})
    assert library.call("launch_shrink", params) == 0
