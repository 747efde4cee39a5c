"""The shrink of tokens with adapters of their own, on the emulator against float64: values, order of sums, counters."""

from dataclasses import dataclass, replace

import harness
import pytest
import torch
from harness import DEVICE, assert_close, set_matrix
from routes import set_pages, set_route

import fastlora

SCHEDULES = {"plain": (0, 1, 2, 3, 6, 7), "checked": (0, 3), "gpu": (0, 1)}
RANKS = (8, 3, 16, 0, 40, 1)  # of the slots; 6 and more are outside the tables
MIXED = [[(0, 0.5), (4, 0.5)], [(4, 2.0), (0, -1.0)], [], [(2, 0.25), (2, 0.5), (6, 1.0), (1, 1.0)]] * 2


@dataclass(frozen=True)
class Case:
    lists: tuple
    k: int = 72
    ranks: tuple = RANKS
    slices: tuple = (40,)  # their columns
    splits: int = 1
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    cancel: bool = False
    shift: int = 0  # elements off the grid of 64 bytes
    pad: int = 0  # elements between rows
    dora: tuple = ()  # slots that have it
    bias: bool = False
    room: bool = False  # in buffers for more entries and tiles
    name: str = ""

    def __str__(self):
        return self.name


class Problem:
    """Pages in a shuffled arena whose other pages, and rows beyond a rank, are NaN: none may be read. And the route."""

    def __init__(self, case):
        self.case, self.rng = case, torch.Generator().manual_seed(len(case.lists))
        self.pages, free = -(-max(case.ranks, default=0) // 8), 2 * sum(-(-r // 8) for r in case.ranks)
        free = torch.randperm(free, generator=self.rng).tolist()
        k, n, count = len(case.slices), sum(case.slices), len(free)
        self.x = self.fill(self.empty(len(case.lists), case.k))
        self.A, self.B = self.empty(count * k * 8, case.k), self.empty(count * 8, n)
        self.a, self.b = [], []  # of a slot: (slices, rank, k) and (rank, n), in float64
        self.table = torch.full((len(case.ranks), self.pages), -1, dtype=torch.int32, device=DEVICE)
        for slot, r in enumerate(case.ranks):
            self.a.append(torch.zeros(k, r, case.k, dtype=torch.float64, device=DEVICE))
            self.b.append(torch.zeros(r, n, dtype=torch.float64, device=DEVICE))
            for row in range(r):
                if row % 8 == 0:
                    self.table[slot, row // 8] = free.pop()
                page = int(self.table[slot, row // 8])
                self.b[slot][row] = self.fill(self.B[page * 8 + row % 8])
                for i in range(k):
                    self.a[slot][i, row] = self.fill(self.A[(page * k + i) * 8 + row % 8])
        self.d = torch.zeros(len(case.ranks), n, dtype=torch.float64, device=DEVICE)
        self.columns = torch.full((len(case.ranks),), -1, dtype=torch.int32, device=DEVICE) if case.dora else None
        for slot in case.dora:
            self.columns[slot] = page = free.pop()
            self.d[slot] = self.fill(self.B[page * 8])
        if case.cancel:
            # The second half of K undoes the first: what is left is rounding, and shows the order of the sum.
            half = case.k // 2
            self.x[:, half:], self.A[:, half:] = self.x[:, :half], -self.A[:, :half]
            for a in self.a:
                a[..., half:] = -a[..., :half]
        self.ranks = torch.tensor(case.ranks, dtype=torch.int32, device=DEVICE)
        self.route = fastlora.Route.from_lists(list(case.lists), DEVICE)
        self.used = len(self.route.slots)
        if case.room:
            self.route = self.route.with_room(self.used + 5, len(self.route.tiles) + 2)

    def empty(self, *shape, dtype=None, pad=None):
        pad = self.case.pad if pad is None else pad
        return harness.guarded(shape, dtype or self.case.dtype, shape[-1] + pad, self.case.shift)

    def fill(self, t):
        if self.case.exact:
            return t.copy_(torch.randint(-2, 3, t.shape, generator=self.rng))
        return t.copy_(torch.randn(t.shape, generator=self.rng, dtype=torch.float64))

    def shrunk(self):
        """(z, Σ |x| |a|) in float64."""
        z = torch.zeros(2, self.used, len(self.case.slices), 8 * self.pages, dtype=torch.float64, device=DEVICE)
        entry = 0
        for x, entries in zip(self.x.double(), self.case.lists, strict=True):
            for slot, _ in entries:
                if slot < len(self.a):
                    a = self.a[slot]
                    z[0, entry, :, : a.shape[1]], z[1, entry, :, : a.shape[1]] = a @ x, a.abs() @ x.abs()
                entry += 1
        return z.flatten(2)

    def type(self, library):
        return library.constants["FASTLORA_FP16" if self.case.dtype == torch.float16 else "FASTLORA_BF16"]

    def inputs(self):
        route = self.route
        named = dict(order=route.order, tiles=route.tiles, offsets=route.offsets, slots=route.slots)
        named |= dict(table=self.table, ranks=self.ranks, columns=self.columns)
        return {name: (t, 0) for name, t in named.items()}

    def workspace(self, library):
        """(parts, counters): as large as params.h says, and the counters zero."""
        case, size = self.case, library.constants["FASTLORA_ROUTED_TILE"]
        counters = len(self.route.slots) * len(case.slices) * -(-self.pages // 4)
        parts = counters * case.splits * size if case.splits > 1 else 1
        return harness.guarded((parts,), torch.float32), harness.guarded((counters,), torch.int32).zero_()

    def params(self, library, z, workspace):
        case, (parts, counters) = self.case, workspace
        p = library.structs["Routed_shrinkParams"]()
        set_matrix(p.x, self.x)
        set_matrix(p.z, z)
        step = self.A.stride(0)
        set_route(p.route, self.route, self.table, self.ranks, self.columns)
        set_pages(p.a, self.A, step * 8 * len(case.slices), step * 8, step)
        p.partial, p.partials = parts.data_ptr(), parts.numel()
        p.arrived, p.counters = counters.data_ptr(), counters.numel()
        p.k, p.slices, p.splits, p.type = case.k, len(case.slices), case.splits, self.type(library)
        return p

    def output(self):
        width = len(self.case.slices) * 8 * self.pages
        return harness.guarded((len(self.route.slots), width), torch.float32, width + self.case.pad)

    def run(self, library, schedule, workspace=None):
        """z of one launch, written into NaNs."""
        z, (parts, counters) = self.output(), workspace or self.workspace(library)
        tensors = self.inputs() | dict(x=(self.x, 0), a=(self.A, 0), z=(z, 1), parts=(parts, 1), counters=(counters, 1))
        library.launch("launch_routed_shrink", self.params(library, z, (parts, counters)), tensors, schedule)
        assert not counters.any(), "counters are not back at zero"
        for t in (z, parts, counters):
            assert not t.numel() or harness.outside(t) == 0, "wrote outside"
        assert torch.isnan(z[self.used :]).all(), "wrote outside the entries"
        return z[: self.used]


SMALLEST = Case(((((0, 1.0)),),), 1, (1,), (1,))
CASES = [
    replace(SMALLEST, name="smallest"),
    Case(MIXED, name="compositions"),
    Case([[(i % 6, 1.0)] for i in range(19)], 139, dtype=torch.float16, name="a token each, odd K"),
    Case([[(0, 1.0)]] * 35 + [[]] * 3 + [[(4, 1.0), (2, 1.0)]] * 17, 136, name="several tiles"),
    Case(MIXED[:4], 300, splits=2, room=True, name="splits, in buffers with room"),
    Case([[(4, 1.0)], [(0, 1.0)]], 700, splits=4, dtype=torch.float16, name="splits beyond a page of ranks"),
    Case([[(4, 1.0)]] * 3, 200, slices=(8, 16, 3), splits=2, name="slices"),
    Case([[(1, 1.0)]] * 2, 100, splits=3, name="splits without columns"),
    Case([[(0, 1.0)]], 0, splits=2, name="no columns"),
    Case(MIXED, shift=1, name="bases off the grid"),
    Case(MIXED, 67, pad=3, name="padded rows off the grid"),
    Case(MIXED, 67, pad=5, name="padded rows on the grid"),
    Case([[(3, 1.0)], [(9, 1.0)]], splits=2, name="no ranks"),
]


def both(cases):
    """Each case exact and random."""
    for case in cases:
        for exact in (True, False):
            yield replace(case, exact=exact, name=f"{case}{', exact' if exact else ''}")


CANCEL = Case([[(4, 1.0), (0, 1.0)]] * 3, 1024, splits=4, cancel=True, name="halves cancel")


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*both(CASES), CANCEL], ids=str)
def test_routed_shrink(case, mode):
    """Right, and the same bits in whatever order threads and blocks run, two launches in a row on one workspace."""
    problem, library, first = Problem(case), harness.library(mode), None
    (truth, size), workspace = problem.shrunk(), problem.workspace(library)
    for schedule in SCHEDULES[mode]:
        z = problem.run(library, schedule, workspace)
        assert_close(z, truth, size, case.exact)
        first = z if first is None else first
        assert torch.equal(z.view(torch.int32), first.view(torch.int32)), f"schedule {schedule} gives other bits"


def test_z_of_a_token_is_its_own():
    """The same bits whoever shares a token's tile."""
    alone, shared = (Problem(Case([[(4, 1.0)]] * n, 300, splits=3)) for n in (1, 30))
    shared.rng.manual_seed(1)
    shared.fill(shared.x)
    for name in ("A", "x"):
        getattr(alone, name).copy_(getattr(shared, name)[-len(getattr(alone, name)) :])
    alone.table = shared.table
    a, b = (problem.run(harness.library(), 3) for problem in (alone, shared))
    assert torch.equal(a[0], b[-1])


def far(t):
    """The same in rows gigabytes apart: the last lies beyond 2^31 elements."""
    return harness.far_apart(*t.shape, t.dtype, 2**32 // len(t)).copy_(t)


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", ["x", "A", "z"])
def test_far_apart(name):
    problem, library = Problem(Case([[(0, 1.0), (1, 1.0)]] * 3, 40, ranks=(8, 16))), harness.library()
    tensors = {
        key: far(t) if key == name else t for key, t in dict(x=problem.x, A=problem.A, z=problem.output()).items()
    }
    problem.x, problem.A, workspace = tensors["x"], tensors["A"], problem.workspace(library)
    declared = problem.inputs() | {key: (t, 1) for key, t in tensors.items()}
    library.launch("launch_routed_shrink", problem.params(library, tensors["z"], workspace), declared, 2)
    assert_close(tensors["z"], *problem.shrunk(), False)


REFUSALS = [
    ("NULL", "x.data", None),
    ("NULL", "z.data", None),
    ("NULL", "a.data", None),
    ("NULL", "route.order", None),
    ("NULL", "route.tiles", None),
    ("NULL", "route.ranks", None),
    ("NULL", "route.table.data", None),
    ("NULL", "partial", None),
    ("NULL", "arrived", None),
    ("MISALIGNED", "z.data", lambda v: v + 2),
    ("MISALIGNED", "a.data", lambda v: v + 1),
    ("MISALIGNED", "route.order", lambda v: v + 4),
    ("MISALIGNED", "route.slots", lambda v: v + 2),
    ("FOREIGN", "x.data", "foreign"),
    ("FOREIGN", "a.data", "foreign"),
    ("FOREIGN", "route.offsets", "foreign"),
    ("FOREIGN", "route.table.data", "foreign"),
    pytest.param("FOREIGN", "route.slots", "elsewhere", marks=harness.ON_THE_HOST),
    pytest.param("FOREIGN", "arrived", "elsewhere", marks=harness.ON_THE_HOST),
    ("SHAPE", "route.m", -1),
    ("SHAPE", "route.count", -1),
    ("SHAPE", "route.entries", -1),
    ("SHAPE", "route.pages", -1),
    ("SHAPE", "a.row", -1),
    ("SHAPE", "k", -1),
    ("SHAPE", "slices", -1),
    ("SHAPE", "splits", 0),
    ("SHAPE", "type", 2),
    ("SHAPE", "z.stride", 39),
    ("TOO_LARGE", "route.count", 2**31),
    ("TOO_LARGE", "a.page", 2**31),
    ("TOO_LARGE", "slices", 65536),
    ("TOO_LARGE", "route.entries", 2**30),
    ("WORKSPACE", "partials", lambda v: v - 1),
    ("WORKSPACE", "counters", lambda v: v - 1),
]


@pytest.mark.parametrize("status, path, value", REFUSALS)
def test_refusals(status, path, value):
    library, problem = harness.library(), Problem(Case(MIXED, 40, splits=2))
    z, workspace = problem.output(), problem.workspace(library)
    params = problem.params(library, z, workspace)
    tensors = problem.inputs() | {str(i): (t, 1) for i, t in enumerate([problem.x, problem.A, z, *workspace])}
    library.declare(tensors)
    assert harness.refused(library, "launch_routed_shrink", params, path, value) == f"FASTLORA_{status}"
    assert torch.isnan(z).all(), "refused, and written all the same"


@pytest.mark.parametrize("field", [None, "route.m", "route.count", "route.entries", "route.pages", "slices"])
def test_nothing_to_do(field):
    """None of them is a launch, nor a refusal; without params there is one."""
    library, problem = harness.library(), Problem(Case([[(0, 1.0)]], 40))
    params = problem.params(library, None, problem.workspace(library))
    library.declare(problem.inputs() | dict(a=(problem.A, 0)))
    if field is None:
        assert library.call("launch_routed_shrink", None) == library.constants["FASTLORA_NULL"]
    else:
        *steps, last = field.split(".")
        setattr(getattr(params, steps[0]) if steps else params, last, 0)
        assert library.call("launch_routed_shrink", params) == 0
