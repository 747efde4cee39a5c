"""Decode on the emulator, against float64: dense, gated and routed, the order of sums, counters, refusals."""

from dataclasses import dataclass, replace

import harness
import pytest
import torch
from harness import assert_close, set_matrix, set_parts

from fastlora import Pages, Route
from fastlora.ops.routed import lora_routed_forward_reference

SCHEDULES = {"plain": (0, 1, 2, 3, 7), "checked": (3,), "gpu": (0, 1)}


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    ranks: tuple = (16,)  # of the parts; with lists of the slots
    columns: tuple = ()  # of the parts; none: one part of n
    splits: int = 1
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    cancel: bool = False
    gate: str = ""  # "", "row", "token"
    lists: tuple = ()  # (slot, gate) pairs of each token
    bias: bool = False
    column_scale: bool = False
    shift: int = 0
    pad: int = 0
    name: str = ""

    def __str__(self):
        return self.name or f"{self.m}x{self.n}x{self.k} {'+'.join(map(str, self.ranks))} split {self.splits}"


class Problem:
    """Guarded tensors of a case, its workspace, and the float64 truth."""

    def __init__(self, case):
        self.case, self.columns = case, case.columns or (case.n,)
        rng = torch.Generator().manual_seed(0)

        def tensor(*shape, dtype=case.dtype, shift=case.shift, pad=case.pad, scale=1.0):
            if case.exact:
                values = torch.randint(-2, 3, shape, generator=rng).double()
            else:
                values = torch.randn(shape, generator=rng, dtype=torch.float64) * scale
            return harness.guarded(shape, dtype, shape[-1] + pad, shift).copy_(values)

        even = max(case.k, 1) ** -0.5
        self.x, self.w = tensor(case.m, case.k), tensor(case.n, case.k, scale=even)
        parts = len(self.columns)
        # rank rows of each slot and part, or of each part
        self.a = [[tensor(r, case.k, scale=even) for _ in range(parts if case.lists else 1)] for r in case.ranks]
        widths = [case.n] * len(case.ranks) if case.lists else self.columns
        self.b = [tensor(c, r, scale=0.5) for c, r in zip(widths, case.ranks, strict=True)]
        if case.cancel:
            # The second half of K undoes the first: what is left is rounding, and shows the order of the sum.
            half = case.k // 2
            self.x[:, half:] = self.x[:, :half]
            for t in (self.w, *(a for own in self.a for a in own)):
                t[:, half:] = -t[:, :half]
        self.bias = tensor(case.n) if case.bias else None
        self.c = tensor(case.n, dtype=torch.float32, shift=0) if case.column_scale else None
        rows = case.m if case.gate == "token" else 1
        self.g = tensor(rows, sum(case.ranks), dtype=torch.float32, shift=0) if case.gate else None
        self.scale, self.tables = 2.0 if case.exact else 1.25, {}
        if case.lists:
            self.page()
        self.solve()

    def page(self):
        """The adapters in shuffled pages; other pages, and rows beyond a rank, are NaN: none may be read."""
        case, parts = self.case, len(self.columns)
        most = max(-(-max(case.ranks) // 8), 1)
        free = torch.randperm(2 * most * len(case.ranks), generator=torch.Generator().manual_seed(1)).tolist()
        self.A = harness.guarded((len(free) * parts * 8, case.k), case.dtype, case.k + case.pad, case.shift)
        self.B = harness.guarded((len(free) * 8, case.n), case.dtype, case.n + case.pad, case.shift)
        table = torch.full((len(case.ranks), most), -1, dtype=torch.int32)
        for slot, r in enumerate(case.ranks):
            for row in range(r):
                if row % 8 == 0:
                    table[slot, row // 8] = free.pop()
                page = int(table[slot, row // 8])
                self.B[page * 8 + row % 8] = self.b[slot][:, row]
                for i in range(parts):
                    self.A[(page * parts + i) * 8 + row % 8] = self.a[slot][i][row]
        self.route = Route.from_lists([list(entries) for entries in case.lists], device=harness.DEVICE)
        self.route = self.route.with_room(len(self.route.slots) + 3, len(self.route.tiles) + 2)
        scales = torch.tensor([0.5, 1.0, 2.0] * len(case.ranks))[: len(case.ranks)]
        self.tables = dict(table=table, ranks=torch.tensor(case.ranks, dtype=torch.int32), scales=scales)
        names = ("tiles", "offsets", "slots", "order", "gates")
        self.tables |= {name: getattr(self.route, name).detach() for name in names}
        self.tables = {name: t.to(harness.DEVICE) for name, t in self.tables.items()}

    def updates(self):
        """(tokens, first column, a, b, what z is multiplied by, what z b is) of each adapter and part."""
        case, everyone, column, rank = self.case, slice(0, self.case.m), 0, 0
        for i, width in enumerate(self.columns):
            if not case.lists:
                g = 1 if self.g is None else self.g[:, rank : rank + case.ranks[i]].double()
                yield everyone, column, self.a[i][0], self.b[i], self.scale * g, 1.0
                rank += case.ranks[i]
            for token, entries in enumerate(case.lists):
                for slot, gate in entries:
                    if slot < len(case.ranks):
                        b, factor = self.b[slot][column : column + width], gate * float(self.tables["scales"][slot])
                        yield slice(token, token + 1), column, self.a[slot][i], b, 1.0, factor
            column += width

    def solve(self):
        case, x, w = self.case, self.x.double(), self.w.double()
        y, size, rounding = x @ w.t(), x.abs() @ w.abs().t(), torch.zeros(case.m, case.n, dtype=torch.float64)
        step = max(-(-(-(-case.k // 64)) // case.splits) * 64, 1)
        for tokens, column, a, b, before, after in self.updates():
            a, b, inside = a.double(), b.double().t(), (tokens, slice(column, column + len(b)))
            y[inside] += (x[tokens] @ a.t() * before) @ b * after
            size[inside] += (x[tokens].abs() @ a.abs().t() * abs(before)) @ b.abs() * abs(after)
            for k in range(0, case.k, step):
                z = x[tokens, k : k + step] @ a[:, k : k + step].t() * before
                rounding[inside] += z.abs() @ b.abs() * abs(after)
        # Each split's z is rounded to the type of b: half a unit in the last of 8 or 11 bits.
        size += rounding * 2.0 ** (-8 if case.dtype == torch.bfloat16 else -11) / 3e-6
        c = 1 if self.c is None else self.c.double()
        self.y = y * c + (0 if self.bias is None else self.bias.double())
        self.size = size * abs(c) + self.y.abs()

    def workspace(self, library):
        """(parts, counters): as large as the library asks for, and the counters zero."""
        counters = library.library.fastlora_decode_counters(len(self.columns), max(self.columns))
        parts = counters * self.case.splits * library.constants["FASTLORA_TILE"] if self.case.splits > 1 else 1
        return harness.guarded((parts,), torch.float32), harness.guarded((counters,), torch.int32).zero_()

    def params(self, library, y, workspace):
        case, (parts, counters) = self.case, workspace
        p = library.structs["DecodeParams"]()
        for name, t in dict(x=self.x, w=self.w, y=y, g=self.g).items():
            set_matrix(getattr(p, name), t)
        if case.gate == "row":
            p.g.stride = 0
        if case.lists:
            sliced, starts = len(self.columns), [sum(self.columns[:i]) for i in range(len(self.columns))]
            set_parts(p.parts, [self.A[8 * i :] for i in range(sliced)], [0] * sliced, self.columns)
            for place, start in zip(p.b, starts, strict=False):
                set_matrix(place, self.B[:, start:])
            for name, t in self.tables.items():
                setattr(p.route, name, t.data_ptr())
            p.route.a_page, p.route.b_page = 8 * sliced * self.A.stride(0), 8 * self.B.stride(0)
            p.route.table_stride, p.route.known = self.tables["table"].stride(0), len(case.ranks)
            p.route.count = len(self.tables["tiles"])
        else:
            set_parts(p.parts, [a[0] for a in self.a], case.ranks, self.columns)
            for place, b in zip(p.b, self.b, strict=False):
                set_matrix(place, b)
        p.bias = None if self.bias is None else self.bias.data_ptr()
        p.column_scale = None if self.c is None else self.c.data_ptr()
        p.partial, p.partials = parts.data_ptr(), parts.numel()
        p.arrived, p.counters = counters.data_ptr(), counters.numel()
        p.m, p.n, p.k, p.count, p.splits, p.scale = case.m, case.n, case.k, len(self.columns), case.splits, self.scale
        p.type = library.constants["FASTLORA_FP16" if case.dtype == torch.float16 else "FASTLORA_BF16"]
        return p

    def tensors(self, y, workspace):
        inputs = dict(x=self.x, w=self.w, bias=self.bias, c=self.c, g=self.g, **self.tables)
        matrices = (self.A, self.B) if self.case.lists else [t for a, b in zip(self.a, self.b, strict=True) for t in (*a, b)]
        inputs |= {f"m{i}": t for i, t in enumerate(matrices)}
        written = dict(y=y, parts=workspace[0], counters=workspace[1])
        return {name: (t, 0) for name, t in inputs.items()} | {name: (t, 1) for name, t in written.items()}

    def output(self):
        return harness.guarded((self.case.m, self.case.n), self.case.dtype, self.case.n + self.case.pad, self.case.shift)

    def run(self, library, schedule, workspace=None):
        """y of one launch, written into NaNs."""
        y, workspace = self.output(), workspace or self.workspace(library)
        library.launch("launch_decode", self.params(library, y, workspace), self.tensors(y, workspace), schedule)
        assert not workspace[1].any(), "counters are not back at zero"
        for t in (y, *workspace):
            assert harness.outside(t) == 0, "wrote outside"
        return y


def tokens(*lists):
    return tuple(tuple((slot, gate) for slot, gate in entries) for entries in lists)


SMALLEST = Case(1, 1, 1, (1,))
SLOTS = (4, 1, 17, 0, 33, 70)
CASES = [
    SMALLEST,
    Case(3, 100, 100, (3,), gate="row", bias=True),
    Case(17, 136, 168, (16,), splits=2, gate="token", column_scale=True),
    Case(64, 64, 328, (64,), splits=3, dtype=torch.float16, bias=True, column_scale=True),
    Case(5, 72, 130, (130,), splits=2, gate="token", name="three passes"),
    Case(48, 8, 576, (72,), dtype=torch.float16, name="two passes, ring wraps"),
    Case(16, 40, 1096, (16,), splits=2, name="ring wraps in each split"),
    Case(8, 72, 100, (16,), splits=5, bias=True, name="splits without columns"),
    Case(4, 20, 0, (3,), splits=2, bias=True, name="no base"),
    Case(20, 72, 130, (0,), splits=2, name="no adapter"),
    Case(20, 40, 72, (8,), shift=1, gate="token", bias=True, column_scale=True, name="bases off the grid"),
    Case(20, 44, 67, (5,), pad=3, gate="token", bias=True, name="padded rows off the grid"),
    Case(20, 40, 67, (5,), pad=5, name="padded rows on the grid"),
    Case(9, 206, 72, (4, 0, 20, 9), (130, 38, 0, 38), splits=2, gate="token", bias=True, name="slices"),
    Case(9, 80, 40, (2,) * 8, (10,) * 8, gate="row", name="eight slices"),
    Case(21, 72, 130, SLOTS, splits=2, lists=tokens(*([(i % 6, 0.5 + i % 2)] for i in range(21))), name="routed"),
    Case(6, 200, 72, SLOTS, (70, 0, 130), lists=tokens([(2, 2.0), (0, 1.0)], [], [(4, 0.5)], [(0, -1.0)], [(2, 1.0),
         (0, 2.0)], []), bias=True, column_scale=True, name="routed, slices"),
    Case(40, 64, 72, SLOTS, lists=tokens(*[[(2, 1.0)]] * 40), dtype=torch.float16, name="routed, more than a tile"),
    Case(2, 40, 67, SLOTS, lists=tokens([(5, 1.0), (9, 1.0), (3, 1.0), (5, 0.5)], [(1, 1.0)]), shift=1, pad=3,
         splits=2, name="routed off the grid, a slot that is not there"),
    Case(3, 40, 72, SLOTS, lists=((), (), ()), splits=2, bias=True, name="routed, base alone"),
]  # fmt: skip
CANCEL = [
    Case(16, 64, 512, (16,), splits=4, cancel=True, gate="token", name="halves cancel"),
    Case(3, 70, 1024, SLOTS, splits=8, cancel=True, lists=tokens(*[[(2, 1.0), (0, 0.5)]] * 3), name="they too, routed"),
]


def both(cases):
    for case in cases:
        for exact in (True, False):
            yield replace(case, exact=exact, name=f"{case}{', exact' if exact else ''}")


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*both(CASES), *CANCEL], ids=str)
def test_decode(case, mode):
    """Right, and the same bits in whatever order threads and blocks run, launches in a row on one workspace."""
    problem, library, first = Problem(case), harness.library(mode), None
    workspace = problem.workspace(library)
    for schedule in SCHEDULES[mode]:
        y = problem.run(library, schedule, workspace)
        assert_close(y, problem.y, problem.size, case.exact)
        first = y if first is None else first
        assert torch.equal(y.view(torch.int16), first.view(torch.int16)), f"schedule {schedule} gives other bits"


def routed(*lists, **kwargs):
    return Problem(Case(len(lists), 40, 130, SLOTS, splits=2, lists=tokens(*lists), **kwargs))


def test_the_reference_agrees():
    problem = Problem(next(c for c in CASES if c.name == "routed, slices"))
    A, B = problem.A.view(-1, len(problem.columns), 8, problem.case.k), problem.B.view(-1, 8, problem.case.n)
    table, ranks, scales = (problem.tables[name] for name in ("table", "ranks", "scales"))
    pages = Pages(A.double(), B.double(), table, ranks, scales.double(), torch.full_like(ranks, -1))
    route, nothing = problem.route, torch.zeros((), dtype=torch.float64)
    given = problem.x.double(), problem.w.double(), (), (), nothing, None, route.tensors, route.gates.double(), ()
    y, _ = lora_routed_forward_reference(*given, problem.columns, list(pages[:6]))
    torch.testing.assert_close(y * problem.c + problem.bias.double(), problem.y)


def test_a_token_alone_has_the_same_bits():
    lists = [[(2, 1.0), (0, 0.5)], [(5, 1.0)], [], [(0, 0.5)], [(2, 1.0), (0, 2.0)], [(4, 1.0)]]
    problem = routed(*lists)
    y = problem.run(harness.library(), 0)
    for token, own in enumerate(lists):
        alone = routed(own)
        for name in ("x", "w", "A", "B"):
            getattr(alone, name).copy_(getattr(problem, name)[token : token + 1] if name == "x" else getattr(problem, name))
        assert torch.equal(alone.run(harness.library(), 0)[0], y[token])


def test_an_adapter_that_is_not_finite_stays_with_its_tokens():
    problem = routed([(0, 1.0)], [(2, 1.0)], [], [(1, 1.0)], [(2, 0.5)])
    clean = problem.run(harness.library(), 0)
    problem.B[int(problem.tables["table"][2, 1]) * 8] = float("inf")
    y = problem.run(harness.library(), 0)
    others = [0, 2, 3]
    assert torch.equal(y[others], clean[others]) and not y[[1, 4]].isfinite().any()


def test_z_is_rounded_after_the_gate():
    """z ⊙ g is 257, in bfloat16 256, and −256: 0, and 1 if it were not rounded. Each split rounds its own part."""
    problem = Problem(Case(1, 8, 128, (2,), gate="row", splits=2))
    for t in (problem.x, problem.w, problem.a[0][0]):
        t.zero_()
    problem.x[0, 0], problem.x[0, 64], problem.scale = 1, 1, 1.0
    problem.a[0][0][:, 0] = torch.tensor([257 / 4, -64.0])
    problem.a[0][0][0, 0], problem.a[0][0][0, 1], problem.x[0, 1] = 64, 0.25, 1
    problem.g.fill_(4)
    problem.b[0].fill_(1)
    assert (problem.run(harness.library(), 0) == 0).all()
    problem.a[0][0][0, 1], problem.a[0][0][0, 64] = 0, 0.25
    assert (problem.run(harness.library(), 0) == 1).all()


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", ["x", "w", "y", "a", "b", "A", "B"])
def test_rows_far_apart(name):
    """Offsets beyond 2^31 elements."""
    problem, library = routed([(5, 1.0)], [(2, 1.0)]) if name in "AB" else Problem(Case(4, 40, 40, (8,))), harness.library()
    y, workspace = problem.output(), problem.workspace(library)
    near = dict(vars(problem), y=y, a=problem.a[0][0], b=problem.b[0])[name]
    far = harness.far_apart(*near.shape, torch.bfloat16, 2**31 // (near.shape[0] - 1) + 8).copy_(near)
    if name in "ab":
        getattr(problem, name)[0] = far if name == "b" else [far]
    elif name != "y":
        setattr(problem, name, far)
    y = far if name == "y" else y
    tensors = {key: (t, 1) for key, (t, _) in problem.tensors(y, workspace).items()}
    library.launch("launch_decode", problem.params(library, y, workspace), tensors, 2)
    assert_close(y, problem.y, problem.size, False)


REFUSALS = [
    ("NULL", "x.data", None),
    ("NULL", "w.data", None),
    ("NULL", "y.data", None),
    ("NULL", "parts.0.m.data", None),
    ("NULL", "b.1.data", None),
    ("NULL", "partial", None),
    ("MISALIGNED", "g.data", lambda v: v + 2),
    ("MISALIGNED", "partial", lambda v: v + 4),
    ("FOREIGN", "bias", "foreign"),
    ("FOREIGN", "column_scale", "foreign"),
    ("FOREIGN", "g.data", "foreign"),
    ("SHAPE", "n", 41),
    ("SHAPE", "m", -1),
    ("SHAPE", "count", 9),
    ("SHAPE", "type", 2),
    ("SHAPE", "splits", 0),
    ("SHAPE", "splits", 65536),
    ("SHAPE", "y.stride", 39),
    ("SHAPE", "parts.1.rank", 7),
    ("SHAPE", "route.count", -1),
    ("SHAPE", "route.count", 1),
    ("TOO_LARGE", "m", 65),
    ("TOO_LARGE", "b.0.stride", 2**31),
    ("WORKSPACE", "partials", lambda v: v - 1),
    ("WORKSPACE", "counters", lambda v: v - 1),
]
ROUTED = [
    ("SHAPE", "g.data", lambda v: 64),
    ("SHAPE", "parts.0.ranks", 8),
    ("TOO_LARGE", "route.count", 129),
    ("TOO_LARGE", "route.a_page", 2**31),
    ("NULL", "parts.0.m.data", None),
    ("NULL", "b.0.data", None),
    ("MISALIGNED", "route.order", lambda v: v + 4),
    *(("FOREIGN", f"route.{name}", "foreign") for name in ("tiles", "offsets", "slots", "order", "gates")),
    *(("FOREIGN", f"route.{name}", "foreign") for name in ("table", "ranks", "scales")),
]


@pytest.mark.parametrize("dense, status, path, value", [(d, *r) for d in (1, 0) for r in (REFUSALS if d else ROUTED)])
def test_refusals(dense, status, path, value):
    library = harness.library()
    case = Case(20, 40, 72, (8, 4), (30, 10), 2, gate="token", bias=True, column_scale=True)
    problem = Problem(case) if dense else routed([(2, 1.0)])
    y, workspace = problem.output(), problem.workspace(library)
    library.declare(problem.tensors(y, workspace))
    params = problem.params(library, y, workspace)
    assert harness.refused(library, "launch_decode", params, path, value) == f"FASTLORA_{status}"
    assert torch.isnan(y).all(), "refused, and written all the same"


@pytest.mark.parametrize("m, n", [(0, 40), (20, 0)])
def test_nothing_to_do(m, n):
    problem, library = Problem(Case(m, n, 24, (8,))), harness.library()
    workspace = problem.workspace(library)
    library.declare(problem.tensors(problem.output(), workspace))
    assert library.call("launch_decode", problem.params(library, torch.empty(m, n), workspace)) == 0
    assert library.call("launch_decode", None) == library.constants["FASTLORA_NULL"]
