"""Tasks under torch.compile, activation checkpointing, a Trainer, threads: never silently the base model."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import tasks


class Net(nn.Module):
    """Two checkpointed halves."""

    def __init__(self, **how):
        super().__init__()
        self.one, self.two, self.how = nn.Linear(6, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 4)), how

    def forward(self, x):
        if not self.how:
            return self.two(self.one(x))
        return checkpoint(self.two, checkpoint(self.one, x, **self.how), **self.how)


def build(**how):
    torch.manual_seed(0)
    model = tasks.Model(Net(**how)).add_task("a", init="original").add_task("b", init="original")
    return model.requires_grad_(False)


def gradients(model):
    each = [layer.tasks[name] for layer in model.lora_layers() for name in "ab"]
    return [None if p.grad is None else p.grad.clone() for task in each for p in task.parameters()]


CONTEXT = {"use_reentrant": False, "context_fn": fastlora.checkpoint_context}
X = torch.linspace(-1, 1, 18).view(3, 6)
CHOICES = ["a", ["a", "b"], {"a": 0.3, "b": -1.0}, [["a"], ["b"], []]]


def expected(choice):
    model = build()
    model(X.clone().requires_grad_(), tasks=choice).square().sum().backward()
    return gradients(model)


def close(found, want):
    for f, w in zip(found, want, strict=True):
        assert (f is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(f, w)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recompute_runs_the_forwards_tasks(choice, compiled):
    model = build(**CONTEXT)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with model.task(choice):
        loss = run(X.clone().requires_grad_()).square().sum()
    # after the block, and in a thread of its own
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    close(gradients(model), expected(choice))


@pytest.mark.parametrize("how", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_a_recompute_without_the_context_raises(how):
    model = build(**how)
    loss = model(X.clone().requires_grad_(), task="a").square().sum()
    with pytest.raises(RuntimeError, match="context_fn=fastlora.checkpoint_context"):
        loss.backward()
    # another task in force is no better than none
    model = build(**how)
    loss = model(X.clone().requires_grad_(), task="a").square().sum()
    with model.task("b"), pytest.raises(RuntimeError, match="tasks were chosen"):
        loss.backward()


def test_a_recompute_inside_the_block_is_right_without_the_context():
    model = build(use_reentrant=False)
    with model.task("a"):
        model(X.clone().requires_grad_()).square().sum().backward()
    close(gradients(model), expected("a"))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def test_compiled_calls_with_changing_tasks():
    model = build()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    for choice in [None, *CHOICES, "b", *CHOICES]:
        torch.testing.assert_close(whole(X, tasks=choice), model(X, tasks=choice))


def test_compiled_calls_in_blocks_with_changing_tasks():
    model = build()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    for choice in [None, *CHOICES, "b", *CHOICES]:
        with model.task(choice):
            torch.testing.assert_close(whole(X), model(X))


def test_new_weights_do_not_compile_again():
    model = build()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    for i in range(12):
        weights = {"a": 0.1 * i + 0.05, "b": 1.5 - i}
        with model.task(weights):
            torch.testing.assert_close(whole(X), model(X))
    torch._dynamo.reset()
    for i in range(12):
        weights = {"a": torch.tensor(0.1 * i + 0.05), "b": torch.tensor(1.5 - i)}
        torch.testing.assert_close(whole(X, tasks=weights), model(X, tasks=weights))


def test_compiled_by_inductor():
    model = build()
    run = torch.compile(model, fullgraph=True)
    for choice in ("a", {"a": 0.5, "b": 1.0}):
        torch.testing.assert_close(run(X, tasks=choice), model(X, tasks=choice), rtol=1e-4, atol=1e-5)


def bert(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=30, num_labels=2, max_position_embeddings=16, **sizes, **options)
    return transformers.BertForSequenceClassification(config)


def test_gradient_checkpointing_of_a_transformers_model():
    ids = torch.arange(24).view(3, 8)
    found = []
    for checkpointed in (False, True):
        model = tasks.Model(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        torch.manual_seed(1)
        model.add_task("a", init="original").add_task("b", init="original").requires_grad_(False).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(ids, tasks=["a", ["a", "b"], None], labels=torch.tensor([0, 1, 1])).loss
        loss.backward()
        found.append(gradients(model))
    close(*found)
    assert sum(g is not None for g in found[0]) > 20
    with pytest.raises(ValueError, match="use_reentrant: got True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_a_trainer_with_gradient_checkpointing_trains_the_chosen_task(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tasks.Model(bert()).add_task("a").add_task("b").requires_grad_(False)
    data = [{"input_ids": torch.randint(30, (8,)), "labels": torch.tensor(i % 2)} for i in range(8)]
    before = {name: {k: t.clone() for k, t in model.state_dict(task=name).items()} for name in "ab"}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, gradient_checkpointing=True, report_to=[],
        use_cpu=True, remove_unused_columns=False, save_strategy="no", learning_rate=0.01, disable_tqdm=True,
    )  # fmt: skip
    with model.task("a"):
        transformers.Trainer(model, arguments, train_dataset=data).train()
    moved = {n: any(not torch.equal(t, before[n][k]) for k, t in model.state_dict(task=n).items()) for n in "ab"}
    assert moved == {"a": True, "b": False}
