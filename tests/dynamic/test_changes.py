"""Ranks that change between a forward, its backward and its step; layers of other kinds."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import dynamic, tasks

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


def gradients(model, y):
    return torch.autograd.grad(y.square().sum(), trained(model))


def at_rank(k):
    model = net()
    dynamic.model_rank(model, k)
    return gradients(model, model(X))


def same(one, two):
    return all(torch.allclose(a, b) for a, b in zip(one, two, strict=True))


def test_backward_after_the_block():
    model = net()
    with dynamic.model_rank(model, 2):
        y = model(X)
    assert same(gradients(model, y), at_rank(2))


def test_one_backward_through_two_ranks():
    model, loss = net(), 0
    for k in (2, 5):
        dynamic.model_rank(model, k)
        loss = loss + model(X).square().sum()
    want = [a + b for a, b in zip(at_rank(2), at_rank(5), strict=True)]
    assert same(torch.autograd.grad(loss, trained(model)), want)


def test_a_block_may_be_entered_again():
    model = net()
    block = dynamic.model_rank(model, 4)
    for _ in range(2):
        with block:
            assert model[0].rank == 4
        assert model[0].rank == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_steps_with_the_setter(reentrant):
    model = net()
    for k in (1, 3, None, 2):
        dynamic.model_rank(model, k)
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)
        for p in trained(model):
            p.grad = None
        y.square().sum().backward()
        assert same([p.grad for p in trained(model)], at_rank(k))


def test_a_truncated_copy_of_a_trained_model_trains_checkpointed():
    model = net()
    dynamic.sample(model, 0)
    model(X).sum().backward()
    plain = dynamic.truncate(model, 2)
    checkpoint(plain, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert all(p.grad is not None for p in trained(plain))


@pytest.mark.parametrize("block", [dynamic.model_rank, lambda model, k: dynamic.row_ranks(model, [k] * 3)])
def test_a_reentrant_recompute_at_another_rank_raises(block):
    model = net()
    with block(model, 2):
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="model_rank or row_ranks was used"):
        y.sum().backward()


def test_row_ranks_are_one_models():
    model, other = net(), net()
    want = other(X)
    with dynamic.row_ranks(model, [1, 4, 8]), dynamic.row_ranks(net(), [2, 2]):
        assert torch.equal(other(X), want)
        mixed = model(X)
    for i, k in enumerate((1, 4, 8)):
        dynamic.model_rank(model, k)
        torch.testing.assert_close(mixed[i : i + 1], model(X[i : i + 1]), rtol=1e-6, atol=1e-6)


def test_layers_of_a_lower_r_use_all_they_have():
    torch.manual_seed(0)
    model = nn.Sequential(fastlora.Linear(6, 6, r=2), fastlora.Linear(6, 6, r=R))
    for layer in model:
        nn.init.normal_(layer.lora_B)
    x = X.float()
    with dynamic.row_ranks(model, [5, 1, 2]):
        mixed = model(x)
    for i, k in enumerate((5, 1, 2)):
        dynamic.model_rank(model, k)
        torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1]))


@pytest.mark.parametrize("length", [3, 5])
def test_row_ranks_of_attention_with_the_batch_second(length):
    torch.manual_seed(0)
    layer = fastlora.MultiheadAttention(6, 2, r=4)
    for name, p in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    x = torch.randn(length, 3, 6)
    with dynamic.row_ranks(layer, [1, 4, 2]):
        mixed = layer(x, x, x)[0]
    for i, k in enumerate((1, 4, 2)):
        dynamic.model_rank(layer, k)
        one = x[:, i : i + 1]
        torch.testing.assert_close(mixed[:, i : i + 1], layer(one, one, one)[0], rtol=1e-4, atol=1e-5)


def test_layers_without_a_rank_to_choose_are_refused():
    conv = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2))
    with pytest.raises(ValueError, match="multiple of groups"):
        fastlora.inject(conv, r=4, target_modules=["0"], dynamic=True)
    assert type(conv[0]) is nn.Conv1d
    fastlora.inject(conv, r=4, target_modules=["0"])
    for call in (dynamic.model_rank, lambda m, k: dynamic.row_ranks(m, [k])):
        with pytest.raises(ValueError, match="groups = 2"):
            call(conv, 2)
    model = tasks.Model(nn.Sequential(nn.Linear(6, 6)))
    model.add_task("a", r=4)
    with model.task("a"), pytest.raises(ValueError, match="adapter of their own"):
        dynamic.row_ranks(model, [1, 2])


def test_indices_of_a_layer_that_is_not_at_a_rank():
    layer = dynamic.DyLinear(4, 4, r=R)
    dynamic.model_rank(layer, None)
    assert layer.get_rank() == R - 1
    plain = dynamic.DyLinear(4, 4)
    assert (plain.get_dimension(), plain.get_rank()) == (0, -1)
    with pytest.raises(ValueError, match="without an adapter"):
        plain.set_rank(0)


def test_values_that_rank_nothing():
    model = net()
    assert dynamic.evaluate_ranks(model, lambda m: float("nan") if m[0].rank == 1 else 0.5).rank == 2
    with pytest.raises(ValueError, match="fn: got NaN"):
        dynamic.evaluate_ranks(model, lambda m: float("nan"))
    with pytest.raises(ValueError, match="tolerance: got -0.1"):
        dynamic.evaluate_ranks(model, lambda m: 1.0, tolerance=-0.1)
    with pytest.raises(ValueError, match="rank: got None"):
        dynamic.truncate(model, None)
    with pytest.raises(ValueError, match="frozen: got True"):
        dynamic.model_rank(model, None, frozen=True)
    for bad in (3, "ab", [float("nan")], [True], [[1, 2]]):
        with pytest.raises(ValueError, match="ranks: got"):
            dynamic.row_ranks(model, bad)
    for bad in (["a"] * R, [float("inf")] * R):
        with pytest.raises(ValueError, match="distribution: got"):
            dynamic.sample(model, 0, distribution=bad)


def test_compiled_steps_at_all_eight_ranks():
    model = net()
    run = torch.compile(model, fullgraph=True, backend="eager")
    for frozen in (False, True):
        torch._dynamo.reset()
        for k in (*range(1, R + 1), 3):
            dynamic.model_rank(model, k, frozen)
            found = gradients(model, run(X))
            assert same(found, gradients(model, model(X)))
    torch._dynamo.reset()
