"""The public ops with a back-end pinned, forward and autograd, against float64: what a user's call goes through."""

import harness
import pytest
import torch
from exactness import assert_accurate

import fastlora

# On a CPU `native` is its own kernels, tested elsewhere; here they are what the op does on a GPU.
BACKENDS = ["triton"] if harness.DEVICE == "cpu" else ["triton", "native", "reference"]
CASES = {
    "plain": dict(lead=(2, 33), K=96, N=72),
    "adapters, dropout": dict(lead=(37,), K=64, N=53, ranks=(3, 16), gates="token", bias=True, p=0.25),
    "transposed, c": dict(lead=(20,), K=63, N=80, layout="transposed", bias=True, column_scale=True),
}


def on_device(call):
    """The call's tensors on the device, gradients on for all but the weight."""
    c = harness.SimpleNamespace(**{name: harness.to_device(value) for name, value in vars(call).items()})
    for name in harness.NAMES:
        value = getattr(c, name)
        for t in value if isinstance(value, list) else [value]:
            if t is not None and name != "weight":
                t.requires_grad_()
    return c


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_linear(case, backend, dtype):
    call = harness.problem(dtype=dtype, **CASES[case])
    c = on_device(call)
    with fastlora.use_backend(backend):
        y = fastlora.lora_linear(
            c.x, c.weight, c.lora_A, c.lora_B, c.scaling, c.bias,
            gates=c.gates, column_scale=c.column_scale, dropout_p=c.dropout_p, training=bool(c.dropout_p), seed=c.seed,
        )  # fmt: skip
        got = harness.gradients(c, y, c.dy)
    want = []
    for to in (torch.float64, dtype):
        plain = harness.cast(call, to)
        out = harness.linear(plain)[0]
        want.append({"y": out.detach(), **harness.gradients(plain, out, call.dy)})
    assert got.pop("weight") is None
    got.pop("scaling")
    for name, value in {"y": y, **got}.items():
        triples = (value, want[0][name], want[1][name])
        for actual, exact, same in zip(*triples, strict=True) if isinstance(value, list) else [triples]:
            assert_accurate(actual.detach().cpu(), exact, same, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves(backend):
    """lora_shrink and lora_expand give what lora_linear adds to the base layer."""
    c = on_device(harness.problem((21,), 64, 40, (8,), torch.float32, p=0.5))
    a, b = c.lora_A[0], c.lora_B[0]
    with fastlora.use_backend(backend):
        whole = fastlora.lora_linear(c.x, c.weight, a, b, c.scaling, dropout_p=0.5, training=True, seed=c.seed)
        z = fastlora.lora_shrink(c.x, a, dropout_p=0.5, training=True, seed=c.seed)
        halves = fastlora.lora_expand(c.x @ c.weight.t(), z, b, c.scaling)
        first = torch.autograd.grad(whole, (c.x, a, b), c.dy)
        second = torch.autograd.grad(halves, (c.x, a, b), c.dy)
    for one, other in zip((whole, *first), (halves, *second), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_same_mask_on_every_back_end():
    x, eye, seed = map(harness.to_device, (torch.ones(70, 200), torch.eye(200), torch.tensor(99)))
    masks = []
    for backend in {*BACKENDS, "reference"}:
        with fastlora.use_backend(backend):
            masks.append(fastlora.lora_shrink(x, eye, dropout_p=0.3, training=True, seed=seed))
    assert all(torch.equal(m != 0, masks[0] != 0) for m in masks)


def test_objection_of_a_pinned_back_end():
    x = harness.to_device(torch.ones(3, 4, dtype=torch.float64))
    with fastlora.use_backend("triton"), pytest.raises(Exception, match="float64"):
        fastlora.lora_shrink(x, x)
