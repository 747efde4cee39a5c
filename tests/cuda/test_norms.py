"""DoRA's norms on the emulator, against float64: values, the order of sums, counters, workspace, refusals."""

import functools
from dataclasses import dataclass, replace

import harness
import pytest
import torch
from harness import assert_close, set_matrix

SCHEDULES = {"plain": (0, 1, 3, 6), "checked": (0, 3), "gpu": (0, 1)}


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    ranks: int = 16
    splits: int = 1
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    cancel: bool = False
    gate: bool = False
    shift: int = 0
    pad: int = 0
    name: str = ""

    def __str__(self):
        return self.name or f"{self.n}x{self.k} of {self.ranks} split {self.splits}"


class Problem:
    """Guarded tensors of a case, its workspace, and the float64 truth."""

    def __init__(self, case):
        self.case = case
        rng = torch.Generator().manual_seed(0)
        tensor = functools.partial(harness.draw, case, rng)
        self.w, self.a, self.b = tensor(case.n, case.k), tensor(case.ranks, case.k), tensor(case.n, case.ranks)
        self.g = tensor(1, case.ranks, dtype=torch.float32, shift=case.shift, pad=0)[0] if case.gate else None
        self.scale = 2.0 if case.exact else 1.25
        a, b = self.a.double(), self.b.double() * (1 if self.g is None else self.g.double())
        delta = self.scale * (b @ a)
        if case.cancel:
            # ΔW undoes the first half of w: what is left there is w's rounding, and nothing where all is exact.
            self.w[:, : case.k // 2] = -delta[:, : case.k // 2]
            # The second half is as small, so that the first one's rounding shows.
            self.w[:, case.k // 2 :], self.a[:, case.k // 2 :], delta[:, case.k // 2 :] = 2.0**-8, 0.0, 0.0
        w = self.w.double()
        self.norms, self.size = (w + delta).norm(dim=1), (w.abs() + self.scale * (b.abs() @ a.abs())).norm(dim=1)

    def workspace(self, library):
        """(parts, counters): as large as the library asks for, and the counters zero."""
        rows = library.constants["FASTLORA_NORMS_ROWS"]
        counters = -(-self.case.n // rows)
        parts = counters * self.case.splits * 8 * rows if self.case.splits > 1 else 1
        return harness.guarded((parts,), torch.float32), harness.guarded((counters,), torch.int32).zero_()

    def params(self, library, norms, workspace):
        case, (parts, counters) = self.case, workspace
        p = library.structs["NormsParams"]()
        for name, t in dict(w=self.w, a=self.a, b=self.b).items():
            set_matrix(getattr(p, name), t)
        p.g, p.norms = None if self.g is None else self.g.data_ptr(), norms.data_ptr()
        p.partial, p.partials = parts.data_ptr(), parts.numel()
        p.arrived, p.counters = counters.data_ptr(), counters.numel()
        p.n, p.k, p.ranks, p.splits, p.scale = case.n, case.k, case.ranks, case.splits, self.scale
        p.type = library.constants["FASTLORA_FP16" if case.dtype == torch.float16 else "FASTLORA_BF16"]
        return p

    def output(self):
        return harness.guarded((self.case.n,), torch.float32, shift=self.case.shift)

    def tensors(self, norms, workspace):
        given = dict(w=self.w, a=self.a, b=self.b, g=self.g)
        written = dict(norms=norms, parts=workspace[0], counters=workspace[1])
        return {name: (t, 0) for name, t in given.items()} | {name: (t, 1) for name, t in written.items()}

    def run(self, library, schedule, workspace=None):
        """The norms after one launch, written into NaNs."""
        norms, workspace = self.output(), workspace or self.workspace(library)
        params = self.params(library, norms, workspace)
        library.launch("launch_norms", params, self.tensors(norms, workspace), schedule)
        assert not workspace[1].any(), "counters are not back at zero"
        for t in (norms, *workspace):
            assert harness.outside(t) == 0, "wrote outside"
        return norms

    def check(self, norms):
        assert_close(norms, self.norms, self.size, self.case.exact)


SMALLEST = Case(1, 1, 1)
CASES = [
    SMALLEST,
    Case(130, 200, 8, 3),
    Case(129, 72, 33, 2, torch.float16, gate=True),
    Case(17, 328, 16, 2, gate=True),
    Case(9, 100, 16, 5, name="splits without columns"),
    Case(4, 0, 3, 2, name="no columns"),
    Case(5, 70, 0, name="no ranks: the norms of w"),
    Case(20, 72, 8, shift=1, gate=True, name="bases off the grid"),
    Case(20, 67, 5, pad=3, name="padded rows off the grid"),
    Case(20, 67, 5, pad=5, name="padded rows on the grid"),
]


def both(cases):
    """Each case exact and random."""
    for case in cases:
        for exact in (True, False):
            yield replace(case, exact=exact, name=f"{case}{', exact' if exact else ''}")


CANCEL = [
    Case(16, 256, 16, 4, cancel=True, name="ΔW undoes half of w"),
    Case(16, 256, 16, 4, torch.float16, cancel=True, gate=True, name="it too, gated"),
    Case(16, 256, 3, 4, cancel=True, exact=True, name="it leaves nothing"),
]


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*both(CASES), *CANCEL], ids=str)
def test_norms(case, mode):
    """Right, and the same bits in whatever order threads and blocks run, launches in a row on one workspace."""
    problem, library, first = Problem(case), harness.library(mode), None
    workspace = problem.workspace(library)
    for schedule in SCHEDULES[mode]:
        norms = problem.run(library, schedule, workspace)
        problem.check(norms)
        first = norms if first is None else first
        assert torch.equal(norms, first), f"schedule {schedule} gives other bits"


def test_an_infinite_row_is_its_own():
    """Neither another row's norm nor what lies beside b sees it."""
    problem = Problem(Case(20, 72, 8, 2, pad=8))
    problem.w[3, 5] = problem.b[7, 2] = float("inf")
    problem.b.as_strided((19, 8), problem.b.stride(), problem.b.storage_offset() + 8).fill_(torch.nan)
    norms = problem.run(harness.library(), 3)
    kept = torch.ones(20, dtype=torch.bool)
    kept[[3, 7]] = False
    assert_close(norms[kept], problem.norms[kept], problem.size[kept], False)
    assert torch.isinf(norms[3]) and not torch.isfinite(norms[7])


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", ["w", "a", "b"])
def test_rows_far_apart(name):
    """Offsets beyond 2^31 elements."""
    problem, library = Problem(Case(20, 40, 8)), harness.library()
    t = getattr(problem, name)
    setattr(problem, name, harness.far_apart(*t.shape, t.dtype, 2**31 // (len(t) - 1) + 8).copy_(t))
    norms, workspace = problem.output(), problem.workspace(library)
    params = problem.params(library, norms, workspace)
    library.launch("launch_norms", params, problem.tensors(norms, workspace), 2)
    problem.check(norms)


REFUSALS = [
    *(("NULL", path, None) for path in ("w.data", "a.data", "b.data", "norms", "partial", "arrived")),
    *(("MISALIGNED", f"{name}.data", lambda v: v + 1) for name in "wab"),
    *(("MISALIGNED", path, lambda v: v + 2) for path in ("g", "norms", "arrived")),
    ("MISALIGNED", "partial", lambda v: v + 4),
    *(("FOREIGN", path, "foreign") for path in ("w.data", "a.data", "b.data", "g", "norms", "partial", "arrived")),
    pytest.param("FOREIGN", "w.data", "elsewhere", marks=harness.ON_THE_HOST),
    *(("SHAPE", name, -1) for name in ("n", "k", "ranks", "type")),
    ("SHAPE", "type", 2),
    ("SHAPE", "splits", 0),
    ("SHAPE", "splits", 65536),
    *(("TOO_LARGE", path, 2**31) for path in ("n", "k", "ranks", "w.stride", "a.stride", "b.stride")),
    ("WORKSPACE", "partials", lambda v: v - 1),
    ("WORKSPACE", "counters", lambda v: v - 1),
]


@pytest.mark.parametrize("status, path, value", REFUSALS)
def test_refusals(status, path, value):
    library, problem = harness.library(), Problem(Case(130, 72, 8, 2, gate=True))
    norms, workspace = problem.output(), problem.workspace(library)
    params = problem.params(library, norms, workspace)
    library.declare({name: (t, 1) for name, (t, _) in problem.tensors(norms, workspace).items()})
    assert harness.refused(library, "launch_norms", params, path, value) == f"FASTLORA_{status}"
    assert torch.isnan(norms).all(), "refused, and written all the same"


def test_no_params_and_no_rows():
    library, problem = harness.library(), Problem(SMALLEST)
    assert library.call("launch_norms", None) == library.constants["FASTLORA_NULL"]
    norms, workspace = problem.output(), problem.workspace(library)
    params = problem.params(library, norms, workspace)
    library.declare({name: (t, 1) for name, (t, _) in problem.tensors(norms, workspace).items()})
    params.n, params.norms = 0, None
    assert library.call("launch_norms", params) == 0 and torch.isnan(norms).all()
