"""The expand of tokens whose own adapters are DoRA's: the error rule, and whose bits it changes."""

import harness
import test_routed_shrink as shrink
import torch
import torch.nn.functional as F
from exactness import assert_accurate
from harness import DEVICE
from test_routed_expand import Problem, reference
from test_routed_shrink import MIXED, Case


def test_the_error_rule():
    """b is rounded once more: no worse for that than the reference, which rounds y alone, by the error rule."""
    case = Case([[(4, 1.0), (0, 0.5)], [(2, 1.0)]] * 9, 100, slices=(200,), dora=(0, 4), bias=True)
    problem, library = Problem(case), harness.library()
    problem.weight = problem.fill(torch.empty(200, 100, dtype=case.dtype, device=DEVICE))
    problem.before = F.linear(problem.x, problem.weight, problem.bias)
    problem.z = shrink.Problem(case).run(library, 3)
    exact, plain = (reference(problem, dtype)[0] for dtype in (torch.float64, case.dtype))
    assert_accurate(problem.run(library, 3), exact, plain)


def test_dora_is_a_slots_own():
    """The tables decide when the kernel runs; what uses no DoRA keeps its bits, and an infinity its tokens."""
    library, problem = harness.library(), Problem(Case(MIXED[:4], dora=(0, 2), slices=(72,), bias=True))
    columns, y = problem.columns.clone(), problem.run(library, 0)
    problem.B[columns[0] * 8] = torch.inf
    infinite = problem.run(library, 0)
    assert torch.equal(infinite[2:], y[2:]) and not infinite[:2].isfinite().any()
    problem.columns[0] = -1
    assert torch.equal(problem.run(library, 0)[2:], y[2:])
    problem.columns[2] = -7
    none = problem.run(library, 0)
    assert not torch.equal(none[3], y[3])
    problem.columns = problem.bias = None
    assert torch.equal(problem.run(library, 0), none)
