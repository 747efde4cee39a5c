"""DyLoRA: every rank of one layer, its scale, its gradients, and what an optimizer may move."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora import dynamic
from fastlora.dynamic import DyLinear

loralib = pytest.importorskip("loralib")
R = 4


def layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = DyLinear(6, 5, r=R, lora_alpha=8, dtype=dtype, **options)
    nn.init.normal_(made.lora_B)
    return made


def at_rank(made, x, k, alpha=8):
    """The paper's equation: alpha / k, the first k rows and columns."""
    update = made.lora_B[:, :k] @ made.lora_A[:k] * (alpha / k)
    return nn.functional.linear(x, made.weight + update, made.bias)


X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


@pytest.mark.parametrize("k", range(1, R + 1))
@pytest.mark.parametrize("training", [True, False])
def test_rank_is_an_index_and_the_scale_alpha_by_b(k, training):
    """Behaviour 17: DyLoRA's rank is 0-based, the effective scale alpha / b."""
    made = layer().train(training)
    made.set_rank(k - 1)
    assert made.get_rank() == k - 1 and made.get_dimension() == R
    torch.testing.assert_close(made(X), at_rank(made, X, k))
    made.set_rank(k - 1, frozen=True)
    torch.testing.assert_close(made(X), at_rank(made, X, k))


def test_starts_at_rank_one_with_loraliblike_keys_and_values():
    made = layer()
    torch.manual_seed(0)
    theirs = loralib.Linear(6, 5, r=R, lora_alpha=8, dtype=torch.float64)
    assert made.get_rank() == 0
    assert list(made.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(t, made.state_dict()[n]) for n, t in theirs.state_dict().items() if n != "lora_B")
    theirs.load_state_dict(made.state_dict())
    made.set_rank(R - 1)
    torch.testing.assert_close(made(X), theirs(X))


@pytest.mark.parametrize("bad", [-1, R, 1.0, True, None])
def test_an_index_past_the_end_is_refused(bad):
    made = layer()
    made.set_rank(2, frozen=True)
    with pytest.raises(ValueError, match="rank: got .*expected an index from 0 to 3"):
        made.set_rank(bad)
    assert made.get_rank() == 2 and made.frozen
    for k in (0, R + 1, 1.5):
        with pytest.raises(ValueError, match="rank: got"):
            dynamic.model_rank(made, k)
    with pytest.raises(ValueError, match="model: got"):
        dynamic.model_rank(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="rank 1 or more"):
        dynamic.sample(DyLinear(3, 3), 0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("k", range(1, R + 1))
def test_frozen_changes_gradients_never_values(k, frozen):
    """Behaviour 17."""
    made = layer()
    made.set_rank(k - 1, frozen)
    made(X).square().sum().backward()
    at_rank(made, X, k).square().sum().backward(inputs=[a := made.lora_A, b := made.lora_B])
    both_a, both_b = a.grad, b.grad
    live = slice(k - 1, k) if frozen else slice(0, k)
    a.grad = b.grad = None
    made(X).square().sum().backward()
    for grad, both, rows in ((a.grad, both_a - a.grad, live), (b.grad.T, (both_b - b.grad).T, live)):
        want = torch.zeros_like(grad)
        want[rows] = both[rows]
        torch.testing.assert_close(grad, want)


def test_gradients_in_float64_at_every_rank():
    made = layer()
    x = X.clone().requires_grad_()
    for k in range(1, R + 1):
        dynamic.model_rank(made, k)
        assert torch.autograd.gradcheck(lambda x, *_: made(x), (x, made.lora_A, made.lora_B), fast_mode=True)


def test_the_cost_falls_with_the_rank():
    made = layer()
    seen = []
    for k in (1, R):
        dynamic.model_rank(made, k)
        A, B, *_ = made.adapters()
        seen.append((A[0].shape[0], B[0].shape[1]))
        assert A[0].data_ptr() == made.lora_A.data_ptr() and B[0].data_ptr() == made.lora_B.data_ptr()
    assert seen == [(1, 1), (R, R)]


def test_changing_the_rank_while_merged():
    """DyLoRA's layer unmerges with the new rank and corrupts W."""
    made = layer().eval()
    weight = made.weight.clone()
    for k in (2, 4, 1):
        made.set_rank(k - 1)
        with torch.no_grad():
            torch.testing.assert_close(made(X), at_rank(made, X, k))
        assert made._merged_copy
    assert torch.equal(made.train().weight, weight)


def net(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    fastlora.inject(model, r=R, lora_alpha=8, dynamic=True, **options)
    for made in (model[0], model[2]):
        nn.init.normal_(made.lora_B)
    return model


def test_parent_eval_merges_and_ranks_still_change():
    """The original overrides eval(), which a parent never calls."""
    model = nn.Sequential(layer()).eval()
    assert model[0].merged
    with torch.no_grad():
        outputs = [model(X) for k in (1, 2) if dynamic.model_rank(model, k)]
    assert not torch.allclose(*outputs)


def test_sample_depends_on_seed_and_step_alone():
    model = net()
    drawn = [dynamic.sample(model, step) for step in range(400)]
    torch.manual_seed(99)
    assert drawn == [dynamic.sample(net(), step) for step in range(400)]
    assert drawn != [dynamic.sample(model, step, seed=1) for step in range(400)]
    counts = [drawn.count(k) for k in range(1, R + 1)]
    assert sum(counts) == 400 and min(counts) > 70
    assert {dynamic.sample(model, step, distribution=[0, 1, 0, 0]) for step in range(9)} == {2}
    assert model[0].rank == model[2].rank == 2
    for bad in ([1, 2], "normal", [0, 0, 0, 0], [1, 1, 1, -1]):
        with pytest.raises(ValueError, match="distribution: got"):
            dynamic.sample(model, 0, distribution=bad)


def test_model_rank_puts_back_what_was():
    model = net()
    dynamic.model_rank(model, 2, frozen=True)
    with dynamic.model_rank(model, 3):
        assert (model[0].rank, model[2].rank, model[0].frozen) == (3, 3, False)
    assert (model[0].rank, model[0].frozen) == (2, True)
    with dynamic.model_rank(model[0], 1):
        assert (model[0].rank, model[2].rank) == (1, 2)


def test_evaluate_ranks_and_truncate():
    model = net().eval()
    dynamic.model_rank(model, 2)
    outputs = {k: model(X) for k in range(1, R + 1) if dynamic.model_rank(model, k)}
    dynamic.model_rank(model, 2)
    report = dynamic.evaluate_ranks(model, lambda m: (m(X) - outputs[3]).abs().sum().item(), higher_is_better=False)
    assert list(report.values) == [1, 2, 3, 4] and report.rank == 3 and report.values[3] == 0
    assert dynamic.evaluate_ranks(model, lambda m: [0.0, 0.7, 0.9, 1.0][m[0].rank - 1], tolerance=0.1).rank == 3
    assert model[0].rank == 2
    with pytest.raises(ZeroDivisionError):
        dynamic.evaluate_ranks(model, lambda m: 1 / 0)
    assert model[0].rank == 2
    for k in (1, 3):
        plain = dynamic.truncate(model, k)
        assert plain[0].r == k and plain[0].rank is None and plain[0].lora_A.shape == (k, 6)
        torch.testing.assert_close(plain(X), outputs[k])
    assert type(dynamic.truncate(layer(), 2)) is fastlora.Linear and model[0].r == R


def test_a_truncated_adapter_loads_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = net().float().eval()
    plain = dynamic.truncate(model, 2)
    fastlora.save_adapter(plain, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fastlora.remove(copy.deepcopy(model)), tmp_path)
    torch.testing.assert_close(theirs(X.float()), plain(X.float()))
    with dynamic.model_rank(model, 2):
        torch.testing.assert_close(model(X.float()), plain(X.float()))


def test_copies_keep_the_rank():
    made = layer()
    made.set_rank(2, frozen=True)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.get_rank() == 2 and other.frozen and torch.equal(other(X), made(X))


def test_compiled_at_every_rank():
    model = net()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for k in (*range(1, R + 1), None):
        dynamic.model_rank(model, k)
        torch.testing.assert_close(run(X), model(X))


DRAWN = torch.Generator().manual_seed(0)
KINDS = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(3, 2, 6, generator=DRAWN)),
    "embedding": (lambda: nn.Embedding(9, 5), torch.tensor([[1, 2], [3, 4], [5, 8]])),
    "conv": (lambda: nn.Conv1d(6, 5, 3), torch.randn(3, 6, 7, generator=DRAWN)),
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), torch.randn(3, 4, 6, generator=DRAWN)),
}


