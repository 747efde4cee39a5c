"""What torch asks of an op: opcheck, compile, autocast, saved tensors, double backward, transforms, one call per
layer.
"""

import pytest
import torch
from exactness import assert_accurate
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastlora import backends, lora_expand, lora_linear, lora_shrink

ops = torch.ops.fastlora


def draw(dtype=torch.float32, grad=True, M=6, inner=20, out=12):
    torch.manual_seed(0)
    x, w = torch.randn(M, inner, dtype=dtype), torch.randn(out, inner, dtype=dtype)
    a, b = torch.randn(4, inner, dtype=dtype), torch.randn(out, 4, dtype=dtype)
    for t in (x, a, b):
        t.requires_grad_(grad)
    return x, w, a, b


def half():
    return torch.tensor(0.5)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"bias": True, "gates": (6, 2), "ranks": [1, 3]},
        {"column": True, "p": 0.2, "bias": True},
        {"dtype": torch.bfloat16, "gates": (4,)},
    ],
    ids=str,
)
def test_opcheck_linear(backend, extra):
    dtype = extra.get("dtype", torch.float32)
    x, w, a, b = draw(dtype)
    bias = torch.randn(12, dtype=dtype, requires_grad=True) if extra.get("bias") else None
    gates = torch.rand(extra["gates"], requires_grad=True) if "gates" in extra else None
    column = torch.rand(12, requires_grad=True) if extra.get("column") else None
    p = extra.get("p", 0.0)
    seed = torch.tensor(7) if p else None
    args = (x, w, [a], [b], half().requires_grad_(), bias, gates, extra.get("ranks", []), column, p, seed)
    torch.library.opcheck(ops.lora_linear.default, args)
    with torch.no_grad():
        y, z, u = ops.lora_linear_forward(*args)
    still = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    still[2], still[3] = [a.detach()], [b.detach()]
    torch.library.opcheck(ops.lora_linear_forward.default, tuple(still))
    needs = [True, True, True, True, True, bias is not None, gates is not None, column is not None]
    backward = (torch.randn_like(y), *still[:5], *still[6:], z, u, needs)
    torch.library.opcheck(ops.lora_linear_backward.default, backward)


def test_opcheck_halves(backend):
    x, w, a, b = draw()
    z = torch.randn(6, 4, requires_grad=True)
    y = torch.randn(6, 20, requires_grad=True)
    seed = torch.tensor(3)
    torch.library.opcheck(ops.lora_shrink.default, (x, [a], 0.1, seed))
    args = (z.detach(), x.detach(), [a.detach()], 0.1, seed, [True, True])
    torch.library.opcheck(ops.lora_shrink_backward.default, args)
    gates = torch.rand(6, 2, requires_grad=True)
    torch.library.opcheck(ops.lora_expand.default, (y, z, [b], half(), gates, [1, 3], [2, 14], None))
    args = (y.detach(), z.detach(), [b.detach()], half(), gates.detach(), [1, 3], [2, 14], None, [True] * 4)
    torch.library.opcheck(ops.lora_expand_backward.default, args)
    torch.library.opcheck(ops.lora_dropout.default, (x.detach(), 0.25, seed))


