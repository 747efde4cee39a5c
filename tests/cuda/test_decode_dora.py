"""Decode of tokens whose own adapters are DoRA's, on the emulator, against float64 and the op's reference."""

from dataclasses import dataclass, replace

import harness
import pytest
import test_decode as decode
import torch
from exactness import assert_accurate
from harness import assert_close
from test_decode import MIXED, SLOTS

from fastlora.ops.routed import Route, lora_routed_forward_reference


@dataclass(frozen=True)
class Case(decode.Case):
    dora: tuple = ()  # slots that have it


class Problem(decode.Problem):
    """Decode's, with c − 1 in the first rows of pages that no adapter has."""

    def page(self):
        super().page()
        case, (B,), rng = self.case, self.b, torch.Generator().manual_seed(2)
        free = sorted(set(range(len(B) // 8)) - set(self.table.flatten().tolist()))
        self.columns_of = torch.full((len(case.ranks),), -1, dtype=torch.int32)
        self.d = torch.zeros(len(case.ranks), case.n, dtype=torch.float64)
        for slot in case.dora:
            self.columns_of[slot] = page = free.pop()
            small, wide = torch.randint(-2, 3, (case.n,), generator=rng), torch.randn(case.n, generator=rng)
            self.d[slot] = B[page * 8].copy_(small if case.exact else wide)
        self.columns_of = self.columns_of.to(harness.DEVICE)

    def solve(self):
        case, x, w, known = self.case, self.x.double(), self.w.double(), len(self.case.ranks)
        base, off = x @ w.t(), x.abs() @ w.abs().t()
        y, size = base.clone(), off.clone()
        for token, slot, gate in ((t, *e) for t, entries in enumerate(case.lists) for e in entries if e[0] < known):
            update, most, d = torch.zeros_like(y[0]), torch.zeros_like(y[0]), self.d[slot].to(y)
            for a, start, width in zip(self.down[slot], self.starts, self.columns, strict=True):
                a, b, inside = a.double(), self.up[slot].double()[start : start + width], slice(start, start + width)
                update[inside], most[inside] = b @ (a @ x[token]), b.abs() @ (a.abs() @ x[token].abs())
            scale = float(self.scales[slot])
            y[token] += gate * (d * base[token] + (1 + d) * scale * update)
            size[token] += abs(gate) * (d.abs() * off[token] + (1 + d).abs() * scale * most)
        c, bias = (0 * base[0] + 1 if t is None else t.double() for t in (self.c, self.bias))
        self.y = y * c + (0 if self.bias is None else bias)
        self.size = size * c.abs() + self.y.abs()

    def params(self, library, outputs):
        p = super().params(library, outputs)
        p.route.columns = None if self.columns_of is None else self.columns_of.data_ptr()
        return p

    def tensors(self, outputs):
        return super().tensors(outputs) | dict(columns=(self.columns_of, 0))


CASES = [
    Case(1, 1, 1, (1,), lists=[[(0, 1.0)]], dora=(0,), name="smallest"),
    Case(6, 200, 72, SLOTS, (70, 0, 130), splits=2, lists=MIXED, dora=(0, 2, 5), name="lists with and without, slices"),
    Case(3, 72, 130, SLOTS, splits=5, lists=[[(3, 0.5)], [(1, 1.0)], [(3, 1.0), (3, -2.0)]], dora=(3,), name="rank 0"),
    Case(21, 40, 67, SLOTS, lists=[[(0, 1.0), (9, 1.0), (5, 0.5)]] * 20 + [[]], dtype=torch.float16, shift=1, pad=3,
         dora=(5,), bias=True, column_scale=True, name="two tiles off the grid"),
    Case(2, 24, 0, SLOTS, splits=2, lists=[[(2, 1.0)]] * 2, dora=(2,), bias=True, name="no base"),
]  # fmt: skip
BOTH = [replace(c, exact=e, name=c.name + ", exact" * e) for c in CASES for e in (True, False)]
PAIR = [(2, 1.0), (0, 0.5)]
CANCEL = Case(3, 70, 1024, SLOTS, splits=8, cancel=True, lists=[PAIR] * 3, dora=(2,), name="halves cancel")
OWN = Case(6, 40, 130, SLOTS, splits=2, lists=MIXED, dora=(0, 5))


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("case", [*BOTH, CANCEL], ids=lambda case: case.name)
def test_dora(case, mode):
    """Right, and the same bits in whatever order threads and blocks run."""
    problem, library, first = Problem(case), harness.library(mode), None
    for schedule in {"plain": (0, 3), "checked": (3,), "gpu": (0, 1)}[mode]:
        y = problem.run(library, schedule)
        assert_close(y, problem.y, problem.size, case.exact)
        first = y if first is None else first
        assert torch.equal(y.view(torch.int16), first.view(torch.int16)), f"schedule {schedule} gives other bits"


def test_it_is_the_op():
    """The reference's values in float64, and no worse than the reference at the same type, by the error rule."""
    problem = Problem(replace(CASES[1], bias=True))
    route, (A,), (B,) = Route.from_lists(MIXED, device=harness.DEVICE), problem.a, problem.b
    A, B = A.view(-1, 3, 8, problem.case.k), B.view(-1, 8, problem.case.n)

    def reference(dtype):
        x, w, bias, a, b = (t.to(dtype) for t in (problem.x, problem.w, problem.bias, A, B))
        pages = a, b, problem.table, problem.ranks, problem.scales, problem.columns_of
        given = x, w, (), (), torch.ones(()), bias, route.tensors, route.gates, (), problem.columns, pages
        return lora_routed_forward_reference(*given)[0]

    exact = reference(torch.float64)
    torch.testing.assert_close(exact, problem.y)
    assert_accurate(problem.run(harness.library(), 0), exact, reference(problem.case.dtype))


def test_tokens_do_not_see_each_other():
    """Alone each has the same bits; an infinite c stays with its tokens, who uses no DoRA has the bits of none."""
    problem, library = Problem(OWN), harness.library()
    y, columns = problem.run(library, 0), problem.columns_of.clone()
    for token, own in enumerate(MIXED):
        alone = Problem(replace(OWN, m=1, lists=[own]))
        alone.x, alone.w, alone.a, alone.b = problem.x[token : token + 1], problem.w, problem.a, problem.b
        assert torch.equal(alone.run(library, 0)[0], y[token])
    problem.b[0][columns[5] * 8] = torch.inf
    infinite = problem.run(library, 0)
    assert torch.equal(infinite[[0, 2, 3, 4, 5]], y[[0, 2, 3, 4, 5]]) and not infinite[1].isfinite().any()
    problem.columns_of.fill_(-3)
    none = problem.run(library, 0)
    assert torch.equal(none[[2, 5]], y[[2, 5]]) and not any(torch.equal(none[i], y[i]) for i in (0, 1, 3, 4))
    problem.columns_of = None
    assert torch.equal(problem.run(library, 0), none)


def test_an_infinite_gate_without_dora():
    """It multiplies its own update alone, beside a token that has DoRA."""
    problem = Problem(Case(2, 40, 40, (8, 8), lists=[[(0, 1.0)], [(1, 1.0)]], dora=(0,)))
    problem.route.gates[1] = torch.inf
    y = problem.run(harness.library(), 0)
    assert_close(y[:1], problem.y[:1], problem.size[:1], False)
    assert torch.isinf(y[1]).all()


@pytest.mark.parametrize("slot", [-1, 2**31 - 1, 1])
def test_what_the_tables_do_not_hold(slot):
    """A slot that is not in them is no DoRA: its neighbours are not read."""
    problem = Problem(Case(2, 40, 40, (8,), lists=[[(0, 1.0), (9, 1.0)], [(0, 2.0)]], dora=(0,)))
    problem.route.slots[1] = slot
    problem.columns_of = problem.columns_of.repeat(3)[1:2]
    assert_close(problem.run(harness.library(), 0), problem.y, problem.size, False)


@pytest.mark.parametrize("status, value", [("MISALIGNED", lambda v: v + 2), ("FOREIGN", "foreign")])
def test_refusals(status, value):
    library, problem = harness.library(), Problem(OWN)
    outputs = problem.outputs(library)
    library.declare(problem.tensors(outputs))
    params = problem.params(library, outputs)
    assert harness.refused(library, "launch_decode", params, "route.columns", value) == f"FASTLORA_{status}"
