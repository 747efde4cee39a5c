"""An embedding's update on the emulator, against float64: y in place, ids outside, alignment, refusals."""

import functools
from dataclasses import dataclass, replace

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, assert_close, set_matrix

SCHEDULES = {"plain": (0, 1, 2, 3), "checked": (0, 3), "gpu": (0, 1)}
OUTSIDE = (-1, 2**31, -(2**62), 2**40 + 3)


@dataclass(frozen=True)
class Case:
    m: int
    ranks: int = 16
    columns: int = 72
    vocab: int = 50
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    cancel: bool = False
    gate: str = ""  # "", "row", "token"
    z: bool = True
    outside: bool = False  # every third id
    shift: int = 0  # elements off the grid of 64 bytes
    pad: int = 0  # elements between rows
    name: str = ""

    def __str__(self):
        return self.name or f"{self.m} x {self.columns} of {self.ranks} from {self.vocab}"


class Problem:
    """Guarded tensors of a case, and the float64 truth."""

    def __init__(self, case):
        self.case = case
        rng = torch.Generator().manual_seed(0)
        tensor = functools.partial(harness.draw, case, rng)
        self.before, self.a = tensor(case.m, case.columns), tensor(case.ranks, case.vocab)
        self.b, self.g = tensor(case.columns, case.ranks), None
        if case.gate:
            self.g = tensor(case.m if case.gate == "token" else 1, case.ranks, dtype=torch.float32, shift=0)
        if case.cancel:
            half = case.ranks // 2
            self.a[half:], self.b[:, half:] = self.a[:half], -self.b[:, :half]
        self.ids = harness.guarded((case.m,), torch.int64)
        self.ids.copy_(torch.randint(0, max(case.vocab, 1), (case.m,), generator=rng))
        self.ids[-1:] = case.vocab - 1
        if case.outside:
            wrong = self.ids[::3]
            wrong.copy_(torch.tensor([case.vocab, *OUTSIDE]).repeat(case.m)[: len(wrong)])
        self.scale = 2.0 if case.exact else 1.25
        self.inside = (self.ids >= 0) & (self.ids < case.vocab)
        self.before[~self.inside] = -0.0  # which + 0 is not
        self.z = torch.zeros(case.m, case.ranks, dtype=torch.float64, device=DEVICE)
        self.z[self.inside] = self.a.double().t()[self.ids[self.inside]]
        # gated in fp32, then rounded once, as the shrink's zg
        gated = self.z.float() * self.scale * (1 if self.g is None else self.g)
        gated, b, y = gated.to(case.dtype).double(), self.b.double(), self.before.double()
        self.y, self.size = y + gated @ b.t(), y.abs() + gated.abs() @ b.abs().t()

    def params(self, library, y, z):
        case = self.case
        p = library.structs["GatherParams"]()
        for name, t in dict(y=y, a=self.a, b=self.b, g=self.g, z=z).items():
            set_matrix(getattr(p, name), t)
        if case.gate == "row":
            p.g.stride = 0
        p.ids, p.scale = self.ids.data_ptr(), self.scale
        p.m, p.ranks, p.columns, p.vocab = case.m, case.ranks, case.columns, case.vocab
        p.type = library.constants["FASTLORA_FP16" if case.dtype == torch.float16 else "FASTLORA_BF16"]
        return p

    def outputs(self):
        case = self.case
        y = harness.guarded(self.before.shape, case.dtype, case.columns + case.pad, case.shift).copy_(self.before)
        z = harness.guarded((case.m, case.ranks), torch.float32, case.ranks + case.pad) if case.z else None
        return y, z

    def tensors(self, y, z):
        given = dict(a=(self.a, 0), b=(self.b, 0), g=(self.g, 0), ids=(self.ids, 0))
        return given | dict(y=(y, 1), z=(z, 1))

    def run(self, library, schedule):
        """(y, z) after one launch; z was NaN."""
        y, z = self.outputs()
        library.launch("launch_gather", self.params(library, y, z), self.tensors(y, z), schedule)
        for t in (y, z):
            assert t is None or harness.outside(t) == 0, "wrote outside"
        return y, z

    def check(self, y, z):
        rows = self.inside
        assert_close(y[rows], self.y[rows], self.size[rows], self.case.exact)
        assert torch.equal(bits(y)[~rows], bits(self.before)[~rows]), "refused: an id outside, and y has other bits"
        if z is not None:
            assert_close(z, self.z, self.z.abs(), True)


def bits(t):
    return t.contiguous().view(torch.int16)


SMALLEST = Case(1, 1, 1, 1)
CASES = [
    SMALLEST,
    Case(35, 8, 136, gate="token"),
    Case(33, 33, 300, dtype=torch.float16, gate="row"),
    Case(16, 70, 40, gate="token", z=False),
    Case(20, 8, 64, outside=True, gate="token", name="ids outside"),
    Case(7, 3, 20, 0, name="no vocabulary"),
    Case(20, 8, 40, shift=1, outside=True, name="bases off the grid"),
    Case(20, 5, 43, pad=3, gate="token", name="padded rows off the grid"),
    Case(20, 8, 43, pad=5, name="padded rows on the grid"),
    Case(20, 40, 0, name="z alone"),
]


