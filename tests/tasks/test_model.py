"""tasks.Model: one task, several, one for each batch row; whose parameters they are."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import tasks
from fastlora.nn.bank import escape


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.fc(self.norm(self.attention(x, x, x, need_weights=False)[0]))


def build(*names, net=None, **options):
    torch.manual_seed(0)
    model = tasks.Model(Net() if net is None else net)
    for name in names:
        model.add_task(name, **options)
        wake(model, name)
    return model.eval()


def wake(model, name):
    """Make a task do something."""
    with torch.no_grad():
        for module in (layer.tasks[escape(name)] for layer in model.lora_layers()):
            nn.init.normal_(module.lora_A, std=0.5)
            nn.init.normal_(module.lora_B, std=0.5)


IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7], [8, 9, 10, 1]])


def by_formula(model, layer, x, chosen):
    """x (W + Σ weight · A B)ᵀ + bias from the state dict of each task, the original's letters."""
    weight = layer.weight.detach().clone()
    for name, gate in chosen.items():
        state = model.state_dict(task=name)
        weight += gate * state[f"fc.{name}.module.A"] @ state[f"fc.{name}.module.B"]
    return x @ weight.T + layer.bias


@pytest.mark.parametrize(
    ("choice", "weights"),
    [
        ("a", {"a": 1}),
        (["a", "b"], {"a": 1, "b": 1}),
        (["a", "a"], {"a": 2}),
        ({"a": 0.7, "c": -0.3}, {"a": 0.7, "c": -0.3}),
        ([], {}),
        ({}, {}),
    ],
)
def test_the_output_is_the_originals_formula(choice, weights):
    torch.manual_seed(0)
    model = tasks.Model(nn.ModuleDict({"fc": nn.Linear(6, 5)}))
    for name in "abc":
        model.add_task(name)
        wake(model, name)
    x = torch.randn(4, 6)
    with model.task(choice):
        y = model.model["fc"](x)
    torch.testing.assert_close(y, by_formula(model, model.model["fc"], x, weights))


def test_default_rank_and_scale_are_the_originals():
    model = build("a")
    ranks = {name: layer.tasks["a"].r for name, layer in model._layers()}
    # int(sqrt(min(sizes))): embedding (11, 8), convolution (8, 8), linear (8, 5)
    assert ranks["embed"] == ranks["conv"] == 2 and ranks["fc"] == 2
    assert all(layer.tasks["a"].scaling == 1 for layer in model.lora_layers())
    model.add_task("big", r=4, lora_alpha=8)
    assert model.model.fc.tasks["big"].scaling == 2


def test_a_new_task_leaves_the_output_unchanged_and_the_originals_init_does_not():
    model = build()
    before = model(IDS)
    model.add_task("a").add_task("b", init="original")
    torch.testing.assert_close(model(IDS, task="a"), before)
    assert not torch.allclose(model(IDS, task="b"), before)
    factors = model.model.fc.tasks["b"]
    bound = 1 / factors.lora_B.shape[1] ** 0.5  # kaiming_uniform_(a=sqrt(5)) of A (out, r)
    assert factors.lora_B.abs().max() <= bound and factors.lora_A.abs().min() > 0


def test_several_tasks_are_the_sum_of_their_updates():
    model = build("a", "b", "c", net=nn.Linear(6, 5))
    x = torch.randn(3, 6)
    base = model(x)
    update = {name: model(x, task=name) - base for name in "abc"}
    torch.testing.assert_close(model(x, tasks=["a", "c"]), base + update["a"] + update["c"])
    torch.testing.assert_close(model(x, tasks={"a": 0.7, "b": 0.3}), base + 0.7 * update["a"] + 0.3 * update["b"])


@pytest.mark.parametrize("rows", [[["a"], ["b", "c"], []], ["a", None, {"b": 0.5, "a": -1.0}], [["c"], ["c"], ["c"]]])
def test_each_batch_row_has_its_own_tasks(rows):
    """Behaviour that TheDiscoMole/LoRA wished for: every kind of layer, in one forward."""
    model = build("a", "b", "c")
    mixed = model(IDS, tasks=rows)
    alone = torch.cat([model(IDS[i : i + 1], tasks=[row]) for i, row in enumerate(rows)])
    torch.testing.assert_close(mixed, alone)
    single = [model(IDS[i : i + 1], tasks={} if row is None else row) for i, row in enumerate(rows)]
    torch.testing.assert_close(mixed, torch.cat(single))


def test_a_layer_that_sees_one_row_for_the_whole_batch_repeats_it():
    class Positions(Net):
        def forward(self, ids):
            return super().forward(ids) + self.fc(self.embed(torch.arange(4)[None]))

    model = build("a", "b", net=Positions())
    mixed = model(IDS, tasks=["a", "b", None])
    torch.testing.assert_close(mixed[1:2], model(IDS[1:2], task="b"))
    with pytest.raises(ValueError, match="x: got shape .*expected 2 batch rows"):
        model(IDS, tasks=[["a"], ["b"]])


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("choice", [["a", "b", "c"], {"a": 0.1, "b": 0.2, "c": 0.3}, [["a"], ["b"], ["c"]]])
def test_three_tasks_cost_the_calls_of_one(choice):
    model = build("a", "b", "c")
    with Count() as one:
        model(IDS, task="a")
    with Count() as three:
        model(IDS, tasks=choice)
    ours = [c for c in one.calls if c.startswith("fastlora")]
    assert [c for c in three.calls if c.startswith("fastlora")] == ours
    # q, k, v, o and fc; the embedding's update
    assert len([c for c in ours if "lora_linear" in c]) == 5 and len([c for c in ours if "lora_expand" in c]) == 1
    assert three.calls.count("aten.convolution.default") <= one.calls.count("aten.convolution.default") + 1