def test_gradcheck(backend):
    x, w, a, b = draw(torch.float64)
    a2, b2 = torch.randn(2, 20, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    bias, column = torch.randn(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64)
    scale, gates = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    inputs = [t.detach().requires_grad_() for t in (x, w, a, a2, b, b2, scale, bias, gates, column)]

    def run(x, w, a, a2, b, b2, scale, bias, gates, column):
        drop = dict(dropout_p=0.3, training=True, seed=torch.tensor(5))
        return lora_linear(x, w, [a, a2], [b, b2], scale, bias, gates=gates, column_scale=column, **drop)

    assert torch.autograd.gradcheck(run, inputs)
    seed = torch.tensor(9)
    assert torch.autograd.gradcheck(lambda x, a: lora_shrink(x, a, dropout_p=0.2, training=True, seed=seed), (x, a))
    z, y = (torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in (4, 20))
    b = b.detach().requires_grad_()

    def add(y, z, b, scale, gates):
        return lora_expand(y, z, b, scale, gates=gates, ranks=[1, 3], columns=(4, 16))

    assert torch.autograd.gradcheck(add, (y, z, b, *inputs[6:9:2]))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend, compiler):
    def run(x, w, a, b, bias):
        y = lora_linear(torch.relu(x), w, a, b, 0.5, bias)
        z = lora_shrink(y, b.t())
        return lora_expand(y, z, w[:, :4], 2.0).sin()

    def results(run, *inputs):
        y = run(*inputs)
        return y.detach(), *torch.autograd.grad(y.sum(), [t for t in inputs if t.requires_grad])

    inputs = (*draw(), torch.randn(12, requires_grad=True))
    exact = results(run, *(t.detach().double().requires_grad_(t.requires_grad) for t in inputs))
    eager, compiled = results(run, *inputs), results(torch.compile(run, fullgraph=True, backend=compiler), *inputs)
    for name, c, e, p in zip(("y", "x", "lora_A", "lora_B", "bias"), compiled, exact, eager, strict=True):
        assert_accurate(c, e, p, name)


def test_scaling_values_share_one_graph():
    x, w, a, b = draw(grad=False)
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(lambda x, s: lora_linear(x, w, a, b, s), fullgraph=True, backend=counter)
    for i in range(20):
        s = torch.tensor(0.1 * i)
        torch.testing.assert_close(run(x, s), lora_linear(x, w, a, b, s))
    assert counter.frame_count == 1
    for i in range(20):
        torch.testing.assert_close(run(x, 0.3 * i), lora_linear(x, w, a, b, 0.3 * i))
    assert counter.frame_count <= 4


