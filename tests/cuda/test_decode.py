"""Decode on the emulator, against float64: dense, gated and routed, the order of sums, counters, refusals."""

from dataclasses import dataclass, replace

import harness
import pytest
import torch
from harness import assert_close, set_matrix, set_parts
from routes import set_pages, set_route

from fastlora.ops.routed import Route, lora_routed_forward_reference

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
    lists: list | tuple = ()  # (slot, gate) pairs of each token
    bias: bool = False
    column_scale: bool = False
    shift: int = 0
    pad: int = 0
    name: str = ""


class Problem:
    """Guarded tensors of a case, its workspace, and the float64 truth."""

    def __init__(self, case):
        self.case, self.columns = case, case.columns or (case.n,)
        self.starts = [sum(self.columns[:i]) for i in range(len(self.columns))]
        rng = torch.Generator().manual_seed(0)

        def tensor(*shape, dtype=case.dtype, shift=case.shift, pad=case.pad, scale=1.0):
            small, wide = torch.randint(-2, 3, shape, generator=rng), torch.randn(shape, generator=rng) * scale
            return harness.guarded(shape, dtype, shape[-1] + pad, shift).copy_(small if case.exact else wide)

        even, parts = max(case.k, 1) ** -0.5, len(self.columns)
        self.x, self.w = tensor(case.m, case.k), tensor(case.n, case.k, scale=even)
        # [rank rows for each part] of each slot, or of each part, and what they expand to
        self.down = [[tensor(r, case.k, scale=even) for _ in range(parts if case.lists else 1)] for r in case.ranks]
        widths = [case.n] * len(case.ranks) if case.lists else self.columns
        self.up = [tensor(c, r, scale=0.5) for c, r in zip(widths, case.ranks, strict=True)]
        if case.cancel:
            # The second half of K undoes the first: what is left is rounding, and shows the order of the sum.
            half = case.k // 2
            self.x[:, half:] = self.x[:, :half]
            for t in (self.w, *(a for own in self.down for a in own)):
                t[:, half:] = -t[:, :half]
        self.bias = tensor(case.n) if case.bias else None
        self.c = tensor(case.n, dtype=torch.float32, shift=0) if case.column_scale else None
        shape = case.m if case.gate == "token" else 1, sum(case.ranks)
        self.g = tensor(*shape, dtype=torch.float32, shift=0) if case.gate else None
        self.scale, self.route = 2.0 if case.exact else 1.25, None
        self.a, self.b = [own[0] for own in self.down], self.up
        if case.lists:
            self.page()
        self.solve()

    def page(self):
        """The adapters in shuffled pages; other pages, and rows beyond a rank, are NaN: none may be read."""
        case, parts, most = self.case, len(self.columns), max(-(-r // 8) for r in self.case.ranks)
        free = torch.randperm(2 * most * len(case.ranks), generator=torch.Generator().manual_seed(1)).tolist()
        A = harness.guarded((len(free) * parts * 8, case.k), case.dtype, case.k + case.pad, case.shift)
        B = harness.guarded((len(free) * 8, case.n), case.dtype, case.n + case.pad, case.shift)
        table = torch.full((len(case.ranks), most), -1, dtype=torch.int32)
        for slot, r in enumerate(case.ranks):
            for row in range(r):
                table[slot, row // 8] = page = int(table[slot, row // 8]) if row % 8 else free.pop()
                B[page * 8 + row % 8] = self.up[slot][:, row]
                for i in range(parts):
                    A[(page * parts + i) * 8 + row % 8] = self.down[slot][i][row]
        self.a, self.b = [A], [B]
        route = Route.from_lists(case.lists, device=harness.DEVICE)
        self.route = route.with_room(len(route.slots) + 3, len(route.tiles) + 2)
        tables = table, torch.tensor(case.ranks, dtype=torch.int32), 2.0 ** torch.arange(-2, 4)
        self.table, self.ranks, self.scales = (t.to(harness.DEVICE) for t in tables)

    def updates(self):
        """(tokens, first column, a, b, what z is multiplied by, what z b is) of each adapter and part."""
        case, known = self.case, len(self.case.ranks)
        for i, (start, width) in enumerate(zip(self.starts, self.columns, strict=True)):
            if not case.lists:
                g = 1 if self.g is None else self.g.double().split(case.ranks, 1)[i]
                yield slice(None), start, self.down[i][0], self.up[i], self.scale * g, 1.0
            for token, slot, gate in ((t, *e) for t, entries in enumerate(case.lists) for e in entries if e[0] < known):
                b, factor = self.up[slot][start : start + width], gate * float(self.scales[slot])
                yield slice(token, token + 1), start, self.down[slot][i], b, 1.0, factor

    def solve(self):
        x, w = self.x.double(), self.w.double()
        y, size = x @ w.t(), x.abs() @ w.abs().t()
        for tokens, column, a, b, before, after in self.updates():
            a, b, inside = a.double(), b.double().t(), (tokens, slice(column, column + len(b)))
            y[inside] += (x[tokens] @ a.t() * before) @ b * after
            size[inside] += (x[tokens].abs() @ a.abs().t() * abs(before)) @ b.abs() * abs(after)
        c = 1 if self.c is None else self.c.double()
        self.y = y * c + (0 if self.bias is None else self.bias.double())
        self.size = size * abs(c) + self.y.abs()

    def outputs(self, library):
        """y, NaN, and a workspace as large as the library asks for, its counters zero."""
        case, counters = self.case, library.library.fastlora_decode_counters(len(self.columns), max(self.columns))
        y = harness.guarded((case.m, case.n), case.dtype, case.n + case.pad, case.shift)
        parts = counters * case.splits * library.constants["FASTLORA_TILE"] if case.splits > 1 else 1
        return y, harness.guarded((parts,), torch.float32), harness.guarded((counters,), torch.int32).zero_()

    def params(self, library, outputs):
        case, (y, parts, counters) = self.case, outputs
        p = library.structs["DecodeParams"]()
        for name, t in dict(x=self.x, w=self.w, y=y, g=self.g).items():
            set_matrix(getattr(p, name), t)
        p.g.stride *= case.gate == "token"
        none = [None] * len(self.columns), [0] * len(self.columns)
        set_parts(p.parts, *(none if self.route else (self.a, case.ranks)), self.columns)
        named = dict(bias=self.bias, column_scale=self.c, partial=parts, arrived=counters)
        if self.route:
            (A,), (B,) = self.a, self.b
            set_route(p.route, self.route, self.table, self.ranks)
            set_pages(p.a_pages, A, 8 * len(self.columns) * A.stride(0), 8 * A.stride(0), A.stride(0))
            set_pages(p.b_pages, B, 8 * B.stride(0), 0, B.stride(0))
            named |= dict(gates=self.route.gates, scales=self.scales)
        for place, b in zip(p.b, self.b if not self.route else (), strict=False):
            set_matrix(place, b)
        for name, t in named.items():
            setattr(p, name, None if t is None else t.data_ptr())
        p.partials, p.counters = parts.numel(), counters.numel()
        p.m, p.n, p.k, p.count, p.splits, p.scale = case.m, case.n, case.k, len(self.columns), case.splits, self.scale
        p.type = library.constants["FASTLORA_FP16" if case.dtype == torch.float16 else "FASTLORA_BF16"]
        return p

    def tensors(self, outputs):
        inputs = dict(x=self.x, w=self.w, bias=self.bias, c=self.c, g=self.g)
        if self.route:
            inputs |= {name: getattr(self.route, name) for name in ("order", "tiles", "offsets", "slots", "gates")}
            inputs |= dict(table=self.table, ranks=self.ranks, scales=self.scales)
        inputs |= {f"m{i}": t for i, t in enumerate([*self.a, *self.b])}
        return {name: (t, 0) for name, t in inputs.items()} | {f"out{i}": (t, 1) for i, t in enumerate(outputs)}

    def run(self, library, schedule, outputs=None):
        """y of one launch, written into NaNs."""
        outputs = outputs or self.outputs(library)
        outputs[0].fill_(torch.nan)
        library.launch("launch_decode", self.params(library, outputs), self.tensors(outputs), schedule)
        assert not outputs[2].any(), "counters are not back at zero"
        assert not any(map(harness.outside, outputs)), "wrote outside"
        return outputs[0].clone()


SMALLEST = Case(1, 1, 1, (1,), name="smallest")
SLOTS = (4, 1, 17, 0, 33, 70)
MIXED = [[(2, 1.0), (0, 0.5)], [(5, 1.0)], [], [(0, -0.5)], [(2, 1.0), (0, 2.0)], [(4, 1.0)]]
CASES = [
    SMALLEST,
    Case(3, 100, 100, (3,), gate="row", bias=True, name="a row of gates"),
    Case(17, 136, 168, (16,), splits=2, gate="token", column_scale=True, name="gates of tokens"),
    Case(64, 64, 328, (64,), splits=3, dtype=torch.float16, bias=True, column_scale=True, name="as large as one pass"),
    Case(5, 72, 130, (130,), splits=2, gate="token", name="three passes"),
    Case(48, 8, 1096, (72,), splits=2, dtype=torch.float16, name="two passes, ring wraps"),
    Case(8, 72, 100, (16,), splits=5, bias=True, name="splits without columns"),
    Case(4, 20, 0, (3,), splits=2, bias=True, name="no base"),
    Case(20, 72, 130, (0,), splits=2, name="no adapter"),
    Case(20, 40, 72, (8,), shift=1, gate="token", bias=True, column_scale=True, name="bases off the grid"),
    Case(20, 44, 67, (5,), pad=3, gate="token", bias=True, name="padded rows off the grid"),
    Case(9, 206, 72, (4, 0, 20, 9), (130, 38, 0, 38), splits=2, gate="token", bias=True, name="slices"),
    Case(9, 80, 40, (2,) * 8, (10,) * 8, gate="row", name="eight slices"),
    Case(21, 72, 130, SLOTS, splits=2, lists=[[(i % 6, 0.5 + i % 2)] for i in range(21)], name="routed"),
    Case(6, 200, 72, SLOTS, (70, 0, 130), lists=MIXED, bias=True, column_scale=True, name="routed, slices"),
    Case(40, 64, 72, SLOTS, lists=[[(2, 1.0)]] * 40, dtype=torch.float16, name="routed, more than a tile"),
    Case(2, 40, 67, SLOTS, lists=[[(5, 1.0), (9, 1.0), (3, 1.0), (5, 0.5)], [(1, 1.0)]], shift=1, pad=3,
         splits=2, name="routed off the grid, a slot that is not there"),
    Case(3, 40, 72, SLOTS, lists=[[]] * 3, splits=2, bias=True, name="routed, base alone"),
]  # fmt: skip
BOTH = [replace(c, exact=e, name=c.name + ", exact" * e) for c in CASES for e in (True, False)]
ROUTED = Case(6, 40, 130, SLOTS, splits=2, lists=MIXED)
CANCEL = [
    Case(16, 64, 512, (16,), splits=4, cancel=True, gate="token", name="halves cancel"),
    Case(3, 70, 1024, SLOTS, splits=8, cancel=True, lists=[[(2, 1.0), (0, 0.5)]] * 3, name="they too, routed"),
]


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*BOTH, *CANCEL], ids=lambda case: case.name)
def test_decode(case, mode):
    """Right, and the same bits in whatever order threads and blocks run, launches in a row on one workspace."""
    problem, library, first = Problem(case), harness.library(mode), None
    outputs = problem.outputs(library)
    for schedule in SCHEDULES[mode]:
        y = problem.run(library, schedule, outputs)
        assert_close(y, problem.y, problem.size, case.exact)
        first = y if first is None else first
        assert torch.equal(y.view(torch.int16), first.view(torch.int16)), f"schedule {schedule} gives other bits"


def test_the_reference_agrees():
    problem = Problem(next(c for c in CASES if c.name == "routed, slices"))
    route = Route.from_lists(MIXED, device=harness.DEVICE)
    pages = problem.a[0].double().view(-1, 3, 8, problem.case.k), problem.b[0].double().view(-1, 8, problem.case.n)
    pages += problem.table, problem.ranks, problem.scales.double(), torch.full_like(problem.ranks, -1)
    lists = None, route.tensors, route.gates.double(), ()
    given = problem.x.double(), problem.w.double(), (), (), torch.ones(()), *lists
    y, _ = lora_routed_forward_reference(*given, problem.columns, pages)
    torch.testing.assert_close(y * problem.c + problem.bias.double(), problem.y)


def test_tokens_do_not_see_each_other():
    """Alone each has the same bits, and an infinity stays with those that use its adapter."""
    problem = Problem(ROUTED)
    y = problem.run(harness.library(), 0)
    for token, own in enumerate(MIXED):
        alone = Problem(replace(ROUTED, m=1, lists=[own]))
        alone.x, alone.w, alone.a, alone.b = problem.x[token : token + 1], problem.w, problem.a, problem.b
        assert torch.equal(alone.run(harness.library(), 0)[0], y[token])
    problem.b[0][int(problem.table[2, 1]) * 8] = float("inf")
    other = problem.run(harness.library(), 0)
    assert torch.equal(other[[1, 2, 3, 5]], y[[1, 2, 3, 5]]) and not other[[0, 4]].isfinite().any()


def test_z_is_not_rounded():
    """z ⊙ g is 192.75, in bfloat16 193, and −192: 0.75, in one split and in two."""
    problem = Problem(Case(1, 8, 128, (2,), gate="row", splits=2))
    for value, t in ((1, problem.x), (0, problem.w), (3, problem.g), (1, problem.b[0])):
        t.fill_(value)
    problem.scale = 1.0
    for column in (1, 64):
        a = problem.a[0].zero_()
        a[0, 0], a[1, 0], a[0, column] = 64, -64, 0.25
        assert (problem.run(harness.library(), 0) == 0.75).all()


def test_ranks_that_are_not_there_make_no_nan():
    problem = Problem(SMALLEST)
    for value, t in ((torch.inf, problem.x), (1, problem.w), (1, problem.a[0]), (1, problem.b[0])):
        t.fill_(value)
    assert problem.run(harness.library(), 0) == torch.inf


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", "xwyabAB")
def test_rows_far_apart(name):
    """Offsets beyond 2^31 elements."""
    problem = Problem(ROUTED if name in "AB" else Case(4, 40, 40, (8,)))
    truth, size, key, library = problem.y, problem.size, name.lower(), harness.library()
    y, *workspace = problem.outputs(library)
    near = dict(x=problem.x, w=problem.w, y=y, a=problem.a[0], b=problem.b[0])[key]
    far = harness.far_apart(*near.shape, torch.bfloat16, 2**31 // (near.shape[0] - 1) + 8).copy_(near)
    vars(problem)[key] = [far] if key in "ab" else far
    outputs = far if name == "y" else y, *workspace
    tensors = {name: (t, 1) for name, (t, _) in problem.tensors(outputs).items()}
    library.launch("launch_decode", problem.params(library, outputs), tensors, 2)
    assert_close(outputs[0], truth, size, False)


ROUTE = " ".join(f"route.{name}" for name in ("tiles", "offsets", "slots", "order", "ranks", "table.data"))
REFUSALS = [
    ("NULL", "x.data w.data y.data parts.0.m.data b.1.data partial arrived", "a_pages.data b_pages.data scales", None),
    ("MISALIGNED", "g.data arrived partial", "route.order", lambda v: v + 2),
    ("FOREIGN", "bias column_scale g.data", ROUTE + " gates scales a_pages.data", "foreign"),
    ("SHAPE", "m route.count", "m", -1),
    ("SHAPE", "n count splits y.stride", "", 0),
    ("SHAPE", "type parts.1.rank", "g.data route.m", 2),
    ("SHAPE", "splits", "", 65536),
    ("NULL", "", "parts.0.ranks", 2),
    ("TOO_LARGE", "m", "route.count", lambda v: v + 126),
    ("TOO_LARGE", "b.0.stride", "a_pages.page b_pages.page route.table.stride", 2**31),
    ("WORKSPACE", "partials counters", "", lambda v: v - 1),
]


@pytest.mark.parametrize("status, dense, paged, value", REFUSALS)
def test_refusals(status, dense, paged, value):
    case, library = Case(20, 40, 72, (8, 4), (30, 10), 2, gate="token", bias=True, column_scale=True), harness.library()
    for problem, paths in ((Problem(case), dense), (Problem(ROUTED), paged)):
        outputs = problem.outputs(library)
        library.declare(problem.tensors(outputs))
        for path in paths.split():
            params = problem.params(library, outputs)
            assert harness.refused(library, "launch_decode", params, path, value) == f"FASTLORA_{status}", path
        assert torch.isnan(outputs[0]).all(), "refused, and written all the same"


def test_nothing_to_do():
    library = harness.library()
    for m, n in ((0, 40), (20, 0)):
        problem = Problem(Case(m, n, 24, (8,)))
        outputs = problem.outputs(library)
        library.declare(problem.tensors(outputs))
        assert library.call("launch_decode", problem.params(library, outputs)) == 0
    assert library.call("launch_decode", None) == library.constants["FASTLORA_NULL"]