def both(cases):
    """Each case exact and random."""
    for case in cases:
        for exact in (True, False):
            yield replace(case, exact=exact, name=f"{case}{', exact' if exact else ''}")


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*both(CASES), Case(20, 64, cancel=True, name="halves cancel")], ids=str)
def test_gather(case, mode):
    """Right, and the same bits in whatever order threads and blocks run."""
    problem, first = Problem(case), None
    for schedule in SCHEDULES[mode]:
        y, z = problem.run(harness.library(mode), schedule)
        problem.check(y, z)
        first = y if first is None else first
        assert torch.equal(bits(y), bits(first)), f"schedule {schedule} gives other bits"


def test_it_is_the_embedding():
    """ids from 0 to the last one, each once: the update of the whole table."""
    problem = Problem(Case(50, 8, 40, exact=True))
    problem.ids.copy_(torch.arange(50))
    y, z = problem.run(harness.library(), 1)
    assert torch.equal(z, F.embedding(problem.ids, problem.a.t()).float())
    delta = 2.0 * (problem.b.float() @ problem.a.float()).t()
    assert torch.equal(y, (problem.before.float() + delta).to(y.dtype))


@pytest.mark.parametrize("name", ["a", "b", "g"])
def test_what_no_token_names_is_not_read(name):
    """NaN in other columns of a, in gates of rows outside, in the gaps; y's other columns keep NaN and −0."""
    problem = Problem(Case(20, 8, 24, gate="token", outside=True, pad=8))
    named = torch.zeros(50, dtype=torch.bool, device=DEVICE)
    named[problem.ids[problem.inside]] = True
    if name == "a":
        problem.a[:, ~named] = torch.nan
    elif name == "g":
        problem.g[~problem.inside] = torch.nan
    else:
        problem.b.as_strided((24, 8), problem.b.stride(), problem.b.storage_offset() + 8)[:-1] = torch.nan
    problem.check(*problem.run(harness.library(), 2))


def test_an_infinite_scale_stays_with_its_ranks():
    """Ranks beyond the last are zeros, not infinity times zero."""
    problem = Problem(Case(4, 3, 9, exact=True))
    problem.a.fill_(1), problem.b.fill_(1)
    problem.scale = float("inf")
    y, _ = problem.run(harness.library(), 0)
    assert torch.isinf(y).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", ["y", "z", "a", "b", "g"])
def test_rows_far_apart(name):
    """Offsets beyond 2^31 elements."""
    problem, library = Problem(Case(20, 8, 20, gate="token")), harness.library()
    y, z = problem.outputs()
    tensors = dict(y=y, z=z, a=problem.a, b=problem.b, g=problem.g)
    rows, columns = tensors[name].shape
    far = harness.far_apart(rows, columns, tensors[name].dtype, 2**31 // (rows - 1) + 8)
    tensors[name] = far.copy_(tensors[name])
    problem.a, problem.b, problem.g = (tensors[key] for key in "abg")
    params = problem.params(library, tensors["y"], tensors["z"])
    library.launch("launch_gather", params, problem.tensors(tensors["y"], tensors["z"]), 2)
    problem.check(tensors["y"], tensors["z"])


REFUSALS = [
    *(("NULL", f"{name}.data", None) for name in "yab"),
    ("NULL", "ids", None),
    *(("MISALIGNED", f"{name}.data", lambda v: v + 1) for name in "yab"),
    *(("MISALIGNED", f"{name}.data", lambda v: v + 2) for name in "gz"),
    ("MISALIGNED", "ids", lambda v: v + 4),
    *(("FOREIGN", f"{name}.data", "foreign") for name in "yabgz"),
    ("FOREIGN", "ids", "foreign"),
    pytest.param("FOREIGN", "a.data", "elsewhere", marks=harness.ON_THE_HOST),
    *(("SHAPE", name, -1) for name in ("m", "ranks", "columns", "vocab", "type")),
    ("SHAPE", "type", 2),
    ("SHAPE", "y.stride", 39),
    ("SHAPE", "z.stride", 7),
    *(("TOO_LARGE", name, 2**31) for name in ("m", "ranks", "columns", "vocab")),
    *(("TOO_LARGE", f"{name}.stride", 2**31) for name in "yabgz"),
    ("TOO_LARGE", "columns", 65535 * 256 + 1),
]


@pytest.mark.parametrize("status, path, value", REFUSALS)
def test_refusals(status, path, value):
    library, problem = harness.library(), Problem(Case(20, 8, 40, gate="token"))
    y, z = problem.outputs()
    params = problem.params(library, y, z)
    library.declare({name: (t, 1) for name, (t, _) in problem.tensors(y, z).items()})
    assert harness.refused(library, "launch_gather", params, path, value) == f"FASTLORA_{status}"
    assert torch.equal(y, problem.before) and torch.isnan(z).all(), "refused, and written all the same"


def test_no_params():
    library = harness.library()
    assert library.call("launch_gather", None) == library.constants["FASTLORA_NULL"]


@pytest.mark.parametrize("m, ranks, columns", [(0, 8, 40), (20, 0, 40)])
def test_nothing_to_do(m, ranks, columns):
    library, problem = harness.library(), Problem(Case(max(m, 1), max(ranks, 1), columns))
    y, z = problem.outputs()
    params = problem.params(library, y, z)
    params.m, params.ranks = m, ranks
    library.declare({name: (t, 1) for name, (t, _) in problem.tensors(y, z).items()})
    assert library.call("launch_gather", params) == 0 and torch.equal(y, problem.before) and torch.isnan(z).all()
