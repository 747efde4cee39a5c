"""The expand of tokens with adapters of their own, on the emulator against float64; both kernels against the op."""

from dataclasses import replace

import harness
import pytest
import test_routed_shrink as shrink
import torch
from harness import DEVICE, assert_close, set_matrix
from routes import set_pages, set_route
from test_routed_shrink import MIXED, Case

from fastlora.ops.routed import lora_routed_forward_reference

SCHEDULES = {"plain": (0, 1, 2, 3), "checked": (0, 3), "gpu": (0, 1)}


class Problem(shrink.Problem):
    """The shrink's, with any z, scales and y, and the float64 truth."""

    def __init__(self, case):
        super().__init__(case)
        n, k, rng = sum(case.slices), len(case.slices), self.rng
        self.before = self.fill(self.empty(len(case.lists), n))
        scales = torch.rand(len(case.ranks), generator=rng) + 0.5
        self.scales = (scales.log2().round().exp2() if case.exact else scales).to(DEVICE)
        # NaN beyond a rank: what is no rank row is not read
        self.z = self.empty(len(self.route.slots), k * 8 * self.pages, dtype=torch.float32)
        self.bias = self.fill(self.empty(n)) if case.bias else None
        self.y, self.size = self.before.double(), self.before.double().abs()
        # what y was before its bias, and what that can be off by
        base, off = self.y.clone(), self.size.clone()
        if case.bias:
            base, off = base - self.bias.double(), off + self.bias.double().abs()
        entry = 0
        for token, entries in enumerate(case.lists):
            for slot, gate in entries:
                column, known = 0, slot < len(case.ranks)
                if known:
                    self.y[token] += gate * self.d[slot] * base[token]
                    self.size[token] += (gate * self.d[slot]).abs() * off[token]
                for i, width in enumerate(case.slices if known else ()):
                    z, r = self.z[entry, i * 8 * self.pages :][: case.ranks[slot]], slice(column, column + width)
                    self.fill(z)
                    if case.cancel:
                        z[len(z) // 2 :], half = z[: len(z) // 2], len(z) // 2
                        self.cancelled(slot, half)
                    gated = (z * (torch.tensor(gate) * self.scales[slot])).to(case.dtype).double()
                    # b is rounded once more where it is multiplied by c
                    b = (self.b[slot].float() * (1 + self.d[slot].float()))[:, r].to(case.dtype).double()
                    self.y[token, r] += gated @ b
                    self.size[token, r] += gated.abs() @ b.abs()
                    column += width
                entry += 1

    def cancelled(self, slot, half):
        """The second half of the rank rows undoes the first."""
        self.b[slot][half:] = -self.b[slot][:half]
        for row, values in enumerate(self.b[slot]):
            self.B[int(self.table[slot, row // 8]) * 8 + row % 8] = values

    def params(self, library, y):
        p, step = library.structs["Routed_expandParams"](), self.B.stride(0)
        set_matrix(p.y, y)
        set_matrix(p.z, self.z)
        set_route(p.route, self.route, self.table, self.ranks, self.columns)
        set_pages(p.b, self.B, step * 8, 0, step)
        p.gates, p.scales = self.route.gates.data_ptr(), self.scales.data_ptr()
        p.bias = None if self.bias is None else self.bias.data_ptr()
        p.columns[: len(self.case.slices)] = self.case.slices
        p.count, p.type = len(self.case.slices), self.type(library)
        return p

    def tensors(self, y):
        given = dict(z=self.z, b=self.B, gates=self.route.gates, scales=self.scales, bias=self.bias)
        return self.inputs() | {name: (t, 0) for name, t in given.items()} | {"y": (y, 1)}

    def run(self, library, schedule):
        """y after one launch."""
        y = self.empty(*self.before.shape).copy_(self.before)
        library.launch("launch_routed_expand", self.params(library, y), self.tensors(y), schedule)
        assert harness.outside(y) == 0, "wrote outside"
        bare = torch.tensor([not entries for entries in self.case.lists], device=DEVICE)
        assert torch.equal(y[bare], self.before[bare]), "a token without a list has other bits"
        return y


SMALLEST = shrink.SMALLEST
CASES = [
    replace(SMALLEST, name="smallest"),
    Case(MIXED, name="compositions"),
    Case([[(i % 6, (2.0, -0.5)[i % 5 // 3])] for i in range(19)], slices=(139,), dtype=torch.float16, name="odd N"),
    Case([[(0, 1.0)]] * 35 + [[]] * 3 + [[(4, 0.5), (2, -1.0)]] * 17, slices=(72,), name="several tiles"),
    Case(MIXED[:4], slices=(264,), room=True, name="two blocks of columns, in buffers with room"),
    Case([[(4, 1.0)], [(5, 1.0), (4, 0.5)]], slices=(80, 16, 300), dtype=torch.float16, name="slices"),
    Case([[(4, 1.0)]] * 3, slices=(0, 40, 0, 9), name="empty slices"),
    Case([[(1, 1.0)]] * 3, slices=(5,) * 8, name="eight slices"),
    Case(MIXED, shift=1, slices=(72,), name="bases off the grid"),
    Case(MIXED, shift=4, slices=(72,), name="bases on a grid of 8 bytes"),
    Case(MIXED, pad=3, slices=(67,), name="padded rows off the grid"),
    Case(MIXED, pad=5, slices=(67,), name="padded rows on the grid"),
    Case([[(3, 1.0)], [(9, 1.0)]], name="no ranks"),
    replace(SMALLEST, dora=(0,), name="DoRA, smallest"),
    # a list with and without, one slot twice, one of rank 0, one that is not there
    Case([*MIXED[:4], [(3, 0.5)]], dora=(0, 2, 3), slices=(72,), bias=True, name="DoRA"),
    Case(
        [*([(4, 0.5 + i % 2)] for i in range(17)), [(5, -2.0), (4, 0.5)]],
        slices=(16, 67),
        dtype=torch.float16,
        dora=(4,),
        name="DoRA, gates of its tokens",
    ),
    Case(MIXED[:4], dora=(0, 4), shift=1, pad=2, slices=(264,), bias=True, name="DoRA off the grid"),
]
CANCEL = Case([[(4, 1.0)]] * 17, cancel=True, name="halves cancel")


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*shrink.both(CASES), CANCEL], ids=str)
def test_routed_expand(case, mode):
    """Right, and the same bits in whatever order threads and blocks run."""
    problem, first = Problem(case), None
    for schedule in SCHEDULES[mode]:
        y = problem.run(harness.library(mode), schedule)
        assert_close(y, problem.y, problem.size, case.exact)
        first = y if first is None else first
        assert torch.equal(y.view(torch.int16), first.view(torch.int16)), f"schedule {schedule} gives other bits"


def reference(problem, dtype):
    """(y, z) of lora_routed's reference, which is given the same pages and route."""
    case, route = problem.case, problem.route
    A = problem.A.to(dtype).view(-1, len(case.slices), 8, case.k)
    columns = torch.full_like(problem.ranks, -1) if problem.columns is None else problem.columns
    pages = A, problem.B.to(dtype).view(-1, 8, sum(case.slices)), problem.table, problem.ranks, problem.scales, columns
    x, weight, bias = (None if t is None else t.to(dtype) for t in (problem.x, problem.weight, problem.bias))
    given = x, weight, [], [], torch.ones((), device=DEVICE), bias, route.tensors, route.gates, [], case.slices, pages
    return lora_routed_forward_reference(*given)


@pytest.mark.parametrize("slices", [(40,), (24, 8, 40)], ids=str)
def test_both_halves_are_the_op(slices):
    """The shrink's z through the expand, against lora_routed's reference."""
    case, library = Case(MIXED[:3] * 7, 100, slices=slices, splits=2), harness.library()
    problem = Problem(case)
    problem.z, problem.weight = shrink.Problem(case).run(library, 3), torch.zeros(sum(slices), 100, device=DEVICE)
    y = problem.run(library, 3)
    update, z = reference(problem, torch.float64)
    assert_close(problem.z, z, z.abs() + 30, False)
    truth = problem.before.double() + update
    # z is rounded to bf16, y as well
    assert (y.double() - truth).abs().max() < 2**-8 * (truth.abs().max() + (z.abs().max() * 40**0.5 * 4))
    assert torch.cosine_similarity((y - problem.before).double().flatten(), update.flatten(), 0) > 0.9999


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="reserves memory of the host")
@pytest.mark.parametrize("name", ["y", "B", "z"])
def test_far_apart(name):
    problem, library = Problem(Case([[(0, 1.0), (1, 1.0)]] * 11, ranks=(8, 16), dora=(0, 1))), harness.library()
    tensors = dict(y=problem.before, B=problem.B, z=problem.z)
    tensors[name] = shrink.far(tensors[name])
    problem.B, problem.z = tensors["B"], tensors["z"]
    library.launch("launch_routed_expand", problem.params(library, tensors["y"]), problem.tensors(tensors["y"]), 2)
    assert_close(tensors["y"], problem.y, problem.size, False)


@pytest.mark.parametrize("slot", [-1, 1, 2**31 - 1])
def test_what_the_tables_do_not_hold(slot):
    """A slot that is not in them has no rank, a rank beyond them is cut off: their neighbours are not read."""
    problem = Problem(Case([[(0, 1.0), (9, 1.0)], [(0, 2.0)]], ranks=(40,), dora=(0,)))
    problem.route.slots[1] = slot
    problem.columns = problem.columns.repeat(3)[1:2]
    problem.ranks = torch.tensor([8, 60, 8], dtype=torch.int32, device=DEVICE)[1:2]
    problem.table = torch.cat([0 * problem.table, problem.table, 0 * problem.table])[1:2]
    assert_close(problem.run(harness.library(), 1), problem.y, problem.size, False)


REFUSALS = [
    ("NULL", "y.data", None),
    ("NULL", "z.data", None),
    ("NULL", "b.data", None),
    ("NULL", "gates", None),
    ("NULL", "scales", None),
    ("NULL", "route.tiles", None),
    ("MISALIGNED", "bias", lambda v: v + 1),
    ("MISALIGNED", "route.columns", lambda v: v + 2),
    ("MISALIGNED", "y.data", lambda v: v + 1),
    ("MISALIGNED", "z.data", lambda v: v + 2),
    ("MISALIGNED", "gates", lambda v: v + 2),
    ("FOREIGN", "y.data", "foreign"),
    ("FOREIGN", "z.data", "foreign"),
    ("FOREIGN", "b.data", "foreign"),
    ("FOREIGN", "scales", "foreign"),
    ("FOREIGN", "bias", "foreign"),
    ("FOREIGN", "route.columns", "foreign"),
    ("FOREIGN", "route.ranks", "foreign"),
    pytest.param("FOREIGN", "gates", "elsewhere", marks=harness.ON_THE_HOST),
    ("SHAPE", "route.m", -1),
    ("SHAPE", "route.adapters", -1),
    ("SHAPE", "b.page", -1),
    ("SHAPE", "count", 9),
    ("SHAPE", "count", -1),
    ("SHAPE", "type", 2),
    ("SHAPE", "y.stride", 39),
    ("TOO_LARGE", "b.row", 2**31),
    ("TOO_LARGE", "z.stride", 2**31),
    ("TOO_LARGE", "route.entries", 2**31),
]


@pytest.mark.parametrize("status, path, value", REFUSALS)
def test_refusals(status, path, value):
    library, problem = harness.library(), Problem(Case(MIXED, slices=(16, 24), dora=(0,), bias=True))
    y = problem.before.clone()
    params = problem.params(library, y)
    library.declare(problem.tensors(y))
    assert harness.refused(library, "launch_routed_expand", params, path, value) == f"FASTLORA_{status}"
    assert torch.equal(y, problem.before), "refused, and written all the same"


@pytest.mark.parametrize("columns, status", [((2**31, 4), "TOO_LARGE"), ((-1, 4), "SHAPE"), ((2**24, 4), "TOO_LARGE")])
def test_widths(columns, status):
    library, problem = harness.library(), Problem(Case(MIXED, slices=(16, 24)))
    params = problem.params(library, problem.before)
    params.columns[:2], params.y.stride = columns, 2**30
    library.declare(problem.tensors(problem.before))
    assert library.call("launch_routed_expand", params) == library.constants[f"FASTLORA_{status}"]


@pytest.mark.parametrize("field", [None, "route.m", "route.count", "route.entries", "route.pages", "count"])
def test_nothing_to_do(field):
    """None of them is a launch, nor a refusal; without params there is one."""
    library, problem = harness.library(), Problem(Case([[(0, 1.0)]]))
    params = problem.params(library, problem.before)
    library.declare(problem.tensors(problem.before))
    if field is None:
        assert library.call("launch_routed_expand", None) == library.constants["FASTLORA_NULL"]
    else:
        *steps, last = field.split(".")
        setattr(getattr(params, steps[0]) if steps else params, last, 0)
        assert library.call("launch_routed_expand", params) == 0
