"""lora_linear against float64: values and every gradient, on each back-end."""

from dataclasses import dataclass

import pytest
import torch
from exactness import assert_accurate, formula, rounded, strided, transposed

from fastlora import lora_linear


@dataclass
class Case:
    shape: tuple
    out: int
    ranks: tuple = (8,)
    stacked: bool = False
    gates: tuple | None = None
    scaling: str = "number"
    bias: bool = False
    column: bool = False
    p: float = 0.0
    layout: str = "plain"
    masters: bool = False

    def __str__(self):
        given = (f"{k}={v}" for k, v in vars(self).items() if v != type(self).__dataclass_fields__[k].default)
        return ",".join(given).replace(" ", "")


CASES = [
    Case((1, 63), 100),
    Case((63,), 100, bias=True),
    Case((3, 5, 100), 63, ranks=(3,), bias=True, scaling="tensor"),
    Case((100, 256), 192, ranks=(1,), layout="transposed"),
    Case((17, 64), 130, ranks=(64,), layout="strided", bias=True),
    Case((2, 7, 48), 33, ranks=(2, 0, 5), gates=(7, 3), bias=True),
    Case((2, 7, 48), 33, ranks=(4, 4), gates=(2, 1, 2), scaling="vector"),
    Case((9, 40), 24, ranks=(3, 1), stacked=True, gates=(9, 2), scaling="tensor"),
    Case((9, 40), 24, ranks=(6,), gates=(6,)),
    Case((9, 40), 24, ranks=(6,), gates=(9, 1)),
    Case((6, 50), 70, ranks=(8,), column=True, bias=True),
    Case((6, 50), 70, ranks=(3, 5), column=True, gates=(2,), layout="transposed"),
    Case((4, 3, 65), 31, p=0.3),
    Case((70, 129), 64, ranks=(16,), p=0.1, bias=True, layout="transposed", column=True),
    Case((5, 33), 20, ranks=(2, 3), p=0.5, gates=(5, 2), layout="strided"),
    Case((5, 33), 20, p=1.0),
    Case((5, 33), 20, ranks=(0,)),
    Case((0, 33), 20, bias=True),
    Case((2, 0, 33), 20, ranks=(2, 3), gates=(2, 0, 2)),
    Case((300, 300), 260, ranks=(16,), bias=True),
    Case((33, 200), 70, masters=True, bias=True, scaling="tensor"),
    Case((3, 130), 61, ranks=(5, 3), masters=True, p=0.2, gates=(3, 2)),
    Case((300, 130), 150, ranks=(8, 8, 8, 20, 0, 3), masters=True, scaling="vector"),
    Case((1, 64), 70, ranks=(8, 8, 8, 17, 1), bias=True, layout="transposed"),
    # more than a block of rows, of steps along the sum and of rank rows
    Case((150, 1100), 50, ranks=(40, 3), gates=(150, 2), bias=True, masters=True),
    Case((18, 1030), 33, column=True),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("x", "weight", "lora_A", "lora_B", "scaling", "bias", "gates", "column_scale")


def draw(case, dtype):
    """The arguments by name, with gradients asked of all; lists for lora_A and lora_B."""
    torch.manual_seed(0)
    E = len(case.ranks) if len(case.ranks) > 1 or case.stacked else case.ranks[0]
    half = dtype in (torch.bfloat16, torch.float16)
    adapter = torch.float32 if case.masters and half else dtype
    inner = case.shape[-1]
    given = dict(
        x=torch.randn(case.shape, dtype=torch.float64),
        weight=torch.randn(case.out, inner, dtype=torch.float64) / inner**0.5,
        lora_A=[torch.randn(r, inner, dtype=torch.float64) / inner**0.5 for r in case.ranks],
        lora_B=[torch.randn(case.out, r, dtype=torch.float64) for r in case.ranks],
        scaling=torch.tensor({"number": 0.5, "tensor": 4 / 3, "vector": [0.5 + i for i in range(E)]}[case.scaling]),
        bias=torch.randn(case.out, dtype=torch.float64) if case.bias else None,
        gates=torch.rand(case.gates, dtype=torch.float64) if case.gates else None,
        column_scale=torch.rand(case.out, dtype=torch.float64) + 0.5 if case.column else None,
    )
    if case.stacked:
        given["lora_A"], given["lora_B"] = [torch.cat(given["lora_A"])], [torch.cat(given["lora_B"], 1)]
    layout = {"plain": lambda t: t, "strided": strided, "transposed": transposed}[case.layout]
    types = dict.fromkeys(NAMES, dtype) | dict.fromkeys(("lora_A", "lora_B"), adapter)
    types |= dict.fromkeys(("scaling", "gates"), torch.float32)
    if dtype == torch.float64:
        types = dict.fromkeys(NAMES, dtype)
    # masters: adapters that the base dtype holds exactly, as the error rule rounds them first
    exact = {k: dtype if case.masters and k.startswith("lora_") else types[k] for k in NAMES}

    def make(name, t):
        return layout(t.to(exact[name]).to(types[name])).requires_grad_()

    return {
        k: [make(k, t) for t in v] if isinstance(v, list) else v if v is None else make(k, v) for k, v in given.items()
    }


def ranks_of(case):
    return list(case.ranks) if len(case.ranks) > 1 else None


def leaves(given):
    return [t for v in given.values() for t in (v if isinstance(v, list) else [v]) if t is not None]


def copy(given, dtype):
    """The same numbers in one dtype, as new leaves."""

    def one(t):
        return None if t is None else rounded(t, t.dtype).to(dtype).requires_grad_()

    return {k: [one(t) for t in v] if isinstance(v, list) else one(v) for k, v in given.items()}


def run(given, case, seed):
    values = dict(given)
    one = len(case.ranks) == 1 or case.stacked
    if one:
        values["lora_A"], values["lora_B"] = values["lora_A"][0], values["lora_B"][0]
    return lora_linear(
        **values, ranks=list(case.ranks) if case.stacked else None, dropout_p=case.p, training=True, seed=seed
    )


def gradients(y, dy, given):
    found = torch.autograd.grad(y, leaves(given), dy, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves(given), strict=True)]


