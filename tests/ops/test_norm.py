"""lora_norm against float64, its contract with torch, and its errors."""

import pytest
import torch
from exactness import assert_accurate, strided, transposed

from fastlora import lora_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = {"plain": lambda t: t, "strided": strided, "transposed": transposed}


def draw(dtype=torch.float32, out=20, inner=33, ranks=(3, 1), layout="plain", masters=False):
    """(weight, lora_A, lora_B)"""
    torch.manual_seed(0)
    shapes = (out, inner), *((r, inner) for r in ranks), *((out, r) for r in ranks)
    weight, *factors = (LAYOUTS[layout](torch.randn(s, dtype=torch.float64).to(dtype)) for s in shapes)
    if masters:
        factors = [f.float() for f in factors]
    return weight, factors[: len(ranks)], factors[len(ranks) :]


def formula(weight, A, B, scaling):
    parts = torch.as_tensor(scaling, dtype=weight.dtype).expand(len(A))
    return sum((s * b @ a for s, a, b in zip(parts, A, B, strict=True)), weight).norm(dim=1)


@pytest.mark.parametrize("scaling", [0.5, torch.tensor([0.5, -2.0])], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_values(backend, dtype, layout, scaling):
    given = draw(dtype, layout=layout, masters=layout == "strided" and dtype == torch.bfloat16)
    found = lora_norm(*given, scaling)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    (exact, plain) = (
        formula(*(t.to(to) if isinstance(t, torch.Tensor) else [p.to(to) for p in t] for t in given), scaling)
        for to in (torch.float64, wide)
    )
    assert found.dtype == wide
    assert_accurate(found, exact, plain)


@pytest.mark.parametrize("options", [dict(ranks=()), dict(ranks=(0,)), dict(out=0), dict(inner=0)], ids=str)
def test_nothing_of_something(backend, options):
    weight, A, B = draw(**options)
    torch.testing.assert_close(lora_norm(weight, A, B), formula(weight, A, B, 1.0))


def test_no_gradient(backend):
    weight, (a,), (b,) = draw(ranks=(3,))
    assert not lora_norm(weight, a.requires_grad_(), b.requires_grad_(), 0.5).requires_grad
    op = torch.ops.fastlora.lora_norm.default
    torch.library.opcheck(op, (weight, [a.detach()], [b.detach()], torch.tensor(0.5), [3]))
    compiled = torch.compile(lambda a: lora_norm(weight, a, b, 0.5) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a), 2 * lora_norm(weight, a, b, 0.5))


@pytest.mark.parametrize(
    "name, error, given",
    [
        ("weight", TypeError, dict(weight=torch.ones(20, 33, dtype=torch.long))),
        ("weight", ValueError, dict(weight=torch.ones(33))),
        ("weight", ValueError, dict(weight=torch.tensor(1.0))),
        ("lora_A", ValueError, dict(lora_A=torch.tensor(1.0))),
        ("lora_A", ValueError, dict(lora_A=[torch.ones(3, 32), torch.ones(1, 33)])),
        ("lora_A", TypeError, dict(lora_A=[torch.ones(3, 33).double(), torch.ones(1, 33)])),
        ("lora_A", TypeError, dict(lora_A="a")),
        ("lora_B", ValueError, dict(lora_B=[torch.ones(20, 3)])),
        ("lora_B", ValueError, dict(lora_B=[torch.ones(20, 3), torch.ones(20, 2)])),
        ("scaling", ValueError, dict(scaling=torch.ones(3))),
        ("scaling", TypeError, dict(scaling="half")),
    ],
)
def test_errors(backend, name, error, given):
    weight, A, B = draw()
    with pytest.raises(error, match=rf"fastlora: {name}: got .* expected "):
        lora_norm(**dict(weight=weight, lora_A=A, lora_B=B) | given)
