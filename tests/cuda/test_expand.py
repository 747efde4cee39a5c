"""The expand on the emulator, against float64: y in place, slices, alignment, refusals."""

import functools
from dataclasses import dataclass, replace

import harness
import pytest
import torch
from harness import assert_close, set_matrix, set_parts

SCHEDULES = {"plain": (0, 1, 2, 3), "checked": (0, 3), "gpu": (0, 1)}


@dataclass(frozen=True)
class Case:
    m: int
    ranks: tuple = (16,)
    columns: tuple = (72,)
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    cancel: bool = False
    shift: int = 0  # elements off the grid of 64 bytes
    pad: int = 0  # elements between rows
    name: str = ""

    def __str__(self):
        return self.name or f"{self.m} x {'+'.join(map(str, self.columns))} of {'+'.join(map(str, self.ranks))}"


class Problem:
    """Guarded tensors of a case, and the float64 truth."""

    def __init__(self, case):
        self.case = case
        rng = torch.Generator().manual_seed(0)
        tensor = functools.partial(harness.draw, case, rng)
        self.z, self.before = tensor(case.m, sum(case.ranks)), tensor(case.m, sum(case.columns))
        self.b = [tensor(c, r) for c, r in zip(case.columns, case.ranks, strict=True)]
        if case.cancel:
            half = case.ranks[0] // 2
            self.z[:, half:], self.b[0][:, half:] = self.z[:, :half], -self.b[0][:, :half]
        parts = zip(self.z.double().split(list(case.ranks), 1), [b.double() for b in self.b], strict=True)
        update = [(z @ b.t(), z.abs() @ b.abs().t()) for z, b in parts]
        y = self.before.double()
        self.y = y + torch.cat([u for u, _ in update], 1)
        self.size = y.abs() + torch.cat([s for _, s in update], 1)

    def params(self, library, y):
        case = self.case
        p = library.structs["ExpandParams"]()
        set_matrix(p.y, y)
        set_matrix(p.z, self.z)
        set_parts(p.parts, self.b, case.ranks, case.columns)
        p.m, p.count = case.m, len(case.ranks)
        p.type = library.constants["FASTLORA_FP16" if case.dtype == torch.float16 else "FASTLORA_BF16"]
        return p

    def fresh(self):
        case = self.case
        return harness.guarded(self.before.shape, case.dtype, self.before.shape[1] + case.pad, case.shift).copy_(
            self.before
        )

    def run(self, library, schedule):
        """y after one launch."""
        y = self.fresh()
        tensors = {"z": (self.z, 0), "y": (y, 1)} | {f"b{i}": (b, 0) for i, b in enumerate(self.b)}
        library.launch("launch_expand", self.params(library, y), tensors, schedule)
        assert harness.outside(y) == 0, "wrote outside"
        return y

    def check(self, y):
        assert_close(y, self.y, self.size, self.case.exact)


SMALLEST = Case(1, (1,), (1,))
CASES = [
    SMALLEST,
    Case(3, (3,), (100,)),
    Case(130, (8,), (136,)),
    Case(129, (64,), (64,), torch.float16),
    Case(17, (33,), (65,), torch.float16),
    Case(16, (130,), (40,)),
    Case(20, (8,), (40,), shift=1, name="bases off the grid"),
    Case(20, (8,), (48,), shift=4, name="bases on a grid of 8 bytes"),
    Case(20, (5,), (43,), pad=3, name="padded rows off the grid"),
    Case(20, (8,), (43,), pad=5, name="padded rows on the grid"),
    Case(18, (4, 9, 40), (130, 38, 72), name="slices"),
    Case(9, (8, 0, 3), (70, 64, 5), name="a slice without an adapter"),
    Case(9, (8, 5, 16), (36, 0, 64), name="an empty slice"),
    Case(5, (2,) * 8, (10,) * 8, name="eight slices"),
]


def both(cases):
    """Each case exact and random."""
    for case in cases:
        for exact in (True, False):
            yield replace(case, exact=exact, name=f"{case}{', exact' if exact else ''}")


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*both(CASES), Case(20, (64,), cancel=True, name="halves cancel")], ids=str)
def test_expand(case, mode):
    """Right, and the same bits in whatever order threads and blocks run."""
    problem, first = Problem(case), None
    for schedule in SCHEDULES[mode]:
        y = problem.run(harness.library(mode), schedule)
        problem.check(y)
        first = y if first is None else first
        assert torch.equal(y.view(torch.int16), first.view(torch.int16)), f"schedule {schedule} gives other bits"