def test_interleaved_training_moves_only_the_steps_own_task():
    model = build("a", "b").train()
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for step in range(4):
        task, other = ("a", "b") if step % 2 else ("b", "a")
        before = {name: t.clone() for name, t in model.state_dict(task=other).items()}
        changed = {name: t.clone() for name, t in model.state_dict(task=task).items()}
        model(IDS, task=task).square().sum().backward()
        assert all(p.grad is None for layer in model.lora_layers() for p in layer.tasks[other].parameters())
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict(task=other).items())
        assert not all(torch.equal(t, changed[name]) for name, t in model.state_dict(task=task).items())


def test_gradients_in_float64():
    model = build("a", "b", net=Net().double()).requires_grad_(False)
    weights = torch.tensor([0.7, -0.3], dtype=torch.float32, requires_grad=True)
    parameters = [p for layer in model.lora_layers() for t in layer.tasks.values() for p in (t.lora_A, t.lora_B)]

    def run(*_):
        # the padding row has no gradient
        return model(IDS.clamp(min=1), tasks=["a", {"a": 0.5, "b": 2.0}, None])

    assert torch.autograd.gradcheck(run, parameters, fast_mode=True)
    model(IDS, tasks={"a": weights[0], "b": weights[1]}).square().sum().backward()
    assert weights.grad.abs().min() > 0


def test_new_tasks_follow_the_base_layers_dtype_and_mode():
    model = build(net=Net().bfloat16()).train()
    model.add_task("a")
    assert {p.dtype for layer in model.lora_layers() for p in layer.tasks["a"].parameters()} == {torch.bfloat16}
    assert all(layer.tasks["a"].training for layer in model.lora_layers())


def test_names_are_free():
    model = build("v1.0", "a/b %2E", "v1%2E0")
    assert model.names == ["v1.0", "a/b %2E", "v1%2E0"]
    y = model(IDS, task="v1.0")
    fresh = build("other")
    fresh.load_state_dict(model.state_dict(task="v1.0"), task="other")
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(IDS, task="other"), y)


def test_bad_choices_say_what_there_is():
    model = build("a", "b")
    for call in (lambda: model(IDS, task="x"), lambda: model(IDS, tasks=["a", "x"]), lambda: model.remove_task("x"),
                 lambda: model.state_dict(task="x"), lambda: model.task({"x": 1})):  # fmt: skip
        with pytest.raises(KeyError, match=r"'x', expected one of \['a', 'b'\]"):
            call()
    with pytest.raises(ValueError, match="one of the two"):
        model(IDS, task="a", tasks=["b"])
    with pytest.raises(ValueError, match="task: got 'a', expected a new name"):
        model.add_task("a")
    state = model.state_dict(task="a")
    assert model.add_task("a", exist_ok=True) is model
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict(task="a").items())
    for bad in ({"task": ""}, {"task": "c", "r": 0.5}, {"task": "c", "init": "x"}):
        with pytest.raises(ValueError):
            model.add_task(**bad)
    with pytest.raises(TypeError, match="task: got int"):
        model.add_task(3)
    assert model.names == ["a", "b"] and set(model.model.fc.tasks) == {"a", "b"}
    model.remove_task("a")
    with pytest.raises(KeyError, match=r"expected one of \['b'\]"):
        model(IDS, task="a")


def test_copies_are_independent():
    model = build("a", "b")
    y = model(IDS, task="a")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS, task="a"), y)
        wake(other, "a")
        other.remove_task("b")
        with model.task("a"):
            # the choice of one model is not another's
            assert torch.equal(model(IDS), y) and torch.equal(other(IDS), model(IDS, tasks=[]))
        assert not torch.allclose(other(IDS, task="a"), y)


def test_tied_modules_stay_tied():
    shared = nn.Linear(4, 4)
    model = tasks.Model(nn.ModuleDict({"one": shared, "two": shared})).add_task("a")
    assert model.model["one"] is model.model["two"] and len(list(model.lora_layers())) == 1
    assert not [name for name in model.state_dict() if "tasks" in name]
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = tasks.Model(nn.ModuleList([embedding, head]))
    assert model.model[0].weight is model.model[1].weight


def test_threads_have_tasks_of_their_own():
    model = build("a", "b")
    want = {name: model(IDS, task=name) for name in "ab"}
    barrier, wrong = threading.Barrier(2), []

    def run(name):
        for _ in range(20):
            with model.task(name):
                barrier.wait()
                if not torch.equal(model(IDS), want[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_merging_removing_and_disabling():
    model = build("a", "b")
    base, both = model(IDS), model(IDS, tasks={"a": 0.5, "b": 2.0})
    exported = model.merge_and_export({"a": 0.5, "b": 2.0})
    with model.task(["a"]):
        single = fastlora.merge_and_export(model)
        with fastlora.disable_adapter(model):
            torch.testing.assert_close(model(IDS), base)
    torch.testing.assert_close(exported(IDS), both, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single(IDS), model(IDS, task="a"), rtol=1e-4, atol=1e-5)
    assert [type(m) for m in exported.modules()] == [type(m) for m in Net().modules()]
    assert sorted(exported.state_dict()) == sorted(Net().state_dict()) == sorted(model.state_dict())
    torch.testing.assert_close(fastlora.merge_and_export(model)(IDS), base)
