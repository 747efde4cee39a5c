"""tasks.Model where it meets others: names, parents, Trainers, a user's own modules, functions for single adapters."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import tasks

X = torch.linspace(-1, 1, 18).view(3, 6)


def build(*names, net=None, **options):
    torch.manual_seed(0)
    model = tasks.Model(nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)) if net is None else net, **options)
    for name in names:
        model.add_task(name, init="original")
    return model


@pytest.mark.parametrize("name", ["train", "type", "keys", "_modules", "base_layer", "module", "%74rain", " "])
def test_names_that_mean_something_elsewhere(name):
    model, other = build(name, "a"), build("b")
    y = model(X, task=name)
    other.load_state_dict(model.state_dict(task=name), task="b")
    assert torch.equal(other(X, task="b"), y) and not torch.allclose(y, model(X))
    copied = pickle.loads(pickle.dumps(model))
    copied.load_state_dict(copied.state_dict(task=name), task=name)
    assert torch.equal(copied(X, task=name), y)
    model.remove_task(name)
    with pytest.raises(KeyError, match=r"expected one of \['a'\]"):
        model(X, task=name)


def test_a_task_removed_in_its_block():
    model = build("a", "train")
    with model.task("train"):
        model.remove_task("train")
        with pytest.raises(KeyError, match=r"got 'train', expected one of \['a'\]"):
            model(X)


def test_the_originals_positional_arguments():
    model = build("a", "b")
    state = model.state_dict("a")
    assert list(state)[0] == "0.a.module.A"
    model.load_state_dict(state, "b")
    assert torch.equal(model(X, task="a"), model(X, task="b"))
    report = model.load_state_dict({}, "b", False)
    assert len(report.missing_keys) == 4


def test_a_parents_state_dict_loads_again():
    parents = [nn.ModuleDict({"net": build("a"), "head": nn.Linear(4, 2)}) for _ in range(2)]
    state = parents[0].state_dict()
    own = {name: t.clone() for name, t in parents[1]["net"].state_dict(task="a").items()}
    nn.init.zeros_(parents[1]["net"].model[0].weight)
    originals = {name.replace("net.0.", "net.0.module."): tensor for name, tensor in state.items()}
    for given in (state, originals):
        assert not any(parents[1].load_state_dict(given))
        assert all(torch.equal(t, state[name]) for name, t in parents[1].state_dict().items())
    assert all(torch.equal(t, own[name]) for name, t in parents[1]["net"].state_dict(task="a").items())
    with pytest.raises(RuntimeError, match="net.model.2.bias"):
        parents[1].load_state_dict({name: t for name, t in state.items() if name != "net.2.bias"})
    whole = torch.compile(parents[0]["net"], backend="eager")
    assert not any(whole.load_state_dict(whole.state_dict()))


def test_ranks_and_weights_that_are_none():
    model = build("a")
    for call in (lambda: model.add_task("b", r=0), lambda: tasks.Model(nn.Linear(2, 2), r=0), lambda: model(X, tasks=5),
                 lambda: model(X, tasks={"a": "x"}), lambda: model(X, tasks={"a": torch.ones(2)})):  # fmt: skip
        with pytest.raises(ValueError, match="(r|tasks.*): got"):
            call()
    assert model.names == ["a"]
    model.add_task("off", lora_alpha=0, init="original")
    torch.testing.assert_close(model(X, task="off"), model(X))


def test_functions_for_single_adapters_refuse_named_tasks(tmp_path):
    model = build("a")
    y = model(X, task="a")
    for call in (fastlora.merge, fastlora.unmerge, fastlora.remove, fastlora.lora_state_dict,
                 lambda m: fastlora.merge(m, in_place=True), lambda m: fastlora.save_adapter(m, tmp_path)):  # fmt: skip
        with model.task("a"), pytest.raises(ValueError, match="got (a model with )?named tasks"):
            call(model)
    with pytest.raises(ValueError, match="no adapter in force"):
        fastlora.set_scale(model, 0.5)
    assert torch.equal(model(X, task="a"), y)
    with model.task("a"):
        fastlora.set_scale(model, 0.5)
    torch.testing.assert_close(model.model[0].tasks["a"].scaling, torch.tensor(0.5))


def test_layers_without_a_dense_weight_are_not_merged():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
    model = build("a", net=net)
    with pytest.raises(ValueError, match="0: got .* which has no dense weight"):
        model.merge_and_export("a")
    torch.testing.assert_close(model.merge_and_export()(X), model(X))


def test_parameters_that_are_plain_attributes():
    """As DataParallel's replicas and FSDP1 keep them."""
    model = build("a", "b")
    y = model(X, tasks=["a", "b"])
    task = model.model[0].tasks["a"]
    factor = task.lora_A.data
    del task._parameters["lora_A"]
    task.lora_A = factor
    torch.testing.assert_close(model(X, tasks=["a", "b"]), y)