@pytest.mark.parametrize("compiler", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dropout_mask_survives_checkpoint_and_compile(backend, compiler):
    """The gradient belongs to the mask of the forward: y is linear in x, so y(dx) gives |dx|² when the masks agree."""
    x, w, a, b = draw(inner=64)
    w = torch.zeros_like(w)

    def layer(x):
        return lora_linear(x, w, a, b, dropout_p=0.5, training=True)

    def run(x):
        return checkpoint(layer, x, use_reentrant=False) * 1.0, checkpoint(layer, x, use_reentrant=False) * 1.0

    run = run if compiler is None else torch.compile(run, fullgraph=True, backend=compiler)
    torch.manual_seed(3)
    ys = run(x)
    assert not torch.equal(*ys), "two calls shared a seed"
    for y in ys:
        (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        # a column of x that the mask dropped gives y nothing and gets no gradient
        torch.testing.assert_close((dx * x).sum(), y.sum(), rtol=1e-4, atol=1e-4)


def test_same_generator_state_same_result(backend):
    x, w, a, b = draw()
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        results.append(lora_linear(x, w, a, b, dropout_p=0.5, training=True))
    assert torch.equal(*results)


def test_autocast(backend):
    x, w, a, b = draw()
    bias = torch.randn(12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, w, a, b, 0.5, bias)
        assert lora_shrink(x, a).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for t in (x, a, b, bias):
        assert t.grad.dtype == torch.float32
    low = lora_linear(x.bfloat16(), w.bfloat16(), a, b, 0.5, bias.bfloat16())
    assert torch.equal(low, y)


def test_autocast_to_the_other_half(backend):
    """bf16 adapters under fp16 autocast follow the rest of the layer, as plain layers do."""
    x, w, a, b = draw(torch.bfloat16, grad=False)
    with torch.autocast("cpu", torch.float16):
        y, z = lora_linear(x, w, a, b), lora_shrink(x, a)
    assert y.dtype == torch.float16
    assert torch.equal(y, lora_linear(*(t.half() for t in (x, w, a, b))))
    assert torch.equal(z, lora_shrink(x.half(), a.half()))


def test_autocast_leaves_float64_alone(backend):
    wide = draw(torch.float64, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*wide)
    assert y.dtype == torch.float64 and torch.equal(y, lora_linear(*wide))


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_one_dispatcher_call_per_layer():
    x, w, a, b = draw()
    s = half()
    with _Seen() as seen:
        lora_linear(x, w, a, b, s)
    assert seen.names == ["fastlora::lora_linear_forward"]
    with torch.no_grad(), _Seen() as seen:
        lora_linear(x, w, a, b, s)
    assert seen.names == ["fastlora::lora_linear"]
    with _Seen() as seen:
        lora_linear(x, w, a, b, s, dropout_p=0.5, training=True)
    assert seen.names == ["fastlora::draw_seed", "fastlora::lora_linear_forward"]


def test_saves_z_and_nothing_else(backend):
    x, w, a, b = draw(M=50, inner=64, out=48)
    seen = []
    inputs = [t.untyped_storage().data_ptr() for t in (x, w, a, b)]

    def pack(t):
        if t.numel() and t.untyped_storage().data_ptr() not in inputs:
            seen.append((tuple(t.shape), t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(x, w, a, b, half(), dropout_p=0.5, training=True)
    assert sorted(s for s in seen if s[0] != ()) == [((50, 4), torch.float32)]
    # the seed, and the scale that was passed in
    assert {s[1] for s in seen if s[0] == ()} == {torch.int64, torch.float32}


def test_writes_no_input(backend):
    x, w, a, b = draw()
    bias = torch.randn(12, requires_grad=True)
    before = [t.detach().clone() for t in (x, w, a, b, bias)]
    y = lora_linear(x, w, a, b, half(), bias, dropout_p=0.3, training=True)
    dy = torch.randn_like(y)
    kept = dy.clone()
    y.backward(dy)
    z = torch.randn(6, 4)
    lora_expand(y.detach(), z, b)
    for t, old in zip((x, w, a, b, bias, dy), (*before, kept), strict=True):
        assert torch.equal(t, old) and t._version == 0


def test_what_is_not_implemented_says_so(backend):
    x, w, a, b = draw()
    y = lora_linear(x, w, a, b)
    (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for fastlora::lora_linear_backward|[Dd]ouble|not implemented"):
        dx.sum().backward()
    for transform in (
        lambda: torch.func.grad(lambda t: lora_linear(t, w, a, b).sum())(x),
        lambda: torch.func.jvp(lambda t: lora_linear(t, w, a, b), (x,), (x,)),
    ):
        try:
            result = transform()
        except (RuntimeError, NotImplementedError):
            continue
        expected = torch.autograd.grad(lora_linear(x, w, a, b).sum(), x)[0]
        torch.testing.assert_close(result, expected)


def test_no_view_of_an_input(backend):
    x = torch.randn(3, 5)
    w, empty_a, empty_b = torch.randn(4, 5), torch.empty(0, 5), torch.empty(4, 0)
    y = torch.randn(3, 4)
    for result in (lora_linear(x, w, empty_a, empty_b), lora_expand(y, torch.empty(3, 0), empty_b)):
        assert result.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in (x, w, y)}


@pytest.mark.parametrize("rows", [1, 300])
def test_no_gradient_is_a_view_of_another(backend, rows):
    x, y, w = torch.randn(rows, 40), torch.randn(rows, 50), torch.randn(50, 40)
    A = [torch.randn(r, 40, requires_grad=True) for r in (4, 4, 3)]
    B = [torch.randn(50, r, requires_grad=True) for r in (4, 4, 3)]
    z = lora_shrink(x, A)
    for result, leaves in ((lora_linear(x, w, A, B), A + B), (z, A), (lora_expand(y, z.detach(), B), B)):
        grads = torch.autograd.grad(result.sum(), leaves)
        assert len({g.untyped_storage().data_ptr() for g in grads}) == len(leaves)


def test_back_ends_agree_on_meta_and_fake():
    with torch.device("meta"):
        x, w, a, b = draw()
        assert lora_linear(x, w, a, b, dropout_p=0.5, training=True).shape == (6, 12)
    assert backends.NAMES == ("reference", "native", "triton")


def test_a_mode_leaves_nothing_behind():
    """A number that was a scaling under fake tensors, or another default device, is real and on the CPU later."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        lora_linear(*draw(grad=False), scaling=0.015625)
    with torch.device("meta"):
        lora_linear(*draw(grad=False), scaling=0.0078125)
    for scaling in (0.015625, 0.0078125):
        assert type(lora_linear(*draw(grad=False), scaling=scaling)) is torch.Tensor
