"""MergedLinear: parity with the real loralib, exact gradients, and no (out, in) update in its forward."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora as lora

loralib = pytest.importorskip("loralib")

ENABLED = [[True, False, True], [False, True, False], [True, True, True]]


def pair(enable_lora, **arguments):
    layers = []
    for library in (loralib, lora):
        torch.manual_seed(0)
        layer = library.MergedLinear(10, 12, r=2, lora_alpha=6, enable_lora=enable_lora, **arguments)
        nn.init.normal_(layer.lora_B)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("enable_lora", ENABLED)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_behaviour_06_packed_factors_as_in_loralib(enable_lora, fan_in_fan_out, training):
    """lora_A is (r·g, in), lora_B packs the enabled parts alone, no index in the state dict; same numbers."""
    theirs, ours = pair(enable_lora, fan_in_fan_out=fan_in_fan_out)
    want = theirs.state_dict()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in want.items()}
    assert all(torch.equal(t, want[n]) for n, t in ours.state_dict().items())
    x, dy, found = torch.randn(3, 4, 10), torch.randn(3, 4, 12), []
    for layer in (theirs.train(training) or theirs, ours.train(training)):
        if training:
            given = x.clone().requires_grad_()
            y = layer(given)
            found.append([y, *torch.autograd.grad(y, [given, layer.lora_A, layer.lora_B], dy)])
        else:
            with torch.no_grad():
                found.append([layer(x)])
    for have, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-4, atol=1e-5)
    ours.load_state_dict(want)
    theirs.load_state_dict(ours.state_dict())


def test_only_the_enabled_parts_change():
    _, layer = pair([True, False, True])
    x = torch.randn(5, 10)
    change = (layer(x) - nn.functional.linear(x, layer.weight, layer.bias)).unflatten(-1, (3, 4)).abs().amax((0, 2))
    assert change[1] < 1e-5 and change[0] > 0.1 and change[2] > 0.1
    part = layer.weight[8:] + 3.0 * layer.lora_B[4:] @ layer.lora_A[2:]
    torch.testing.assert_close(layer(x)[:, 8:], x @ part.T + layer.bias[8:])


@pytest.mark.parametrize("arguments", [{"r": 2}, {"r": 2, "enable_lora": [False, False]}, {}])
def test_behaviour_07_all_parts_off(arguments):
    """loralib's default enable_lora with r > 0 raises AttributeError."""
    layer = lora.MergedLinear(6, 4, **arguments)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert list(layer.state_dict()) == ["weight", "bias"] and layer.weight.requires_grad
    assert type(lora.merge_and_export(layer.eval())) is nn.Linear


@pytest.mark.parametrize("enable_lora", ENABLED)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_in_float64(enable_lora, dropout):
    torch.manual_seed(1)
    layer = lora.MergedLinear(5, 6, r=2, enable_lora=enable_lora, lora_dropout=dropout, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    layer.weight.requires_grad = True
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def run(*_):
        torch.manual_seed(2)
        return layer(x)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        of = out if isinstance(out, (tuple, list)) else (out,)
        self.seen.update(t.numel() for t in itertools.chain(of) if isinstance(t, torch.Tensor))
        return out


def test_the_update_is_never_made():
    layer = lora.MergedLinear(32, 48, r=2, enable_lora=[True, False, True])
    x = torch.randn(3, 32, requires_grad=True)
    with Sizes() as sizes:
        layer(x).sum().backward()
    # the transposed view of W alone has as many elements
    assert 3 * 48 in sizes.seen and 48 * 32 not in sizes.seen


def test_merged_export_and_half_precision():
    _, layer = pair([True, False, True])
    half = lora.inject(nn.Sequential(nn.Linear(10, 12)).bfloat16(), r=2)[0]
    assert half.lora_A.dtype == torch.float32
    layer = layer.bfloat16()
    x = torch.randn(5, 10, dtype=torch.bfloat16)
    weight = layer.weight.clone()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=0.02, atol=0.05)
        for _ in range(100):
            layer.train(), layer.eval()(x)
    assert torch.equal(layer.weight, weight)
    exported = lora.merge_and_export(layer)
    assert type(exported) is nn.Linear and type(layer) is lora.MergedLinear
    torch.testing.assert_close(exported(x), layer(x), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"enable_lora": []}, "enable_lora: got"),
        ({"enable_lora": ["q"]}, "enable_lora: got"),
        ({"enable_lora": [True] * 5}, "enable_lora: got 5 parts, expected a divisor of out_features = 12"),
        ({"r": -1}, "r: got -1"),
        ({"r": 1, "lora_dropout": 2.0}, "lora_dropout: got 2.0"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        lora.MergedLinear(10, 12, **bad)


@pytest.mark.parametrize("bad", [True, None, "qv", [["q"]], [0.5]])
def test_enable_lora_is_a_list_of_bools(bad):
    with pytest.raises(ValueError, match="enable_lora: got .*expected a list of bools"):
        lora.MergedLinear(4, 6, r=2, enable_lora=bad)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear"])
def test_behaviour_05_fan_in_fan_out_transposes_w_alone(name):
    """After the reset: the same seed gives the transpose, lora_A and lora_B as they are."""
    options = {"enable_lora": [True, False]} if name == "MergedLinear" else {}
    made = []
    for library, flag in ((loralib, True), (lora, True), (lora, False)):
        torch.manual_seed(0)
        made.append(getattr(library, name)(10, 12, r=2, fan_in_fan_out=flag, **options))
    theirs, ours, plain = made
    assert ours.weight.shape == (10, 12) and torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.weight.T, plain.weight)
    assert torch.equal(ours.lora_A, plain.lora_A) and ours.lora_B.shape == plain.lora_B.shape


def test_a_rank_in_force_takes_the_first_rows_of_each_part():
    _, layer = pair([True, False, True])
    layer.use_rank(1)
    x, (A, B) = torch.randn(5, 10), (layer.lora_A, layer.lora_B)
    update = torch.cat([x @ A[:1].T @ B[:4, :1].T, torch.zeros(5, 4), x @ A[2:3].T @ B[4:, :1].T], 1)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + 6 * update)
