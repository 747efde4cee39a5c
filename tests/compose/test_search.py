"""search: the composition that a layer runs, one candidate at a time and several, and what the searches find."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlora.compose import compose, merge_composed, search
from fastlora.compose.bank import named, opened
from fastlora.compose.search import Examples, language_losses, optimise

pytestmark = pytest.mark.filterwarnings("ignore:COBYLA")


class Net(nn.Module):
    """One layer of each kind; the loss is of class scores."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.5)
        self.to(dtype)

    def forward(self, ids):
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.fc(self.dropout(x + self.attention(x, x, x, need_weights=False)[0])).mean(1)


def build(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net(dtype)


def adapter(seed, r=2, layers=("embed", "conv", "attention", "fc")):
    torch.manual_seed(100 + seed)
    shapes = {"embed.lora_A": (r, 11), "embed.lora_B": (8, r), "conv.lora_A": (r, 8, 3), "conv.lora_B": (8, r, 1),
              "fc.lora_A": (r, 8), "fc.lora_B": (5, r)}  # fmt: skip
    # PEFT's: one of q, k and v, and one of the output
    shapes |= {"attention.lora_A": (r, 8), "attention.lora_B": (24, r)}
    shapes |= {"attention.out_proj.lora_A": (r, 8), "attention.out_proj.lora_B": (8, r)}
    return {key: torch.randn(shape) * 0.4 for key, shape in shapes.items() if key.split(".")[0] in layers}


def modules(count=4):
    made = [adapter(i, r=1 + i % 3) for i in range(count)]
    # not every adapter has every layer
    made[-1] = adapter(count, 2, ("fc", "conv"))
    return named(made)


IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7], [8, 9, 10, 1], [2, 2, 5, 5], [7, 1, 0, 3]])

with torch.no_grad():
    # what a composition of them says
    LABELS = merge_composed(build().eval(), modules(), [1.2, 0, 1.2, 0.5])(IDS).argmax(1)
INPUTS = {"ids": IDS, "labels": LABELS}


def class_losses(outputs, inputs):
    return F.cross_entropy(outputs, inputs["labels"], reduction="none")


def objective(model, adapters, weights, mode="lorahub"):
    """By a merged copy of the model."""
    merged = merge_composed(copy.deepcopy(model).eval(), adapters, weights, mode)
    with torch.no_grad():
        loss = class_losses(merged(IDS), INPUTS).mean().item()
    return loss + 0.05 * sum(abs(w) for w in weights) / len(weights)


def state_of(model):
    """Everything that a search could leave behind."""
    attributes = {name: (type(m), m.training, sorted(vars(m)), sorted(m._modules)) for name, m in model.named_modules()}
    return attributes, {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}


def same_state(one, other):
    assert one[0] == other[0]
    assert {n: p[:2] for n, p in one[1].items()} == {n: p[:2] for n, p in other[1].items()}
    assert all(torch.equal(p[2], other[1][n][2]) for n, p in one[1].items())


@pytest.mark.parametrize("mode", ["lorahub", "sum"])
def test_merging_adds_the_composed_update(mode):
    model, adapters, weights = build(), modules(), [0.7, -0.5, 1.2, 0.3]
    made, merged = compose(adapters, weights, mode), merge_composed(build(), adapters, weights, mode)
    update = made["fc.lora_B"] @ made["fc.lora_A"]
    torch.testing.assert_close(merged.fc.weight, model.fc.weight + update)
    update = torch.einsum("or,rik->oik", made["conv.lora_B"][..., 0], made["conv.lora_A"])
    torch.testing.assert_close(merged.conv.weight, model.conv.weight + update)
    update = (made["embed.lora_B"] @ made["embed.lora_A"]).T
    torch.testing.assert_close(merged.embed.weight, model.embed.weight + update)
    update = made["attention.lora_B"] @ made["attention.lora_A"]
    torch.testing.assert_close(merged.attention.in_proj_weight, model.attention.in_proj_weight + update)
    assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]


def several(dtype, mode, weights):
    """(model, adapters, losses, gradients) of all candidates in one forward, then of each alone."""
    model, adapters = build(dtype).eval(), modules()
    examples = Examples(model, INPUTS, class_losses, None)
    losses, grads = [], []
    with opened(model, adapters, mode) as owner:
        for candidates in (weights, *weights[:, None]):
            candidates = candidates.clone().requires_grad_()
            losses.append(examples.losses(owner, candidates))
            grads.append(torch.autograd.grad(losses[-1].sum(), candidates)[0])
    return model, adapters, losses, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["lorahub", "sum"])
