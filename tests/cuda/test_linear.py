"""The K-extended GEMM on the emulator, against float64: values, masks, schedules, memory, refusals."""

from dataclasses import dataclass, field, replace

import harness
import pytest
import torch
from harness import SEED, assert_close, mask, set_matrix, set_parts

from fastlora.ops.dropout import scale

SCHEDULES = {"plain": (0, 1, 2, 3), "checked": (0, 3), "gpu": (0, 1)}


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    ranks: tuple = (16,)
    columns: tuple = ()  # of the slices; none: one slice of n
    transposed: bool = False
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    bias: bool = False
    column_scale: bool = False
    p: float = 0.0
    shift: int = 0  # elements off the grid of 64 bytes
    pad: int = 0  # elements between rows
    name: str = field(default="", compare=False)

    def __str__(self):
        return self.name or f"{self.m}x{self.n}x{self.k} {'+'.join(map(str, self.ranks))}"


class Problem:
    """Guarded tensors of a case, and the float64 truth."""

    def __init__(self, case, seed=0):
        self.case, (m, n, k) = case, (case.m, case.n, case.k)
        self.columns = case.columns or (n,)
        rng = torch.Generator().manual_seed(seed)
        small = case.exact

        def tensor(*shape, dtype=case.dtype, scale=1.0, swap=False, aligned=False):
            if small:
                values = torch.randint(-2, 3, shape, generator=rng).double()
            else:
                values = torch.randn(shape, generator=rng, dtype=torch.float64) * scale
            values = values.t() if swap else values
            shift, pad = (0, 0) if aligned else (case.shift, case.pad)
            stride = values.shape[-1] + (pad if len(shape) > 1 else 0)
            return harness.guarded(tuple(values.shape), dtype, stride, shift).copy_(values)

        total, swap = sum(case.ranks), case.transposed
        self.x, self.z = tensor(m, k), tensor(m, total)
        self.w = tensor(n, k, scale=max(k, 1) ** -0.5, swap=swap)
        parts = zip(self.columns, case.ranks, strict=True)
        self.b = [tensor(c, r, scale=0.5, swap=swap) for c, r in parts]
        self.bias = tensor(n) if case.bias else None
        self.c = tensor(n, dtype=torch.float32, aligned=True) if case.column_scale else None
        self.seed = harness.guarded((1,), torch.int64).fill_(SEED) if case.p else None
        self.solve()

    def solve(self):
        case, wide = self.case, torch.float64

        def product(left, right):
            right = right.to(wide) if case.transposed else right.to(wide).t()
            return left.to(wide) @ right, left.to(wide).abs() @ right.abs()

        base, size = product(self.x, self.w)
        update, update_size = torch.zeros_like(base), torch.zeros_like(base)
        column = rank = 0
        for c, r, b in zip(self.columns, case.ranks, self.b, strict=True):
            if c and r:
                inside = slice(column, column + c)
                update[:, inside], update_size[:, inside] = product(self.z[:, rank : rank + r], b)
            column, rank = column + c, rank + r
        if case.p:
            keep = mask((case.m, case.n), case.p) * scale(case.p)
            update, update_size = update * keep, update_size * keep
        self.u, self.size = base + update, size + update_size
        c = 1 if self.c is None else self.c.to(wide)
        self.y = self.u * c + (0 if self.bias is None else self.bias.to(wide))
        self.y_size = self.size * (abs(c) if self.c is not None else 1) + self.y.abs()

    def params(self, library, y, u):
        case = self.case
        p = library.structs["LinearParams"]()
        for name, t in dict(x=self.x, w=self.w, z=self.z, y=y, u=u).items():
            set_matrix(getattr(p, name), t)
        for name, t in dict(bias=self.bias, column_scale=self.c, seed=self.seed).items():
            setattr(p, name, None if t is None else t.data_ptr())
        set_parts(p.parts, self.b, case.ranks, self.columns)
        p.m, p.n, p.k, p.count = case.m, case.n, case.k, len(case.ranks)
        p.dropped, p.transposed = round(case.p * 65536), case.transposed
        p.type = library.constants["FASTLORA_FP16" if case.dtype == torch.float16 else "FASTLORA_BF16"]
        return p

    def run(self, library, schedule):
        """(y, u) of one launch, written into NaNs."""
        shape, case = (self.case.m, self.case.n), self.case
        y = harness.guarded(shape, case.dtype, case.n + case.pad, case.shift)
        u = harness.guarded(shape, case.dtype, case.n + case.pad, case.shift) if case.column_scale else None
        inputs = dict(x=self.x, w=self.w, z=self.z, bias=self.bias, c=self.c, seed=self.seed)
        inputs |= {f"b{i}": b for i, b in enumerate(self.b)}
        tensors = {name: (t, 0) for name, t in inputs.items()} | {"y": (y, 1), "u": (u, 1)}
        library.launch("launch_linear", self.params(library, y, u), tensors, schedule)
        for t in (y, u):
            assert t is None or harness.outside(t) == 0, "wrote outside"
        return y, u

    def check(self, y, u):
        assert_close(y, self.y, self.y_size, self.case.exact)
        if u is not None:
            assert_close(u, self.u, self.size, self.case.exact)