def reference_gradients(given, dtype, case, seed, dy):
    """(y, gradients) in plain torch at `dtype`; the argument order of `formula` is not that of `given`."""
    c = copy(given, dtype)
    y = formula(
        c["x"], c["weight"], c["lora_A"], c["lora_B"], c["scaling"], c["bias"], c["gates"], ranks_of(case),
        c["column_scale"], case.p, seed,
    )  # fmt: skip
    return y, gradients(y, dy.to(dtype), c)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend, case, dtype):
    given, seed = draw(case, dtype), torch.tensor(2**40 + 12345) if case.p else None
    y = run(given, case, seed)
    assert y.dtype == dtype and y.is_contiguous()
    torch.manual_seed(1)
    # near y itself: then the one number that is scaling's gradient does not come out of a cancellation
    dy = (y.detach().double() + torch.randn(y.shape, dtype=torch.float64)).to(dtype)
    layout = {"plain": lambda t: t, "strided": strided, "transposed": transposed}[case.layout]
    found = gradients(y, layout(dy), given)
    exact_y, exact = reference_gradients(given, torch.float64, case, seed, dy)
    plain_y, plain_grads = reference_gradients(given, dtype, case, seed, dy)
    assert_accurate(y, exact_y.detach(), plain_y, "y")
    names = [k for k, v in given.items() for _ in (v if isinstance(v, list) else [v]) if v is not None]
    for name, t, g, e, p in zip(names, leaves(given), found, exact, plain_grads, strict=True):
        assert g.dtype == t.dtype, f"{name}: gradient in {g.dtype}"
        assert_accurate(g, e, p, f"d{name}")


@pytest.mark.parametrize("ranks", [(3, 2), (0, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(backend, name, ranks):
    case = Case((5, 30), 20, ranks=ranks, gates=(5, 2), scaling="tensor", bias=True, column=True)
    given = draw(case, torch.float32)
    only, y = leaves({name: given[name]}), run(given, case, None)
    every = dict(zip(map(id, leaves(given)), gradients(y, torch.ones_like(y), given), strict=True))
    for t in leaves(given):
        t.requires_grad_(id(t) in map(id, only))
    y = run(given, case, None)
    torch.testing.assert_close(list(torch.autograd.grad(y, only, torch.ones_like(y))), [every[id(t)] for t in only])
