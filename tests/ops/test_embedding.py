"""lora_embedding against float64, its contract with torch, and its errors."""

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_accurate, strided, transposed

from fastlora.ops.embedding import lora_embedding_op
from fastlora.ops.library import scalar

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = {"plain": lambda t: t, "strided": strided, "transposed": transposed}


def lora_embedding(
    y, ids, lora_A, lora_B, scaling=1.0, gates=None, ranks=None, padding_idx=-1, scale_grad_by_freq=False
):
    """The op, with its ranks and the usual options."""
    ranks = [a.shape[0] for a in lora_A] if ranks is None else ranks
    return lora_embedding_op(y, ids, lora_A, lora_B, scalar(scaling), gates, ranks, padding_idx, scale_grad_by_freq)


def draw(dtype=torch.float32, leading=(5, 4), vocabulary=23, out=20, ranks=(3, 1), layout="plain", masters=False):
    """(y, ids, lora_A, lora_B), the last id and the first never drawn."""
    torch.manual_seed(0)
    ids = torch.randint(1, vocabulary - 1, leading)
    shapes = (*leading, out), *((r, vocabulary) for r in ranks), *((out, r) for r in ranks)
    y, *factors = (LAYOUTS[layout](torch.randn(s, dtype=torch.float64).to(dtype)).requires_grad_() for s in shapes)
    if masters:
        factors = [f.detach().float().requires_grad_() for f in factors]
    return y, ids, factors[: len(ranks)], factors[len(ranks) :]


