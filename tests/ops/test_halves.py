"""lora_shrink and lora_expand against float64, and that together they are lora_linear's update."""

import pytest
import torch
from exactness import assert_accurate, strided, transposed

from fastlora import lora_expand, lora_linear, lora_shrink

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = {"plain": lambda t: t, "strided": strided, "transposed": transposed}


def leaf(shape, dtype, layout, scale=1.0):
    return LAYOUTS[layout]((torch.randn(shape, dtype=torch.float64) * scale).to(dtype)).requires_grad_()


def exact_and_plain(run, inputs, dy, dtype):
    """(value, gradients) of `run` in float64 and in `dtype`, by torch's own autograd."""
    results = []
    for d in (torch.float64, dtype):
        copies = [t.detach().to(d).requires_grad_() for t in inputs]
        value = run(*copies)
        results.append((value.detach(), *torch.autograd.grad(value, copies, dy.to(value.dtype))))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape, ranks", [((1, 63), (3,)), ((4, 25, 100), (8, 1)), ((130, 257), (64,)), ((0, 7), (2,))])
def test_shrink(backend, shape, ranks, dtype, layout):
    torch.manual_seed(0)
    x = leaf(shape, dtype, layout)
    A = [leaf((r, shape[-1]), dtype, layout, shape[-1] ** -0.5) for r in ranks]
    z = lora_shrink(x, A)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dz = torch.randn_like(z)
    found = [z.detach(), *torch.autograd.grad(z, (x, *A), LAYOUTS[layout](dz))]
    exact, plain = exact_and_plain(lambda x, *A: torch.cat([x @ a.T for a in A], -1), (x, *A), dz.to(dtype), dtype)
    for name, f, e, p in zip(("z", "dx", "dA", "dA2"), found, exact, plain, strict=False):
        assert_accurate(f, e, p, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("columns", [None, (0, 40), (3, 77), (50, 50)])
def test_expand(backend, columns, dtype, layout):
    torch.manual_seed(0)
    start, stop = columns or (0, 100)
    y, z = leaf((6, 5, 100), dtype, layout), leaf((6, 5, 7), torch.float32, layout).detach()
    z = z.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    B = [leaf((stop - start, r), dtype, layout) for r in (3, 4)]
    gates = torch.rand(5, 2, dtype=z.dtype).requires_grad_()
    before = y.detach().clone()
    found = lora_expand(y, z, B, 0.5, gates=gates, columns=columns)
    assert torch.equal(y, before) and found.dtype == dtype
    dy = torch.randn(found.shape).to(dtype)
    grads = torch.autograd.grad(found, (y, z, gates, *B), LAYOUTS[layout](dy))

    def formula(y, z, gates, *B):
        g = 0.5 * gates.repeat_interleave(torch.tensor([3, 4]), -1)
        update = (z * g).to(y.dtype) @ torch.cat(B, 1).T
        return torch.cat((y[..., :start], y[..., start:stop] + update, y[..., stop:]), -1)

    exact, plain = exact_and_plain(formula, (y, z, gates, *B), dy, dtype)
    for name, f, e, p in zip(("y", "dy", "dz", "dgates", "dB", "dB2"), (found, *grads), exact, plain, strict=True):
        assert_accurate(f, e, p, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_expand_of_a_tables_rows(backend, dtype, layout):
    """An embedding's update: the table is lora_A transposed."""
    torch.manual_seed(0)
    y, A, b = leaf((6, 5, 60), dtype, layout), leaf((7, 23), dtype, layout), leaf((50, 7), dtype, layout)
    ids = torch.randint(1, 22, (6, 5))
    gates = torch.rand(5, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    given = (ids if layout == "plain" else transposed(ids)).to(torch.int32 if layout == "strided" else torch.int64)
    found = lora_expand(y, A.t(), b, 0.5, gates=gates, ranks=[3, 4], columns=(5, 55), ids=given)
    assert torch.equal(found, lora_expand(y, A.t()[ids], b, 0.5, gates=gates, ranks=[3, 4], columns=(5, 55)))
    dy = torch.randn(found.shape).to(dtype)
    grads = torch.autograd.grad(found, (y, A, b, gates), LAYOUTS[layout](dy))

    def formula(y, A, b, gates):
        g = 0.5 * gates.repeat_interleave(torch.tensor([3, 4]), -1)
        return y + torch.nn.functional.pad((A.t()[ids] * g).to(y.dtype) @ b.T, (5, 5))

    exact, plain = exact_and_plain(formula, (y, A, b, gates), dy, dtype)
    for name, f, e, p in zip(("y", "dy", "dA", "dB", "dgates"), (found, *grads), exact, plain, strict=True):
        assert_accurate(f, e, p, name)
    torch.library.opcheck(
        torch.ops.fastlora.lora_expand.default,
        (y, A.t(), [b], torch.tensor(0.5), gates, [3, 4], [5, 55], given),
    )


def test_a_tables_gradient_is_summed_in_fp32(backend):
    table = torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)
    y, ids = torch.zeros(4096, 8, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.long)
    lora_expand(y, table, torch.ones(8, 2, dtype=torch.bfloat16), ids=ids).float().sum().backward()
    assert table.grad.tolist() == [[32768.0, 32768.0], [0.0, 0.0], [0.0, 0.0]]


def test_together_they_are_the_update(backend):
    torch.manual_seed(0)
    x, w, a, b = torch.randn(9, 30), torch.randn(21, 30), torch.randn(4, 30), torch.randn(21, 4)
    y = lora_expand(torch.nn.functional.linear(x, w), lora_shrink(x, a), b, 0.25)
    torch.testing.assert_close(y, lora_linear(x, w, a, b, 0.25))
