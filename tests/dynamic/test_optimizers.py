"""hold_frozen_rows: under every optimizer only the live component of a frozen step moves; and checkpointed steps."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import dynamic

R = 4
OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.1, "weight_decay": 0.1},
    "AdamW": {"lr": 0.1, "weight_decay": 0.5, "amsgrad": True},
    "NAdam": {"lr": 0.1},
    "RAdam": {"lr": 0.1},
    "Adamax": {"lr": 0.1},
    "Adadelta": {"lr": 1.0},
    "Adagrad": {"lr": 0.1},
    "RMSprop": {"lr": 0.1, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.1},
    "ASGD": {"lr": 0.1},
}


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        fastlora.MergedLinear(6, 6, r=R, enable_lora=[True, True, False]), nn.Tanh(), fastlora.Linear(6, 3, r=R)
    )
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    fastlora.mark_only_lora_as_trainable(model)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def parts(model):
    """{(layer, component): its entries of lora_A and lora_B}."""
    layers = [model[0], model[2]]
    pairs = [(layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in layers]
    return [[layer.narrow(a, b, k, k + 1) for k in range(R)] for layer, (a, b) in zip(layers, pairs, strict=True)]


def same(one, two):
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def still(before, model):
    """For each component of each layer, whether it is what it was."""
    after = parts(model)
    return [same(b, a) for of, now in zip(before, after, strict=True) for b, a in zip(of, now, strict=True)]


X = torch.linspace(-1, 1, 18).view(3, 6)


def step_and_compare(model, optimizer, step, run):
    rank = dynamic.sample(model, step, frozen=True)
    before = parts(model)
    run()
    after = parts(model)
    for layer in range(2):
        for k in range(R):
            moved = not same(before[layer][k], after[layer][k])
            assert moved == (k == rank - 1), f"{optimizer} step {step}, rank {rank}, layer {layer}, component {k + 1}"


FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


WAYS = [(name, {"foreach": on}) for name in OPTIMIZERS for on in (False, True)]
WAYS += [(name, {"fused": True}) for name in FUSED]


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_only_the_live_component_moves(name, how):
    model, cls = net(), getattr(torch.optim, name)
    optimizer = cls(trained(model), **OPTIMIZERS[name], **how)
    dynamic.hold_frozen_rows(optimizer)

    def run():
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()

    for step in range(6):
        step_and_compare(model, name, step, run)


def test_the_state_of_other_components_is_put_back():
    """A component's moments are those of the steps in which it was live, as if it had an optimizer of its own."""
    model = net()
    optimizer = torch.optim.Adam(trained(model), lr=0.1)
    dynamic.hold_frozen_rows(optimizer)
    layer, mean = model[2], torch.zeros(R, 6)
    for step in range(8):
        k = dynamic.sample(model, step, frozen=True) - 1
        optimizer.zero_grad()
        model(X).square().sum().backward()
        mean[k] = 0.9 * mean[k] + 0.1 * layer.lora_A.grad[k]
        optimizer.step()
        torch.testing.assert_close(optimizer.state[layer.lora_A]["exp_avg"], mean)


def test_without_it_momentum_and_decay_move_frozen_rows():
    model = net()
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    handle = dynamic.hold_frozen_rows(optimizer)
    handle.remove()
    dynamic.model_rank(model, 1, frozen=True)
    before = parts(model)
    model(X).square().sum().backward()
    optimizer.step()
    assert not same(before[1][3], parts(model)[1][3])


def test_a_closure_a_scaler_and_steps_that_are_not_frozen():
    model = net()
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    dynamic.hold_frozen_rows(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    def scaled():
        optimizer.zero_grad()
        scaler.scale(model(X).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    step_and_compare(model, "AdamW", 0, lambda: optimizer.step(closure))
    step_and_compare(model, "AdamW", 1, scaled)
    dynamic.model_rank(model, R)
    before = parts(model)
    optimizer.step(closure)
    assert not any(still(before, model))


def test_a_skipped_step_moves_nothing():
    model = net()
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    dynamic.hold_frozen_rows(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    dynamic.sample(model, 0, frozen=True)
    before = parts(model)
    scaler.scale(model(X).square().sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert all(still(before, model))


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Muon"])
def test_optimizers_without_a_state_of_the_parameters_shape_are_refused(name):
    optimizer = getattr(torch.optim, name)(trained(net()))
    with pytest.raises(TypeError, match=f"optimizer: got {name}, expected one whose state"):
        dynamic.hold_frozen_rows(optimizer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_steps_recompute_at_their_own_rank(reentrant):
    def gradients(model, *context):
        for p in trained(model):
            p.grad = None
        for step in range(3):
            k = dynamic.sample(model, step)
            x = X.clone().requires_grad_()
            y = checkpoint(model, x, use_reentrant=reentrant) if context else model(x)
            (k * y).square().sum().backward()
        return [p.grad.clone() for p in trained(model)]

    for found, want in zip(gradients(net(), True), gradients(net()), strict=True):
        torch.testing.assert_close(found, want)


def test_a_recompute_at_another_rank_raises():
    model = net()
    for block in (dynamic.model_rank, lambda m, k: dynamic.row_ranks(m, [k] * 3)):
        for later in (None, 3):
            dynamic.sample(model, 0, distribution=[1, 0, 0, 0])
            with block(model, 2):
                y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=False)
            dynamic.model_rank(model, later)
            with pytest.raises(RuntimeError, match="model_rank or row_ranks was used"):
                y.sum().backward()
    dynamic.sample(model, 0)
    with dynamic.row_ranks(model, [1, 2, 3]):
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False, context_fn=fastlora.checkpoint_context)
        model(x).sum().backward()
    want, x.grad = x.grad, None
    y.sum().backward()
    torch.testing.assert_close(x.grad, want)
