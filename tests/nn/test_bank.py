"""Frozen adapters run in one piece, a copy that follows whatever is done to them."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora import tasks
from fastlora.nn.switch import Stacked

X = torch.linspace(-1, 1, 5 * 12).view(5, 12)
CHOICE = {"a": 0.5, "b": 2.0, "c": -1.0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = tasks.Model(nn.Sequential(nn.Linear(12, 20))).eval()
    for i, name in enumerate(CHOICE):
        made.add_task(name, r=2 + i, lora_alpha=3, init="original")
    for name in (None, *CHOICE):
        made.requires_grad_(False, task=name)
    return made


def run(model, choice=CHOICE):
    with torch.no_grad():
        return model(X, tasks=choice)


def exact(model, choice=CHOICE):
    layer = model.model[0]
    y = torch.nn.functional.linear(X, layer.weight, layer.bias)
    for name, gate in choice.items():
        task = layer.tasks[name]
        y = y + gate * task.scaling * (X @ task.lora_A.T @ task.lora_B.T)
    return y.detach()


def holds(model, choice=CHOICE):
    torch.testing.assert_close(run(model, choice), exact(model, choice), rtol=1e-4, atol=1e-5)


def stacked(model):
    return model.model[0]._stack is not None


def test_it_is_made_once(model):
    holds(model)
    first = model.model[0]._stack
    assert isinstance(first[1], Stacked) and first[1].ranks == [2, 3, 4] and first[1][0].shape == (9, 12)
    holds(model)
    assert model.model[0]._stack is first
    holds(model, {"c": 1.0, "a": 3.0})
    assert model.model[0]._stack[1].ranks == [4, 2]
    # weights alone make no other piece
    holds(model, {"c": 0.0, "a": -3.0})


@pytest.mark.parametrize("grad", [False, True])
def test_it_follows(model, grad):
    layer = model.model[0]

    def check():
        if grad:
            torch.testing.assert_close(model(X, tasks=CHOICE).detach(), exact(model), rtol=1e-4, atol=1e-5)
        else:
            holds(model)
        assert stacked(model)

    check()
    with torch.no_grad():
        layer.tasks["b"].lora_A.mul_(2)
    check()
    model.load_state_dict({k: t * 3 for k, t in model.state_dict(task="a").items()}, task="a")
    check()
    with model.task(list(CHOICE)):
        fastlora.set_scale(model, 0.3)
    check()
    model.remove_task("c").add_task("c", r=5, init="original").requires_grad_(False, task="c")
    check()
    layer.tasks["a"].lora_B.data = torch.ones(20, 2)
    check()
    layer.tasks["a"].lora_B = nn.Parameter(torch.randn(20, 2), requires_grad=False)
    check()
    other = {"model.0.tasks.a.lora_A": torch.ones(2, 12)}
    got = torch.func.functional_call(model, other, (X,), {"tasks": CHOICE}).detach()
    check()
    with torch.no_grad():
        layer.tasks["a"].lora_A.copy_(torch.ones(2, 12))
    torch.testing.assert_close(got, exact(model), rtol=1e-4, atol=1e-5)
    layer.tasks["a"].lora_A.data.mul_(2)
    fastlora.refresh(model)
    check()


def test_trained_adapters_have_none(model):
    holds(model)
    model.requires_grad_(True, task="b")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(X, tasks=CHOICE).square().sum().backward()
        assert not stacked(model)
        optimizer.step()
        holds(model)
    assert model.model[0].tasks["b"].lora_A.grad.abs().max() > 0 and model.model[0].tasks["a"].lora_A.grad is None


def test_gradients_pass_through_it(model):
    gates = torch.tensor([0.5, 2.0, -1.0]).requires_grad_()
    x = X.clone().requires_grad_()
    y = model(x, tasks=dict(zip(CHOICE, gates, strict=True)))
    assert stacked(model)
    got = torch.autograd.grad(y.square().sum(), (x, gates))
    layer = model.model[0]
    parts = [layer.tasks[n].scaling * (x @ layer.tasks[n].lora_A.T @ layer.tasks[n].lora_B.T) for n in CHOICE]
    want = torch.nn.functional.linear(x, layer.weight, layer.bias)
    want = want + sum(gate * part for gate, part in zip(gates, parts, strict=True))
    for g, e in zip(got, torch.autograd.grad(want.square().sum(), (x, gates)), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-3)


def test_half_precision_and_copies(model):
    half = copy.deepcopy(model)
    half.model[0].to(torch.bfloat16)
    for task in half.model[0].tasks.values():
        task.float()
    holds(model)
    y = half(X.bfloat16(), tasks=CHOICE)
    assert half.model[0]._stack[1][0].dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact(model), rtol=0.05, atol=0.05)
    assert not stacked(copy.deepcopy(model))
    with torch.inference_mode():
        again = copy.deepcopy(model)
        torch.testing.assert_close(again(X, tasks=CHOICE), exact(model), rtol=1e-4, atol=1e-5)
        # tensors of inference mode have no version to tell by
        assert not stacked(again)
    holds(again)


def test_a_plain_model_is_left(model):
    holds(model)
    with model.task(CHOICE):
        want = exact(model)
    plain = model.merge_and_export(tasks=CHOICE)
    torch.testing.assert_close(plain(X).detach(), want, rtol=1e-4, atol=1e-5)
    assert "_stack" not in vars(plain[0])