def test_several_candidates_are_one_at_a_time(mode, dtype):
    """And both are a merged model; the gradient of the weights too, in bf16 within its rounding of float64."""
    torch.manual_seed(1)
    weights = torch.empty(3, 4).uniform_(-1.5, 1.5)
    model, adapters, losses, grads = several(dtype, mode, weights)
    half = dtype == torch.bfloat16
    torch.testing.assert_close(losses[0], torch.cat(losses[1:]), rtol=3e-2 if half else 1e-4, atol=1e-5)
    together, apart = grads[0], torch.cat(grads[1:])
    if half:
        exact = several(torch.float64, mode, weights)[-1][0]
        for found in (together, apart):
            torch.testing.assert_close(found, exact, rtol=0, atol=0.04 * float(exact.abs().max()))
    else:
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-5)
    for loss, w in zip(losses[0].tolist(), weights.tolist(), strict=True):
        expected = objective(model, adapters, w, mode)
        assert loss + 0.0125 * sum(map(abs, w)) == pytest.approx(expected, rel=3e-2 if half else 1e-4)
    assert losses[0].max() - losses[0].min() > 0.1


def test_flattened_tokens_and_a_row_for_all():
    """Layers whose rows are batch times tokens, and those whose one row is the same for all."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.fc = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = x + self.place(torch.ones(1, x.shape[1], 3))
            return self.fc(x.flatten(0, 1)).view(*x.shape[:2], 2).sum((1, 2))

    torch.manual_seed(0)
    model, x = Flat(), torch.randn(2, 4, 3)
    adapters = named([{f"{p}.lora_{k}": torch.randn(s) for p, o in (("place", 3), ("fc", 2))
                       for k, s in (("A", (1, 3)), ("B", (o, 1)))} for _ in range(2)])  # fmt: skip
    examples = Examples(model, {"x": x}, lambda outputs, _: outputs, None)
    weights = torch.tensor([[0.5, -1.0], [1.0, 0.25], [0.0, 0.0]])
    with opened(model, adapters, "lorahub") as owner, torch.no_grad():
        together = examples.losses(owner, weights)
        apart = torch.cat([examples.losses(owner, w) for w in weights[:, None]])
        torch.testing.assert_close(together, apart)
        torch.testing.assert_close(together[2], model.eval()(x).mean())
        # some of the tokens, as an expert of several gets: whose they are is not known
        with owner.running(weights, x.repeat(3, 1, 1)), pytest.raises(ValueError, match=r"x: got shape \(12, 3\)"):
            model.fc(torch.randn(12, 3))


@pytest.mark.parametrize("mode", ["lorahub", "sum"])
@pytest.mark.parametrize("options", [{}, {"population": 8}, {"method": "gradient"},
                                     {"method": "gradient", "population": 3}])  # fmt: skip
def test_a_search_finds_what_it_says(mode, options):
    model, adapters = build().train(), modules()
    model.fc.eval()
    model.fc.bias.requires_grad = False
    before = state_of(model)
    result = search(model, adapters, INPUTS, class_losses, mode=mode, steps=48, **options)
    same_state(before, state_of(model))
    assert result.evaluations == 48 and result.history[-1][0] == 48
    assert result.history[-1][2] == result.objective < objective(model, adapters, [0.0] * 4) - 0.02
    assert result.objective == pytest.approx(objective(model, adapters, result.weights.tolist(), mode), rel=1e-4)
    assert result.weights.abs().max() <= 1.5
    bests = [best for _, _, best in result.history]
    assert bests == sorted(bests, reverse=True)
    again = search(model, adapters, INPUTS, class_losses, mode=mode, steps=48, **options)
    assert torch.equal(result.weights, again.weights)


def test_a_projection_without_an_adapter():
    adapters = [{k: v for k, v in adapter(i, layers=("attention",)).items() if "out_proj" not in k} for i in range(2)]
    merged = merge_composed(build(), adapters, [0.5, 1.0])
    assert torch.equal(merged.attention.out_proj.weight, build().attention.out_proj.weight)
    assert not torch.equal(merged.attention.in_proj_weight, build().attention.in_proj_weight)
    found = [search(build(), adapters, INPUTS, class_losses, steps=8, population=p).history[0][2] for p in (1, 8)]
    assert found[1] <= found[0] == pytest.approx(objective(build(), adapters, [0.0, 0.0]))


def test_a_grouped_convolution_is_refused():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Flatten())
    before = state_of(model)
    adapters = [{"0.lora_A": torch.randn(2, 4, 3), "0.lora_B": torch.randn(4, 1, 1)}]
    with pytest.raises(ValueError, match="0: got a convolution with groups = 2, expected one with groups = 1"):
        search(model, adapters, {"input": torch.randn(2, 4, 5)}, lambda outputs, _: outputs.sum(1))
    same_state(before, state_of(model))


def test_the_seed_is_the_searchs_own():
    model, adapters = build(), modules()
    options = {"steps": 16, "population": 8}
    first, second, other = (search(model, adapters, INPUTS, class_losses, seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(first.weights, second.weights) and not torch.equal(first.weights, other.weights)


@pytest.mark.parametrize("population", [1, 3])
def test_the_loss_is_the_same_for_every_batch_size(population):
    model, adapters = build().eval(), modules()
    weights = torch.linspace(-1, 1, 4 * population).view(population, 4)
    with opened(model, adapters, "lorahub") as owner, torch.no_grad():
        found = [Examples(model, INPUTS, class_losses, size).losses(owner, weights) for size in (None, 1, 2, 3, 9)]
    for losses in found[1:]:
        torch.testing.assert_close(losses, found[0])


def test_a_rows_language_loss_is_its_own_mean():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, 4], [5, -100, -100, 6]])
    shares = logits.log_softmax(-1)
    whole = [-(shares[0, 0, 1] + shares[0, 1, 2] + shares[0, 2, 3] + shares[0, 3, 4]) / 4,
             -(shares[1, 0, 5] + shares[1, 3, 6]) / 2]  # fmt: skip
    torch.testing.assert_close(language_losses(logits, labels, shift=False), torch.stack(whole))
    shifted = [-(shares[0, 0, 2] + shares[0, 1, 3] + shares[0, 2, 4]) / 3, -shares[1, 2, 6]]
    torch.testing.assert_close(language_losses(logits, labels, shift=True), torch.stack(shifted))


@pytest.mark.filterwarnings("ignore:Clipping very high value")
def test_limits_and_the_bar(capsys):
    def bowl(weights):
        return (weights - 0.5).square().sum(-1)

    found = optimise(bowl, 3, lambda w: 0.0, steps=60, progress=True)
    assert found.objective < 1e-2 and found.evaluations == 60
    assert f"60/60 evaluations, best {found.objective:.4f}\n" in capsys.readouterr().err
    assert optimise(bowl, 3, lambda w: 0.0, steps=50, population=8, seconds=0.0).evaluations == 8
    flat = optimise(lambda w: torch.zeros(len(w)), 3, lambda w: 0.0, steps=50, patience=6)
    assert flat.evaluations == 7 and flat.objective == 0
    found = optimise(bowl, 3, lambda w: 0.0, steps=64, population=8, optimizer="DE")
    assert found.evaluations == 64 and found.objective < 0.3
    half = optimise(lambda w: torch.where(w[:, 0] <= 0, torch.nan, bowl(w)), 3, lambda w: 0.0, steps=60, population=4)
    assert half.objective < 1 and half.weights[0] > 0
    steep = optimise(lambda w: -w.sum(-1), 3, lambda w: 0.0, steps=60, method="gradient", lr=1.0)
    assert steep.weights.tolist() == [1.5] * 3


def test_errors_leave_the_model_alone(monkeypatch):
    model, adapters = build().train(), modules()
    before = state_of(model)

    def fails(match, error=ValueError, adapters=adapters, inputs=INPUTS, row_losses=class_losses, **options):
        with pytest.raises(error, match=match):
            search(model, adapters, inputs, row_losses, steps=4, **options)
        same_state(before, state_of(model))

    fails("adapters: got none", adapters={})
    fails("adapters: got str", TypeError, adapters="a")
    fails("adapters: got x twice", adapters=["x", "x"])
    fails("adapters.*fc.*lora_A", adapters=[adapter(0), {"fc.lora_A": torch.ones(2, 9), "fc.lora_B": torch.ones(5, 2)}])
    fails("adapters.*'other'", adapters=[{"other.lora_A": torch.ones(2, 8), "other.lora_B": torch.ones(5, 2)}])
    fails("mode: got 'mean', expected 'lorahub' or 'sum'", mode="mean")
    fails("method: got 'grid'", method="grid")
    fails("population: got 0", population=0)
    fails("batch_size: got 0", batch_size=0)
    fails("optimizer: got 'Nelder'", optimizer="Nelder")
    fails("optimizer: got 'CMA', expected none", method="gradient", optimizer="CMA")
    fails(r"row_losses: got \(\), expected a loss for each row", row_losses=lambda o, i: class_losses(o, i).mean())
    fails("inputs: got .*expected labels", inputs={"ids": IDS}, row_losses=None)
    fails("labels: got a row of -100", inputs={"ids": IDS, "labels": torch.full((5, 2), -100)}, row_losses=None)
    fails("inputs: got rows", inputs={"ids": IDS, "labels": torch.ones(3)})
    fails("inputs.'text'.: got list", TypeError, inputs={"text": ["a"]})
    fails("own", RuntimeError, row_losses=lambda outputs, inputs: (_ for _ in ()).throw(RuntimeError("own")))
    with pytest.raises(ValueError, match=r"weights: got 1 numbers, expected 4"):
        merge_composed(model, adapters, [1.0])
    same_state(before, state_of(model))
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    fails("needs nevergrad: pip install nevergrad", ImportError)
    assert search(model, adapters, INPUTS, class_losses, steps=4, method="gradient").evaluations == 4