SMALLEST = Case(1, 1, 1, (1,))
BASE = [
    SMALLEST,
    Case(3, 100, 100, (3,), bias=True),
    Case(63, 136, 168, (16,), bias=True),
    Case(130, 257, 200, (8,), bias=True, column_scale=True),
    Case(129, 129, 72, (17,), dtype=torch.float16, column_scale=True),
    Case(17, 8, 8, (65,), dtype=torch.float16, bias=True),
    Case(100, 72, 35, (130,)),
    Case(64, 128, 193, (0,), bias=True, name="no adapter"),
    Case(40, 136, 0, (24,), bias=True, name="no base"),
    Case(1040, 40, 40, (8,), name="more than eight rows of tiles"),
    Case(20, 40, 40, (8,), shift=1, bias=True, column_scale=True, name="bases off the grid"),
    Case(20, 44, 37, (5,), pad=3, bias=True, column_scale=True, name="padded rows off the grid"),
    Case(20, 40, 37, (5,), pad=3, name="padded rows on the grid"),
    Case(33, 300, 40, (4, 9, 20), (130, 38, 132), bias=True, column_scale=True, name="slices"),
    Case(9, 200, 40, (8, 0, 8), (64, 72, 64), name="a slice without an adapter"),
    Case(9, 100, 24, (8, 5, 16), (36, 0, 64), name="an empty slice"),
    Case(5, 80, 24, (2,) * 8, (10,) * 8, name="eight slices"),
]
DROPOUT = [
    Case(37, 136, 72, (16,), p=0.5, bias=True, column_scale=True, name="p 0.5"),
    Case(20, 61, 40, (3,), p=0.5, name="p 0.5, groups straddle rows"),
    Case(12, 40, 0, (40,), p=0.25, name="p 0.25, no base"),
    Case(12, 40, 24, (4,), p=1.0, name="p 1"),
    Case(6, 88, 24, (4, 4), (40, 48), p=0.5, name="p 0.5, slices"),
]


def both(cases):
    """Each case with both layouts of w, exact and random."""
    for case in cases:
        for transposed in (False, True):
            for exact in (True, False):
                # kept elements are scaled by a power of two in exact cases
                if not (exact and case.p == 0.25):
                    named = f"{case}{', transposed' if transposed else ''}{', exact' if exact else ''}"
                    yield replace(case, transposed=transposed, exact=exact, name=named)


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", list(both(BASE + DROPOUT)), ids=str)
def test_linear(case, mode):
    """Right, and the same bits in whatever order threads and blocks run."""
    problem, first = Problem(case), None
    for schedule in SCHEDULES[mode]:
        y, u = problem.run(harness.library(mode), schedule)
        problem.check(y, u)
        first = y if first is None else first
        assert torch.equal(y.view(torch.int16), first.view(torch.int16)), f"schedule {schedule} gives other bits"


