"""Linear: parity with the real loralib, exact gradients, W untouched."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora.nn as lora
from fastlora.model import inject, mark_only_lora_as_trainable

loralib = pytest.importorskip("loralib")

ARGUMENTS = [
    {"r": 4, "lora_alpha": 8},
    {"r": 3},
    {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True},
    {"r": 4, "lora_alpha": 8, "bias": False},
    {"r": 4, "merge_weights": False},
    {"r": 0},
    {},
    {"r": 2, "dtype": torch.float64},
]


def pair(seed=0, **arguments):
    """The same layer from both libraries, drawn from the same seed, with a lora_B that is not zero."""
    layers = []
    for library in (loralib, lora):
        torch.manual_seed(seed)
        layer = library.Linear(12, 20, **arguments)
        if arguments.get("r"):
            nn.init.normal_(layer.lora_B)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_same_seed_gives_loralibs_state_dict(arguments):
    theirs, ours = pair(**arguments)
    want, have = theirs.state_dict(), ours.state_dict()
    assert list(have) == list(want)
    for name, tensor in want.items():
        assert torch.equal(have[name], tensor), name
        assert have[name].dtype == tensor.dtype
    wanted = [(n, p.requires_grad) for n, p in theirs.named_parameters()]
    assert [(n, p.requires_grad) for n, p in ours.named_parameters()] == wanted
    ours.load_state_dict(want)
    theirs.load_state_dict(have)


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_as_loralib(arguments, training):
    theirs, ours = pair(**arguments)
    theirs.train(training)
    ours.train(training)
    x = torch.randn(2, 5, 12, dtype=arguments.get("dtype"))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert ours.merged == theirs.merged


def test_defaults_and_attributes_as_loralib():
    theirs, ours = pair(r=4)
    for name in ("r", "lora_alpha", "merged", "merge_weights", "fan_in_fan_out"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert float(ours.scaling) == theirs.scaling == 0.25
    x = torch.randn(3)
    assert ours.lora_dropout(x) is x
    assert lora.Linear(3, 4, r=2, lora_dropout=0.5).lora_dropout.p == 0.5
    assert ours.train() is ours and ours.eval() is ours


def train_a_program(library, mark, state_dict):
    """A small program as people write it for loralib."""
    torch.manual_seed(1)
    model = nn.Sequential(library.Linear(6, 16, r=4, lora_alpha=8), nn.Tanh(), library.Linear(16, 3, r=2))
    mark(model, bias="lora_only")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, target = torch.randn(32, 6), torch.randn(32, 3)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
    saved = state_dict(model, bias="lora_only")
    model.eval()
    with torch.no_grad():
        return {name: tensor.clone() for name, tensor in saved.items()}, model(x)


def test_a_loralib_program_gives_the_same_numbers():
    from fastlora.checkpoint import lora_state_dict

    want, out = train_a_program(loralib, loralib.mark_only_lora_as_trainable, loralib.lora_state_dict)
    have, ours = train_a_program(lora, mark_only_lora_as_trainable, lora_state_dict)
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(have[name], tensor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_marking_and_state_dict_as_loralib(bias):
    from fastlora.checkpoint import lora_state_dict

    def build(library):
        return nn.Sequential(library.Linear(4, 4, r=2), nn.LayerNorm(4), nn.Linear(4, 4))

    theirs, ours = build(loralib), build(lora)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    mark_only_lora_as_trainable(ours, bias)
    wanted = [(n, p.requires_grad) for n, p in theirs.named_parameters()]
    assert [(n, p.requires_grad) for n, p in ours.named_parameters()] == wanted
    assert lora_state_dict(ours, bias).keys() == loralib.lora_state_dict(theirs, bias).keys()


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_layer_below_gets_its_gradient_through_the_update(fan_in_fan_out):
    torch.manual_seed(0)
    below = nn.Linear(5, 6, dtype=torch.float64)
    layer = lora.Linear(6, 4, r=2, lora_alpha=4, fan_in_fan_out=fan_in_fan_out, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5, dtype=torch.float64)
    layer(below(x)).square().sum().backward()
    step, difference = 1e-6, torch.zeros_like(below.weight)
    with torch.no_grad():
        for i in range(below.weight.numel()):
            sides = []
            for sign in (1, -1):
                below.weight.view(-1)[i] += sign * step
                sides.append(layer(below(x)).square().sum())
                below.weight.view(-1)[i] -= sign * step
            difference.view(-1)[i] = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(below.weight.grad, difference, rtol=1e-6, atol=1e-7)


def test_a_thousand_cycles_in_bfloat16_leave_the_weight_alone():
    torch.manual_seed(0)
    layer = lora.Linear(16, 24, r=4, lora_alpha=16, dtype=torch.bfloat16)
    before, x = layer.weight.detach().clone(), torch.randn(2, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(1000):
            layer.train()
            layer.lora_B.normal_(std=0.02)
            layer.eval()
            layer(x)
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.state_dict()["weight"], before)


def test_merged_weight_is_rounded_once():
    torch.manual_seed(0)
    layer = lora.Linear(16, 24, r=4, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    exact = layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double() / 4
    assert torch.equal(layer.merged_weight(), exact.float().bfloat16())


@pytest.mark.parametrize("make", [lambda: lora.Linear(8, 6, r=2, lora_alpha=3, lora_dropout=0.1),
                                  lambda: inject(nn.Linear(8, 6), r=2, lora_alpha=3)])  # fmt: skip
def test_pickle_and_deepcopy(make):
    layer = make().eval()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 8)
    with torch.no_grad():
        want = layer(x)
        for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            assert type(other) is type(layer)
            assert other._merged_copy is None
            torch.testing.assert_close(other(x), want)
            assert torch.equal(other.scaling, layer.scaling)
            other.lora_B.zero_()
        torch.testing.assert_close(layer(x), want)


def test_dropout_only_in_training_and_on_the_adapter_branch_only():
    torch.manual_seed(0)
    layer = lora.Linear(64, 32, r=4, lora_dropout=0.5, merge_weights=False)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
        layer.lora_dropout.p = 1.0
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer.lora_dropout.eval()
        torch.testing.assert_close(layer(x), layer.eval()(x))


def test_dropout_is_off_where_only_the_layer_is_in_training():
    layer = inject(nn.Linear(8, 6).eval(), r=2, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_reset_parameters_uses_the_true_fan_in(fan_in_fan_out):
    layer = lora.Linear(4, 4096, r=2, fan_in_fan_out=fan_in_fan_out)
    nn.init.normal_(layer.lora_B)
    layer.reset_parameters()
    assert not layer.lora_B.any()
    assert 0.45 < layer.weight.abs().max() <= 0.5
    assert layer.weight.shape == ((4, 4096) if fan_in_fan_out else (4096, 4))


def test_bfloat16_base_with_float32_adapters_under_no_autocast_and_autocast():
    torch.manual_seed(0)
    layer = inject(nn.Linear(16, 8, dtype=torch.bfloat16), r=4)
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(3, 16)
    y = layer(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("argument, value", [
    ("r", -1), ("r", 1.5), ("lora_alpha", float("nan")), ("lora_dropout", -0.1), ("lora_dropout", 1.1)
])  # fmt: skip
def test_errors_name_the_argument(argument, value):
    with pytest.raises(ValueError, match=f"{argument}: got .*, expected"):
        lora.Linear(4, 4, **{"r": 2, argument: value})


@pytest.mark.parametrize("training, dropout", [(True, 0.0), (True, 0.5), (False, 0.0)])
def test_compiles_whole(training, dropout):
    torch.manual_seed(0)
    model = nn.Sequential(lora.Linear(8, 16, r=4, lora_dropout=dropout), nn.GELU(), inject(nn.Linear(16, 4), r=2))
    model.train(training)
    nn.init.normal_(model[0].lora_B)
    nn.init.normal_(model[2].lora_B)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8, requires_grad=True)
    wanted, results = [x, *(p for p in model.parameters() if p.requires_grad)], []
    for run in (model, compiled):
        torch.manual_seed(1)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    have, want = results
    for mine, theirs in zip(have, want, strict=True):
        torch.testing.assert_close(mine, theirs)
