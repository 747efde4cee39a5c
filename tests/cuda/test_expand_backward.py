"""dy's one pass on the emulator, against float64: t, dz, dg, db, the order of sums, counters, workspace, refusals."""

import ctypes
import functools
from dataclasses import dataclass, replace

import harness
import pytest
import torch
from harness import assert_close, set_matrix, set_parts

from fastlora.ops.expand import lora_expand_backward_reference

SCHEDULES = {"plain": (0, 1, 3, 7), "checked": (0, 3), "gpu": (0, 1)}
WIDE = torch.float64


@dataclass(frozen=True)
class Case:
    m: int
    columns: tuple = (40,)
    ranks: tuple = (8,)
    splits: int = 1
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    cancel: bool = False
    gate: str = ""  # "", "row", "token"
    wide: bool = False  # db in fp32
    without: tuple = ()  # outputs that nobody wants
    shift: int = 0
    pad: int = 0
    name: str = ""

    def __str__(self):
        return self.name or f"{self.m}x{'+'.join(map(str, self.columns))} {self.ranks} split {self.splits}"


class Problem:
    """Guarded tensors of a case, its workspace, and the float64 truth: {output: (value, size)}."""

    def __init__(self, case):
        self.case, self.n, self.total = case, sum(case.columns), sum(case.ranks)
        rng = torch.Generator().manual_seed(0)
        tensor = functools.partial(harness.draw, case, rng)
        self.dy, self.z = tensor(case.m, self.n), tensor(case.m, self.total, dtype=torch.float32, shift=0)
        self.b = [tensor(n, r) for n, r in zip(case.columns, case.ranks, strict=True)]
        if case.cancel:
            # The second half of each sum undoes the first: what is left is rounding, and shows the order of the sum.
            rows, half = case.m // 2, self.n // 2
            self.dy[:, half:] = self.dy[:, :half]
            self.dy[rows:] = self.dy[:rows]
            self.z[rows:] = -self.z[:rows]
            self.b[0][half:] = -self.b[0][:half]
        rows = case.m if case.gate == "token" else 1
        self.g = tensor(rows, self.total, dtype=torch.float32, shift=0) if case.gate else None
        self.scale = 2.0 if case.exact else 1.25
        g = self.z.new_ones(1, 1) if self.g is None else self.g
        zg = (self.z * self.scale * g).to(case.dtype).to(WIDE)
        self.truth, dys, zs = {}, self.dy.to(WIDE).split(case.columns, 1), zg.split(case.ranks, 1)
        t, size = (
            torch.cat([f(dy) @ f(b.to(WIDE)) for dy, b in zip(dys, self.b, strict=True)], 1)
            for f in (lambda v: v, torch.abs)
        )
        for name, factor in dict(t=1, dz=self.scale * g.to(WIDE), dg=self.z.to(WIDE)).items():
            self.truth[name] = t * factor, size * abs(factor * torch.ones(()))
        for i, (dy, z) in enumerate(zip(dys, zs, strict=True)):
            self.truth[f"db{i}"] = dy.t() @ z, dy.abs().t() @ z.abs()

    def outputs(self):
        case = self.case
        types = dict(t=torch.float32, dz=case.dtype, dg=torch.float32)
        return {
            name: harness.guarded(
                value.shape,
                types.get(name, torch.float32 if case.wide else case.dtype),
                value.shape[1] + case.pad,
                case.shift,
            )
            for name, (value, _) in self.truth.items()
            if name not in case.without
        }

    def params(self, library, outputs):
        case, p = self.case, library.structs["Expand_backwardParams"]()
        for name, t in dict(dy=self.dy, z=self.z, g=self.g).items():
            set_matrix(getattr(p, name), t)
        for name, t in outputs.items():
            set_matrix(p.db[int(name[2:])] if name[:2] == "db" else getattr(p, name), t)
        if case.gate == "row":
            p.g.stride = 0
        set_parts(p.parts, self.b, case.ranks, case.columns)
        p.m, p.count, p.splits, p.scale, p.fp32_db = case.m, len(case.ranks), case.splits, self.scale, case.wide
        p.type = library.constants["FASTLORA_FP16" if case.dtype == torch.float16 else "FASTLORA_BF16"]
        return p

    def workspace(self, library):
        """(parts, counters): as large as the library asks for, and the counters zero."""
        counters = ctypes.c_longlong()
        params = self.params(library, {})
        floats = library.library.fastlora_expand_backward_workspace(ctypes.byref(params), ctypes.byref(counters))
        return harness.guarded((max(floats, 1),), torch.float32), harness.guarded(
            (counters.value,), torch.int32
        ).zero_()

    def prepare(self, library, workspace):
        """(params, outputs, tensors to declare)"""
        outputs, (parts, counters) = self.outputs(), workspace
        params = self.params(library, outputs)
        params.partial, params.partials = parts.data_ptr(), parts.numel()
        params.arrived, params.counters = counters.data_ptr(), counters.numel()
        inputs = dict(dy=self.dy, z=self.z, g=self.g) | {f"b{i}": b for i, b in enumerate(self.b)}
        tensors = {f"in {name}": (t, 0) for name, t in inputs.items()}
        tensors |= {n: (t, 1) for n, t in outputs.items()} | dict(parts=(parts, 1), counters=(counters, 1))
        return params, outputs, tensors

    def run(self, library, schedule, workspace=None):
        """The outputs of one launch, written into NaNs."""
        workspace = workspace or self.workspace(library)
        params, outputs, tensors = self.prepare(library, workspace)
        library.launch("launch_expand_backward", params, tensors, schedule)
        assert not workspace[1].any(), "counters are not back at zero"
        for t in (*outputs.values(), *workspace):
            assert harness.outside(t) == 0, "wrote outside"
        return outputs

    def check(self, outputs):
        for name, t in outputs.items():
            assert_close(t, *self.truth[name], self.case.exact)


