"""Bad arguments: ValueError or TypeError that names the argument, the same from C++, from Python and under compile."""

import pytest
import torch

from fastlora import backends, lora_expand, lora_linear, lora_shrink, use_backend

x, w, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)
z, y = torch.randn(5, 3), torch.randn(5, 6)

LINEAR = [
    ("x", ValueError, dict(x=torch.randn(5, 9))),
    ("x", ValueError, dict(x=torch.tensor(1.0))),
    ("x", TypeError, dict(x=torch.ones(5, 8, dtype=torch.long))),
    ("weight", ValueError, dict(weight=torch.randn(8))),
    ("weight", TypeError, dict(weight=w.double())),
    ("lora_A", ValueError, dict(lora_A=torch.randn(3, 7))),
    ("lora_A", TypeError, dict(lora_A=a.bfloat16())),
    ("lora_A", TypeError, dict(lora_A=[a, 3], lora_B=[b, b])),
    ("lora_A", TypeError, dict(lora_A="a")),
    ("lora_B", ValueError, dict(lora_B=torch.randn(6, 4))),
    ("lora_B", ValueError, dict(lora_A=[a, a], lora_B=[b])),
    ("lora_B", TypeError, dict(lora_B=b.double())),
    ("scaling", ValueError, dict(scaling=torch.ones(2))),
    ("scaling", TypeError, dict(scaling=torch.tensor(1))),
    ("bias", ValueError, dict(bias=torch.ones(5))),
    ("bias", TypeError, dict(bias=torch.ones(6, dtype=torch.float64))),
    ("gates", ValueError, dict(gates=torch.ones(4, 3))),
    ("gates", ValueError, dict(gates=torch.ones(1, 5, 3))),
    ("gates", TypeError, dict(gates=torch.ones(3, dtype=torch.long))),
    ("ranks", ValueError, dict(ranks=[1, 1])),
    ("ranks", ValueError, dict(ranks=[4, -1])),
    ("ranks", ValueError, dict(lora_A=[a, a], lora_B=[b, b], ranks=[2, 4])),
    ("column_scale", ValueError, dict(column_scale=torch.ones(5))),
    ("column_scale", TypeError, dict(column_scale=torch.ones(6, dtype=torch.long))),
    ("dropout_p", ValueError, dict(dropout_p=1.5)),
    ("dropout_p", ValueError, dict(dropout_p=float("nan"))),
    ("dropout_p", ValueError, dict(dropout_p=-0.1, training=True)),
    ("dropout_p", ValueError, dict(dropout_p=float("inf"), training=True)),
    ("seed", TypeError, dict(dropout_p=0.5, training=True, seed=torch.tensor(1.0))),
    ("seed", ValueError, dict(dropout_p=0.5, training=True, seed=torch.tensor([1]))),
    ("weight", ValueError, dict(weight=w.to("meta"))),
    ("x", TypeError, dict(x=x.to_sparse())),
    ("weight", TypeError, dict(weight=w.to_sparse_csr())),
    ("lora_A", TypeError, dict(lora_A=a.to_sparse())),
    ("scaling", TypeError, dict(scaling="half")),
    ("scaling", TypeError, dict(scaling=[1.0])),
]


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native" and backends.native()[1]:
        pytest.skip(backends.native()[1])
    with use_backend(request.param):
        yield request.param


def refuse(name, error, call):
    with pytest.raises(error, match=rf"fastlora: {name}: got .* expected "):
        call()


@pytest.mark.parametrize("name, error, given", LINEAR, ids=lambda v: v if isinstance(v, str) else "")
def test_linear(backend, name, error, given):
    refuse(name, error, lambda: lora_linear(**dict(x=x, weight=w, lora_A=a, lora_B=b) | given))


@pytest.mark.parametrize("name, error, given", LINEAR[:14], ids=lambda v: v if isinstance(v, str) else "")
def test_linear_under_fake_tensors(name, error, given):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        refuse(name, error, lambda: lora_linear(**dict(x=x, weight=w, lora_A=a, lora_B=b) | given))


def test_halves(backend):
    refuse("lora_A", ValueError, lambda: lora_shrink(x, torch.randn(3, 9)))
    refuse("x", TypeError, lambda: lora_shrink(x.int(), a))
    refuse("dropout_p", ValueError, lambda: lora_shrink(x, a, dropout_p=2.0, training=True))
    refuse("z", ValueError, lambda: lora_expand(y, z[:, :2], b))
    refuse("z", TypeError, lambda: lora_expand(y, z.double(), b))
    refuse("lora_B", ValueError, lambda: lora_expand(y, z, b, columns=(0, 5)))
    refuse("columns", ValueError, lambda: lora_expand(y, z, b, columns=(4, 10)))
    refuse("columns", ValueError, lambda: lora_expand(y, z, b, columns=(1,)))
    refuse("scaling", ValueError, lambda: lora_expand(y, z, b, torch.ones(5)))
    refuse("gates", ValueError, lambda: lora_expand(y, z, b, gates=torch.ones(4)))
    ids = torch.zeros(5, dtype=torch.long)
    refuse("z", ValueError, lambda: lora_expand(y, z[:, :2], b, ids=ids))
    refuse("z", ValueError, lambda: lora_expand(y, z[None], b, ids=ids))
    refuse("ids", ValueError, lambda: lora_expand(y, z, b, ids=ids[:3]))
    refuse("ids", TypeError, lambda: lora_expand(y, z, b, ids=ids.float()))
    refuse("ids", TypeError, lambda: lora_expand(y, z, b, ids=ids.short()))
    with pytest.raises(IndexError):
        lora_expand(y, z, b, ids=ids + 5)