def test_an_attention_of_a_users_class_is_left_alone():
    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = build("a", net=nn.Sequential(nn.Linear(6, 8), Attention(8, 2, batch_first=True)))
    assert [name for name, _ in model._layers()] == ["0"]
    assert model(X[None], task="a").shape == (1, 3, 8)


def test_rows_need_a_batch():
    model = build("a", "b", net=nn.Sequential(nn.Conv1d(2, 4, 3)))
    with pytest.raises(ValueError, match="x: got shape .*expected 2 batch rows"):
        model(torch.ones(2, 9), tasks=[["a"], ["b"]])


class EightBit(nn.Module):
    """A layer with a weight in float8."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.weight = nn.Parameter(torch.ones(4, 6).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


def test_eight_bit_weights_get_adapters_of_32():
    model = build("a", net=nn.Sequential(EightBit()))
    assert model.model[0].tasks["a"].lora_A.dtype == torch.float32
    assert not torch.allclose(model(X, task="a"), model(X))


class Block(nn.Sequential):
    """A container that a user registers."""


class Scaled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.base, self.scale = [module], nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x):
        return self.base[0](x) * self.scale


class Net(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.fc, self.block, self.how = nn.Linear(6, 6), Block(nn.Linear(6, 4)), how

    def forward(self, x):
        x = self.fc(x)
        return checkpoint(self.block, x, **self.how) if self.how else self.block(x)


@pytest.fixture
def registered():
    before = dict(tasks.base_module_wrappers)
    tasks.register_base_module_wrapper(Block, Scaled)
    yield
    tasks.base_module_wrappers.clear()
    tasks.base_module_wrappers.update(before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_of_a_users_module_without_the_context_raises(registered, reentrant):
    model = build("a", "b", net=Net(use_reentrant=reentrant))
    loss = model(X.clone().requires_grad_(), task="a").sum()
    # b's module would save tensors of the same shapes
    with model.task("b"), pytest.raises(RuntimeError, match="tasks were chosen"):
        loss.backward()
    assert all(task.scale.grad is None for task in model.model.block.tasks.values())


def test_a_users_module_with_the_context(registered):
    grads = []
    for how in ({}, {"use_reentrant": False, "context_fn": fastlora.checkpoint_context}):
        model = build("a", "b", net=Net(**how))
        model(X.clone().requires_grad_(), task="a").sum().backward()
        grads.append(model.model.block.tasks["a"].scale.grad)
    torch.testing.assert_close(*grads)


def test_disable_adapter_turns_a_users_module_off(registered):
    model = build("a", net=Net())
    with model.task("a"):
        assert not torch.allclose(model(X), model(X, tasks=[]))
        with fastlora.disable_adapter(model):
            torch.testing.assert_close(model(X), model(X, tasks=[]))


def test_a_users_module_elsewhere(registered):
    model = build("a", net=Net())
    exported = model.merge_and_export()
    assert type(exported.block) is Block and torch.equal(exported(X), model(X))
    model.model.block.module.tag = "kept"
    assert model.model.block.tag == "kept" and copy.deepcopy(model).model.block.tag == "kept"
    parent = nn.ModuleDict({"net": model})
    assert not any(parent.load_state_dict(parent.state_dict()))
    del tasks.base_module_wrappers[Block]
    with pytest.raises(ValueError, match="block: got a Block, whose type is registered no longer"):
        model.add_task("c")
    assert model.names == ["a"] and list(model.model.block.tasks) == ["a"]


def test_a_users_constructor_for_linear_layers(registered):
    tasks.register_base_module_wrapper(nn.Linear, Scaled)
    model = build("a", net=nn.Sequential(nn.Linear(6, 4)), target_modules="0")
    torch.testing.assert_close(model(X, task="a"), 0.5 * model(X))
    tasks.register_base_module_wrapper(nn.Linear, lambda module: tasks.Linear(module, rank=lambda *sizes: 3))
    model = build("a", net=nn.Sequential(nn.Linear(6, 4)), lora_alpha=6)
    task = model.model[0].tasks["a"]
    assert task.r == 3 and task.scaling == 2 and task.lora_B.abs().min() > 0


class Loss(nn.Module):
    """A model of a Trainer that takes no further keywords."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.fc(x), labels)}


def test_a_trainer_accumulates_the_wrapped_models_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build("a", net=Loss()).requires_grad_(False)
    data = [{"x": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(torch.randn(8, 6))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4, report_to=[],
        use_cpu=True, remove_unused_columns=False, label_names=["labels"], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    with model.task("a"):
        before = model.state_dict(task="a")["fc.a.module.A"].clone()
        trainer.train()
        assert "eval_loss" in trainer.evaluate()
    assert not trainer.model_accepts_loss_kwargs
    assert not torch.equal(model.state_dict(task="a")["fc.a.module.A"], before)