def test_columns_outside_and_slices_without_an_adapter_keep_their_bits():
    """Also NaN and −0: y's other columns are not even read."""
    problem = Problem(Case(9, (8, 0, 3), (16, 24, 5)))
    problem.before[:, 16:28], problem.before[:, 28:40] = torch.nan, -0.0  # of the slice without an adapter
    whole = harness.guarded((9, 60), torch.bfloat16).fill_(-0.0)
    whole[:, 5:50] = problem.before
    y, before = whole[:, 5:50], whole.clone()
    tensors = {"z": (problem.z, 0), "y": (whole, 1)} | {f"b{i}": (b, 0) for i, b in enumerate(problem.b)}
    harness.library().launch("launch_expand", problem.params(harness.library(), y), tensors, 3)
    kept = torch.ones(60, dtype=torch.bool)
    kept[5:21] = kept[45:50] = False
    assert torch.equal(whole.view(torch.int16)[:, kept], before.view(torch.int16)[:, kept])
    for inside in (slice(0, 16), slice(40, 45)):
        assert_close(y[:, inside], problem.y[:, inside], problem.size[:, inside], False)


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", ["y", "z", "b"])
def test_rows_far_apart(name):
    """Offsets beyond 2^31 elements."""
    problem, library = Problem(Case(20, (8,), (20,))), harness.library()
    tensors = dict(y=problem.fresh(), z=problem.z, b=problem.b[0])
    far = harness.far_apart(*tensors[name].shape, torch.bfloat16, 2**31 // 19 + 8)
    tensors[name] = far.copy_(tensors[name])
    problem.z, problem.b[0] = tensors["z"], tensors["b"]
    params = problem.params(library, tensors["y"])
    library.launch("launch_expand", params, {key: (t, 1) for key, t in tensors.items()}, 2)
    problem.check(tensors["y"])


REFUSALS = [
    ("NULL", "y.data", None),
    ("NULL", "z.data", None),
    ("NULL", "parts.1.m.data", None),
    ("MISALIGNED", "y.data", lambda v: v + 1),
    ("MISALIGNED", "z.data", lambda v: v + 1),
    ("MISALIGNED", "parts.0.m.data", lambda v: v + 1),
    ("FOREIGN", "y.data", "foreign"),
    ("FOREIGN", "z.data", "foreign"),
    pytest.param("FOREIGN", "y.data", "elsewhere", marks=harness.ON_THE_HOST),
    pytest.param("FOREIGN", "parts.0.m.data", "elsewhere", marks=harness.ON_THE_HOST),
    ("SHAPE", "m", -1),
    ("SHAPE", "count", 9),
    ("SHAPE", "count", -1),
    ("SHAPE", "type", 2),
    ("SHAPE", "y.stride", 39),
    ("SHAPE", "parts.1.ranks", -1),
    ("SHAPE", "parts.1.rank", 7),
    ("SHAPE", "parts.1.column", 1),
    ("TOO_LARGE", "m", 2**31),
    ("TOO_LARGE", "y.stride", 2**31),
    ("TOO_LARGE", "parts.1.columns", 2**31),
]


@pytest.mark.parametrize("status, path, value", REFUSALS)
def test_refusals(status, path, value):
    library, problem = harness.library(), Problem(Case(20, (8, 4), (16, 24)))
    y = problem.fresh()
    params = problem.params(library, y)
    library.declare({str(i): (t, 1) for i, t in enumerate([problem.z, *problem.b, y])})
    assert harness.refused(library, "launch_expand", params, path, value) == f"FASTLORA_{status}"
    assert torch.equal(y, problem.before), "refused, and written all the same"


def test_no_params():
    library = harness.library()
    assert library.call("launch_expand", None) == library.constants["FASTLORA_NULL"]


@pytest.mark.parametrize("m, ranks, columns", [(0, (8,), (40,)), (20, (), ()), (20, (0,), (40,)), (20, (8,), (0,))])
def test_nothing_to_do(m, ranks, columns):
    library, problem = harness.library(), Problem(Case(max(m, 1), ranks or (1,), columns or (1,)))
    y, params = problem.fresh(), problem.params(library, problem.before)
    params.m, params.count = m, len(ranks)
    set_matrix(params.y, y)
    library.declare({str(i): (t, 1) for i, t in enumerate([problem.z, *problem.b, y])})
    assert library.call("launch_expand", params) == 0 and torch.equal(y, problem.before)