def formula(y, ids, A, B, scaling, gates, ranks):
    """In plain torch, at y's dtype."""
    z = [F.embedding(ids, a.t()) for a in A]
    if gates is not None:
        scaling = scaling * gates
    parts = (scaling * torch.ones(len(A), dtype=scaling.dtype)).unbind(-1)
    return sum(((z * g[..., None]).to(y.dtype) @ b.T for z, g, b in zip(z, parts, B, strict=True)), y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("gates", [None, (2,), (5, 4, 2)])
def test_values_and_gradients(backend, gates, dtype, layout):
    y, ids, A, B = draw(dtype, layout=layout)
    ids = (ids if layout == "plain" else transposed(ids)).to(torch.int32 if gates else torch.int64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scaling = torch.tensor(0.5, dtype=wide, requires_grad=True)
    gates = None if gates is None else torch.rand(gates, dtype=wide).requires_grad_()
    inputs = [y, *A, *B, scaling, *([] if gates is None else [gates])]
    before = [t.detach().clone() for t in inputs]
    found = lora_embedding(y, ids, A, B, scaling, gates=gates)
    dy = torch.randn(found.shape, dtype=torch.float64).to(dtype)
    results = [[found.detach(), *torch.autograd.grad(found, inputs, LAYOUTS[layout](dy))]]
    for to in (torch.float64, dtype):
        leaves = [t.detach().to(to).requires_grad_() for t in inputs]
        plain = formula(leaves[0], ids, leaves[1:3], leaves[3:5], leaves[5], leaves[6] if leaves[6:] else None, (3, 1))
        results.append([plain.detach(), *torch.autograd.grad(plain, leaves, dy.to(to))])
    names = "y", "dy", "dA", "dA2", "dB", "dB2", "dscaling", "dgates"
    for name, f, e, p in zip(names, *results, strict=False):
        assert_accurate(f, e, p, name)
    assert found.dtype == dtype
    assert all(torch.equal(t, old) for t, old in zip(inputs, before, strict=True))


def test_fp32_masters(backend):
    y, ids, A, B = draw(torch.bfloat16, masters=True)
    found = lora_embedding(y, ids, A, B, 0.5)
    grads = torch.autograd.grad(found.float().sum(), [*A, *B])
    assert all(g.dtype == torch.float32 for g in grads)
    exact = formula(y.double(), ids, [a.double() for a in A], [b.double() for b in B], torch.tensor(0.5), None, (3, 1))
    plain = formula(y, ids, [a.bfloat16() for a in A], [b.bfloat16() for b in B], torch.tensor(0.5), None, (3, 1))
    assert_accurate(found, exact.detach(), plain)


@pytest.mark.parametrize("options", [{}, dict(padding_idx=3), dict(scale_grad_by_freq=True)], ids=str)
def test_as_torchs_embedding(backend, options):
    """The gradient of lora_A is what torch's embedding gives its weight."""
    y, ids, (a,), (b,) = draw(ranks=(3,))
    ids[0] = 3
    weight = a.detach().t().contiguous().requires_grad_()
    (dA,) = torch.autograd.grad(lora_embedding(y, ids, [a], [b], **options).square().sum(), a)
    (expected,) = torch.autograd.grad((y + F.embedding(ids, weight, **options) @ b.T).square().sum(), weight)
    torch.testing.assert_close(dA, expected.t())


@pytest.mark.parametrize("leading, ranks", [((0,), (2,)), ((3,), ()), ((3,), (0,)), ((), (2,))], ids=str)
def test_nothing_of_something(backend, leading, ranks):
    y, ids, A, B = draw(leading=leading, ranks=ranks)
    found = lora_embedding(y, ids, A, B)
    grads = torch.autograd.grad(found.sum(), [y, *A, *B])
    torch.testing.assert_close(found, formula(y, ids, A, B, torch.ones(()), None, ranks))
    assert all(g.shape == t.shape for g, t in zip(grads, [y, *A, *B], strict=True))
    assert not found.numel() or found.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


def test_contract(backend):
    y, ids, A, B = draw(torch.float64)
    scaling, gates = torch.tensor(0.5, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    leaves = [t.detach().requires_grad_() for t in (y, *A, *B, scaling, gates)]

    def run(y, a, a2, b, b2, scaling, gates):
        return lora_embedding(y, ids, [a, a2], [b, b2], scaling, gates=gates)

    assert torch.autograd.gradcheck(run, leaves)
    args = (y, ids, A, B, leaves[5], leaves[6], [3, 1], -1, False)
    torch.library.opcheck(lora_embedding_op, args)
    args = (y.detach(), ids, [a.detach() for a in A], [b.detach() for b in B], scaling, gates, [3, 1], -1, True)
    torch.library.opcheck(lora_embedding_op, args)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend, compiler):
    y, ids, A, B = draw()

    def run(y, *factors):
        return lora_embedding(y.sin(), ids, factors[:2], factors[2:], 0.5, padding_idx=2).cos()

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    found, expected = ((f := call(y, *A, *B), *torch.autograd.grad(f.sum(), [y, *A, *B])) for call in (compiled, run))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name, error, given",
    [
        ("y", TypeError, dict(y=torch.ones(5, 4, 20, dtype=torch.long))),
        ("y", ValueError, dict(y=torch.tensor(1.0))),
        ("ids", TypeError, dict(ids=torch.ones(5, 4))),
        ("ids", TypeError, dict(ids=torch.ones(5, 4, dtype=torch.int16))),
        ("ids", ValueError, dict(ids=torch.ones(5, 3, dtype=torch.long))),
        ("lora_A", ValueError, dict(lora_A=[torch.ones(3), torch.ones(1, 23)])),
        ("lora_A", ValueError, dict(lora_A=[torch.ones(3, 23), torch.ones(1, 22)])),
        ("lora_A", TypeError, dict(lora_A=[torch.ones(3, 23).double(), torch.ones(1, 23)])),
        ("lora_B", ValueError, dict(lora_B=[torch.ones(20, 3)])),
        ("lora_B", ValueError, dict(lora_B=[torch.ones(20, 3), torch.ones(20, 2)])),
        ("scaling", ValueError, dict(scaling=torch.ones(3))),
        ("gates", ValueError, dict(gates=torch.ones(5, 3, 2))),
        ("ranks", ValueError, dict(ranks=[2, 1])),
    ],
)
def test_errors(backend, name, error, given):
    y, ids, A, B = draw()
    with pytest.raises(error, match=rf"fastlora: {name}: got .* expected "):
        lora_embedding(**dict(y=y, ids=ids, lora_A=A, lora_B=B) | given)
    with pytest.raises(IndexError):
        lora_embedding(y, ids + 22, A, B)
