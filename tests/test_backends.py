"""Pinning, falling back, explaining; and the whole of it where the C++ extension is missing."""

import os
import subprocess
import sys

import pytest
import torch

import fastlora
from fastlora import backends, explain, lora_linear, use_backend


def draw(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=dtype) for s in ((5, 16), (12, 16), (4, 16), (12, 4))]


def python(code, **env):
    """Run code in a process of its own; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_pin_is_restored():
    args = draw()
    expected = lora_linear(*args)
    with use_backend("reference"):
        with pytest.raises(RuntimeError, match="inside"), use_backend("native"):
            raise RuntimeError("inside")
        assert backends.order("lora_linear", *args) == ("reference",)
        torch.testing.assert_close(lora_linear(*args), expected)
    assert backends.order("lora_linear", *args) == ("native", "reference")


def test_unknown_name():
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of"), use_backend("fast"):
        pass


def test_a_pinned_back_end_that_objects_raises_its_sentence():
    with use_backend("triton"), pytest.raises(NotImplementedError, match="triton: .+"):
        lora_linear(*draw())


def test_environment_pins():
    code = "import torch; from fastlora import backends; print(backends.order('lora_linear', torch.ones(1)))"
    assert "('reference',)" in python(code, FASTLORA_BACKEND="reference")
    command, env = [sys.executable, "-c", "import fastlora"], {**os.environ, "FASTLORA_BACKEND": "x"}
    bad = subprocess.run(command, capture_output=True, text=True, env=env)
    assert bad.returncode and "FASTLORA_BACKEND: got 'x'" in bad.stderr


def test_explain_a_call():
    text = str(explain(lora_linear, *draw()))
    chosen = "native" if backends.native()[0] else "reference"
    assert text.startswith(f"lora_linear: {chosen}")
    assert "triton: " in text
    with use_backend("reference"):
        why = "reference is pinned" if backends.native()[0] else backends.native()[1]
        assert f"native: {why}" in str(explain(lora_linear, *draw()))


def test_explain_a_model_lists_its_layers():
    model = torch.nn.Sequential(fastlora.Linear(8, 6, r=2), torch.nn.ReLU(), fastlora.Linear(6, 4))
    found = explain(model)
    assert [c[0] for c in found.calls] == ["0: "]
    ran = explain(model, torch.randn(3, 8))
    assert [c[1] for c in ran.calls] == ["lora_linear_forward"]
    assert "no fastlora op" in str(explain(torch.nn.ReLU(), torch.ones(1)))


WITHOUT_C = """
import sys, warnings
sys.modules["fastlora._C"] = None
warnings.simplefilter("always")
import torch
from torch.autograd import gradcheck
import fastlora
from fastlora import backends, lora_expand, lora_linear, lora_shrink
assert backends.native()[0] is None and "fastlora build" in backends.native()[1]
def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)
x, w, a, b, a2, b2 = leaf(5, 9), leaf(7, 9), leaf(3, 9), leaf(7, 3), leaf(2, 9), leaf(7, 2)
bias, gates = leaf(7), leaf(5, 2)
with warnings.catch_warnings(record=True) as seen:
    lora_linear(x, w, a, b)
    lora_linear(x, w, a, b)
assert [str(s.message) for s in seen if "slower back-end" in str(s.message)].__len__() == 1, seen
seed = torch.tensor(3)
def run(x, w, a, a2, b, b2, bias, gates):
    return lora_linear(x, w, [a, a2], [b, b2], 0.5, bias, gates=gates, dropout_p=0.2, training=True, seed=seed)
assert gradcheck(run, (x, w, a, a2, b, b2, bias, gates))
assert gradcheck(lambda x, a: lora_shrink(x, a, dropout_p=0.3, training=True, seed=seed), (x, a))
assert gradcheck(lambda y, z, b: lora_expand(y, z, b, columns=(1, 8)), (leaf(5, 9), leaf(5, 3), b))
op = torch.ops.fastlora.lora_linear.default
scale = torch.tensor(0.5, dtype=torch.float64)
torch.library.opcheck(op, (x, w, [a], [b], scale, bias, None, [], None, 0.0, None))
low = [t.detach().float() for t in (x, w, a, b)]
with torch.autocast("cpu", torch.bfloat16):
    assert lora_linear(*low).dtype == torch.bfloat16
    assert lora_linear(x, w, a, b).dtype == torch.float64
compiled = torch.compile(lambda x: lora_linear(x, w, a, b, 0.5, bias), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), lora_linear(x, w, a, b, 0.5, bias))
for call in (lambda t: lora_linear(t, w, a, b), lambda t: lora_shrink(t, a)):
    try: torch.func.jvp(call, (x,), (x,))
    except NotImplementedError as error: assert "forward-mode" in str(error)
    else: raise AssertionError("a tangent was dropped")
print("right without _C")
"""


def test_everything_works_without_the_extension():
    assert "right without _C" in python(WITHOUT_C)


@pytest.mark.skipif(backends.native()[0] is None, reason="fastlora._C is not built")
def test_another_torch_is_an_objection():
    code = "import torch\ntorch.__version__ = '2.99.0'\nfrom fastlora import backends\nprint(backends.native())"
    assert "this is 2.99.0; build it again with" in python(code)


@pytest.mark.skipif(backends.native()[0] is None, reason="fastlora._C is not built")
def test_an_unknown_form_is_refused():
    code = (
        "import torch, fastlora\n"
        "try: fastlora.lora_linear(*[torch.randn(s) for s in ((5, 16), (12, 16), (4, 16), (12, 4))])\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    assert "FASTLORA_CPU" in python(code, FASTLORA_CPU="sse")