SMALLEST = Case(1, (1,), (1,))
CASES = [
    SMALLEST,
    Case(3, (100,), (3,), gate="row"),
    Case(63, (136,), (16,), 2, gate="token"),
    Case(300, (200,), (20,), 3, gate="token", wide=True),
    Case(257, (72,), (64,), dtype=torch.float16),
    Case(520, (60,), (5,), gate="row"),
    Case(16, (40,), (130,), 2, dtype=torch.float16, gate="row"),
    Case(260, (70, 38, 68), (4, 66, 9), 2, gate="token", name="slices"),
    Case(9, (36, 0, 64), (8, 5, 16), 2, name="an empty slice"),
    Case(260, (64, 72, 64), (8, 0, 8), name="a slice without an adapter"),
    Case(5, (10,) * 8, (2,) * 8, wide=True, name="eight slices"),
    Case(20, (500,), (16,), 3, name="ring wraps"),
    Case(20, (70,), (8,), 5, name="splits without columns"),
    Case(0, (40,), (4,), 2, name="no rows"),
    Case(20, (0,), (4,), name="no columns"),
    Case(20, (72,), shift=1, name="bases off the grid"),
    Case(20, (67, 32), (5, 6), pad=3, gate="token", name="padded rows off the grid"),
    Case(20, (67,), (5,), pad=5, name="padded rows on the grid"),
    Case(260, without=("t", "dz", "dg"), gate="row", name="db alone"),
    Case(260, (40, 30), (8, 8), 2, without=("dz", "db0"), name="without dz and a part's db"),
    Case(20, without=("t", "dg", "db0"), gate="token", name="dz alone"),
]
CANCEL = [
    Case(768, (128,), (16,), 2, cancel=True, name="halves cancel"),
    Case(20, (512,), (8,), 8, cancel=True, name="they too"),
]


def both(cases):
    for case in cases:
        for exact in (True, False):
            yield replace(case, exact=exact, name=f"{case}{', exact' if exact else ''}")


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*both(CASES), *CANCEL], ids=str)
def test_expand_backward(case, mode):
    """Right, and the same bits in whatever order threads and blocks run, launch after launch on one workspace."""
    problem, library, first = Problem(case), harness.library(mode), None
    workspace = problem.workspace(library)
    for schedule in SCHEDULES[mode]:
        outputs = problem.run(library, schedule, workspace)
        problem.check(outputs)
        bits = [t.view(torch.int32 if t.dtype == torch.float32 else torch.int16) for t in outputs.values()]
        first = first or bits
        assert all(map(torch.equal, bits, first)), f"schedule {schedule} gives other bits"