@pytest.mark.parametrize("p", [0.3, harness.edge()])
@pytest.mark.parametrize("n", [64, 61, 136])
def test_mask(n, p):
    """The update alone, of ones: y is the mask itself, bit for bit."""
    case = Case(67, n, 0, (1,), p=p)
    problem = Problem(case)
    problem.z.fill_(1)
    problem.b[0].fill_(1)
    y, _ = problem.run(harness.library(), 3)
    assert torch.equal(y, torch.where(mask((67, n), p), scale(p), 0.0).to(y.dtype))


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", ["x", "w", "z", "y"])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_far_apart(name, transposed):
    """Offsets beyond 2^31 elements."""
    problem, library = Problem(Case(4, 40, 40, (8,), transposed=transposed)), harness.library()
    y = harness.guarded((4, 40), torch.bfloat16)
    tensors = dict(x=problem.x, w=problem.w, z=problem.z, y=y)
    near = tensors[name]
    far = harness.far_apart(*near.shape, torch.bfloat16, 2**31 // (near.shape[0] - 1) + 8)
    tensors[name] = far.copy_(near)
    params = problem.params(library, tensors["y"], None)
    for key, t in tensors.items():
        set_matrix(getattr(params, key), t)
    tensors = {key: (t, 1) for key, t in (tensors | {"b": problem.b[0]}).items()}
    library.launch("launch_linear", params, tensors, 2)
    problem.check(tensors["y"][0], None)


def test_dropped_values_may_be_anything():
    """A dropped infinity is zero, as in the reference, and no NaN."""
    case = Case(16, 40, 16, (16,), p=0.5)
    problem = Problem(case)
    keep = mask((16, 40), 0.5)
    problem.b[0][7] = float("inf")
    problem.z.fill_(1)
    y, _ = problem.run(harness.library(), 0)
    assert torch.equal(torch.isinf(y[:, 7]), keep[:, 7]) and not torch.isnan(y).any()


REFUSALS = [
    ("NULL", "x.data", None),
    ("NULL", "w.data", None),
    ("NULL", "z.data", None),
    ("NULL", "y.data", None),
    ("NULL", "parts.0.m.data", None),
    ("MISALIGNED", "x.data", lambda v: v + 1),
    ("MISALIGNED", "parts.0.m.data", lambda v: v + 1),
    ("MISALIGNED", "seed", lambda v: v + 4),
    ("FOREIGN", "w.data", "foreign"),
    ("FOREIGN", "u.data", "foreign"),
    ("FOREIGN", "bias", "foreign"),
    ("FOREIGN", "column_scale", "foreign"),
    pytest.param("FOREIGN", "x.data", "elsewhere", marks=harness.ON_THE_HOST),
    pytest.param("FOREIGN", "bias", "elsewhere", marks=harness.ON_THE_HOST),
    ("SHAPE", "m", -1),
    ("SHAPE", "n", 41),
    ("SHAPE", "count", 0),
    ("SHAPE", "count", 9),
    ("SHAPE", "type", 2),
    ("SHAPE", "dropped", 65537),
    ("SHAPE", "dropped", -1),
    ("SHAPE", "x.stride", -24),
    ("SHAPE", "y.stride", 39),
    ("SHAPE", "parts.0.ranks", -1),
    ("SHAPE", "parts.0.rank", 1),
    ("SHAPE", "parts.0.column", 1),
    ("SHAPE", "parts.0.columns", 39),
    ("TOO_LARGE", "m", 2**31),
    ("TOO_LARGE", "k", 2**40),
    ("TOO_LARGE", "w.stride", 2**31),
    ("TOO_LARGE", "parts.0.ranks", 2**31),
]


@pytest.mark.parametrize("status, path, value", REFUSALS)
def test_refusals(status, path, value):
    library, problem = harness.library(), Problem(Case(20, 40, 24, (8,), p=0.5))
    y = harness.guarded((20, 40), torch.bfloat16)
    params = problem.params(library, y, None)
    tensors = [problem.x, problem.w, problem.z, problem.b[0], problem.seed, y]
    library.declare({str(i): (t, 1) for i, t in enumerate(tensors)})
    assert harness.refused(library, "launch_linear", params, path, value) == f"FASTLORA_{status}"
    assert torch.isnan(y).all(), "refused, and written all the same"


def test_no_params():
    library = harness.library()
    assert library.call("launch_linear", None) == library.constants["FASTLORA_NULL"]


def test_every_status_has_a_sentence():
    library = harness.library()
    statuses = [v for n, v in library.constants.items() if n not in harness.NO_STATUS]
    sentences = {library.sentence(s) for s in range(max(statuses) + 1)}
    assert len(sentences) == max(statuses) + 1 and library.sentence(99) == library.sentence(-1) == "an unknown status"


@pytest.mark.parametrize("shape", [(0, 40, 24), (20, 0, 24)])
def test_nothing_to_do(shape):
    m, n, k = shape
    library = harness.library()
    problem = Problem(Case(m, n, k, (8,)))
    library.declare({"x": (problem.x, 0), "w": (problem.w, 0), "z": (problem.z, 0), "b": (problem.b[0], 0)})
    assert library.call("launch_linear", problem.params(library, torch.empty(m, n), None)) == 0
