"""Frozen steps of models that were copied, of closures, of groups added later; when a step that is not held warns."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import dynamic

R = 8
X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    fastlora.inject(model, r=R, lora_alpha=8, dynamic=True)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def moved(model, run):
    """The 0-based components of the last layer that run() changes."""
    a, b = (p.detach().clone() for p in (model[2].lora_A, model[2].lora_B))
    run()
    layer = model[2]
    return [
        k for k in range(R) if not (torch.equal(layer.lora_A[k], a[k]) and torch.equal(layer.lora_B[:, k], b[:, k]))
    ]


def held(model):
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    dynamic.hold_frozen_rows(optimizer)
    return optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


def assigned(model):
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    for name, p in model.named_parameters():
        p.requires_grad = "lora_" in name
    return model


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), assigned])
def test_copies_of_a_frozen_model_are_held(make):
    model = net()
    dynamic.model_rank(model, 3, frozen=True)
    model = make(model)
    optimizer = held(model)
    assert moved(model, lambda: step(model, optimizer)) == [2]


def test_a_rank_set_in_the_closure():
    model = net()
    optimizer = held(model)
    for at in range(4):
        drawn = []

        def closure(at=at, drawn=drawn):
            drawn.append(dynamic.sample(model, at, frozen=True))
            optimizer.zero_grad()
            loss = model(X).square().sum()
            loss.backward()
            return loss

        assert moved(model, lambda closure=closure: optimizer.step(closure)) == [drawn[0] - 1]


def test_a_step_that_failed_leaves_nothing_to_put_back():
    model = net()
    optimizer = held(model)
    dynamic.model_rank(model, 2, frozen=True)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    dynamic.model_rank(model, R)
    assert moved(model, lambda: step(model, optimizer)) == list(range(R))


def test_a_model_without_its_adapters_is_no_bother():
    model, other = net(), net()
    dynamic.model_rank(other, 2, frozen=True)
    fastlora.remove(other)
    optimizer = held(model)
    dynamic.model_rank(model, 2, frozen=True)
    assert moved(model, lambda: step(model, optimizer)) == [1]


def test_a_subclass_and_what_is_no_optimizer_are_refused():
    class Mine(torch.optim.LBFGS):
        pass

    for bad in (Mine(trained(net())), net(), None):
        with pytest.raises(TypeError, match="optimizer: got"):
            dynamic.hold_frozen_rows(bad)


def test_accelerates_optimizer():
    accelerate = pytest.importorskip("accelerate")
    model = net()
    optimizer = accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(trained(model), lr=0.1))
    dynamic.hold_frozen_rows(optimizer)
    dynamic.model_rank(model, 4, frozen=True)
    assert moved(model, lambda: step(model, optimizer)) == [3]


LOOPS = {
    "one step": lambda model, at: dynamic.sample(model, at, frozen=True),
    "train() in each": lambda model, at: model.train() and dynamic.sample(model, at, frozen=True),
    "setter": lambda model, at: dynamic.model_rank(model, 2, frozen=True),
    "indices": lambda model, at: [dynamic.DyLinear.set_rank(m, 1, frozen=True) for m in (model[0], model[2])],
}


@pytest.mark.parametrize("way", [None, "compiled", "reentrant"])
@pytest.mark.parametrize("loop", LOOPS)
def test_frozen_steps_warn_once_unless_held(loop, way, monkeypatch):
    def told(optimizer_of):
        monkeypatch.setattr(dynamic, "_warned", False)
        model = net()
        optimizer = optimizer_of(model)
        run = torch.compile(model, backend="eager") if way == "compiled" else model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for at in range(1 if loop == "one step" else 3):
                LOOPS[loop](model, at)
                x = X.clone().requires_grad_()
                y = checkpoint(run, x, use_reentrant=True) if way == "reentrant" else run(x)
                y.sum().backward()
                optimizer.step()
        return sum("hold_frozen_rows" in str(w.message) for w in caught)

    assert told(lambda model: torch.optim.AdamW(trained(model))) == 1
    assert told(held) == 0
    torch._dynamo.reset()


def test_a_group_added_later_and_a_second_hold(monkeypatch):
    monkeypatch.setattr(dynamic, "_warned", False)
    model = net()
    optimizer = torch.optim.AdamW(trained(model)[:2], lr=0.1)
    first, _ = dynamic.hold_frozen_rows(optimizer), dynamic.hold_frozen_rows(optimizer)
    first.remove()
    optimizer.add_param_group({"params": trained(model)[2:]})
    dynamic.model_rank(model, 2, frozen=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moved(model, lambda: step(model, optimizer)) == [1]