@pytest.mark.parametrize("gate", ["row", "token"])
def test_the_truth_is_the_reference(gate):
    """Of one slice; integers, so z ⊙ g is not rounded and dg comes from dgates."""
    problem = Problem(Case(20, (40, 24), (8, 5), gate=gate, exact=True))
    scaling, inside = torch.tensor(problem.scale, dtype=WIDE), slice(8, 13)
    z, g = problem.z[:, inside].to(WIDE), problem.g[:, inside].to(WIDE)
    dz, (db,), _, dg = lora_expand_backward_reference(
        problem.dy.to(WIDE), z, [problem.b[1]], scaling, g, [], (40, 64), None, (True,) * 4
    )
    truth = {name: value for name, (value, _) in problem.truth.items()}
    assert torch.equal(dz, truth["dz"][:, inside]) and torch.equal(db.to(WIDE), truth["db1"].to(db.dtype).to(WIDE))
    total = truth["dg"][:, inside] if gate == "token" else truth["dg"][:, inside].sum(0, keepdim=True)
    assert torch.equal(dg, total * problem.scale)


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", ["dy", "b", "z", "dz", "db0"])
def test_rows_far_apart(name):
    """Offsets beyond 2^31 elements."""
    problem, library = Problem(Case(4)), harness.library()
    params, outputs, tensors = problem.prepare(library, problem.workspace(library))
    near = dict(dy=problem.dy, b=problem.b[0], z=problem.z, **outputs)[name]
    far = harness.far_apart(*near.shape, near.dtype, 2**31 // (near.shape[0] - 1) + 8).copy_(near)
    at = dict(b=params.parts[0].m, db0=params.db[0])
    set_matrix(at[name] if name in at else getattr(params, name), far)
    library.launch("launch_expand_backward", params, tensors | {"far": (far, 1)}, 2)
    problem.check(outputs | ({name: far} if name in outputs else {}))


REFUSALS = [
    ("NULL", "dy.data", None),
    ("NULL", "z.data", None),
    ("NULL", "parts.0.m.data", None),
    ("NULL", "partial", None),
    ("NULL", "arrived", None),
    ("MISALIGNED", "dy.data", lambda v: v + 1),
    ("MISALIGNED", "z.data", lambda v: v + 2),
    ("MISALIGNED", "t.data", lambda v: v + 2),
    ("MISALIGNED", "dz.data", lambda v: v + 1),
    ("MISALIGNED", "dg.data", lambda v: v + 2),
    ("MISALIGNED", "db.1.data", lambda v: v + 2),
    ("MISALIGNED", "g.data", lambda v: v + 2),
    ("MISALIGNED", "partial", lambda v: v + 4),
    ("FOREIGN", "dy.data", "foreign"),
    ("FOREIGN", "db.0.data", "foreign"),
    pytest.param("FOREIGN", "dg.data", "elsewhere", marks=harness.ON_THE_HOST),
    ("SHAPE", "m", -1),
    ("SHAPE", "count", 9),
    ("SHAPE", "count", -1),
    ("SHAPE", "splits", 0),
    ("SHAPE", "splits", 65536),
    ("SHAPE", "type", 2),
    ("SHAPE", "t.stride", 11),
    ("SHAPE", "dz.stride", 11),
    ("SHAPE", "dg.stride", 11),
    ("SHAPE", "db.1.stride", 3),
    ("SHAPE", "dy.stride", -40),
    ("SHAPE", "parts.1.ranks", -1),
    ("SHAPE", "parts.1.rank", 7),
    ("SHAPE", "parts.1.column", 1),
    ("TOO_LARGE", "m", 2**31),
    ("TOO_LARGE", "m", 2**24),
    ("TOO_LARGE", "dy.stride", 2**31),
    ("TOO_LARGE", "parts.1.ranks", 2**23),
    ("WORKSPACE", "partials", lambda v: v - 1),
    ("WORKSPACE", "counters", lambda v: v - 1),
]


@pytest.mark.parametrize("status, path, value", REFUSALS)
def test_refusals(status, path, value):
    library = harness.library()
    problem = Problem(Case(260, (24, 16), (8, 4), 2, gate="token", wide=True))
    params, outputs, tensors = problem.prepare(library, problem.workspace(library))
    library.declare(tensors)
    assert harness.refused(library, "launch_expand_backward", params, path, value) == f"FASTLORA_{status}"
    assert all(torch.isnan(t).all() for t in outputs.values()), "refused, and written all the same"


def test_no_params():
    library = harness.library()
    assert library.call("launch_expand_backward", None) == library.constants["FASTLORA_NULL"]


@pytest.mark.parametrize("ranks", [(), (0,)])
def test_nothing_to_do(ranks):
    library, problem = harness.library(), Problem(Case(20, (40,), (0,)))
    params = problem.params(library, {})
    params.count = len(ranks)
    library.declare({"dy": (problem.dy, 0)})
    assert library.call("launch_expand_backward", params) == 0