def kind(name):
    torch.manual_seed(0)
    model = nn.ModuleDict({"it": KINDS[name][0]()})
    fastlora.inject(model, r=R, target_modules=["it"], dynamic=True)
    for m in model.modules():
        if isinstance(m, fastlora.LoRALayer):
            nn.init.normal_(m.lora_A), nn.init.normal_(m.lora_B)
    x, it = KINDS[name][1], model["it"]
    if name == "attention":
        return model, (lambda rows=slice(None): it(x[rows], x[rows], x[rows])[0])
    return model, (lambda rows=slice(None): it(x[rows]))


def others(name):
    torch.manual_seed(0)
    made = {
        "merged": lambda: fastlora.MergedLinear(6, 6, r=R, enable_lora=[True, False, True]),
        "loralib conv": lambda: fastlora.Conv2d(4, 6, (3, 2), r=R, groups=2),
        "tasks conv": lambda: fastlora.Conv2d(4, 6, 3, r=R, form="tasks"),
    }[name]()
    nn.init.normal_(made.lora_A), nn.init.normal_(made.lora_B)
    x = torch.randn(3, 6) if name == "merged" else torch.randn(3, 4, 5, 5)
    return nn.Sequential(made), (lambda rows=slice(None): made(x[rows]))


@pytest.mark.parametrize("name", [*KINDS, "merged", "loralib conv", "tasks conv"])
def test_ranks_per_batch_row_on_every_kind(name):
    model, run = kind(name) if name in KINDS else others(name)
    dynamic.model_rank(model, 3)
    with dynamic.row_ranks(model, [1, 4, 2]):
        mixed = run()
    for i, k in enumerate((1, 4, 2)):
        with dynamic.model_rank(model, k):
            torch.testing.assert_close(mixed[i : i + 1], run(slice(i, i + 1)), rtol=1e-4, atol=1e-4)
            exported = fastlora.merge_and_export(dynamic.truncate(model, k))
        assert not any(isinstance(m, fastlora.LoRALayer) for m in exported.modules())
    for bad in ([], [0, 1], [1, 5], [1.5]):
        with pytest.raises(ValueError, match="ranks: got"):
            dynamic.row_ranks(model, bad)
    with dynamic.row_ranks(model, [1, 4]), pytest.raises(ValueError, match="2 batch rows"):
        run()


def test_frozen_mode_warns_once_of_rows_that_move(monkeypatch):
    monkeypatch.setattr(dynamic, "_warned", False)
    model = net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def train(steps):
        for step in range(steps):
            dynamic.sample(model, step, frozen=True)
            model(X).sum().backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="hold_frozen_rows") as told:
        train(3)
    assert len(told) == 1
    monkeypatch.setattr(dynamic, "_warned", False)
    model = net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    dynamic.hold_frozen_rows(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(4)
