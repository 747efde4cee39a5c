"""State dicts of tasks: the original's names and layouts, any task's file, exact, and nothing changed by a bad one."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora import tasks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.xfc = nn.Linear(6, 5), nn.Linear(5, 4)
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(4, 6, (3, 2), groups=2)

    def forward(self, ids):
        return self.xfc(self.fc(self.embed(ids)))


def build(*names):
    torch.manual_seed(0)
    model = tasks.Model(Net())
    for name in names:
        model.add_task(name, init="original")
    return model


def test_a_tasks_file_has_the_originals_keys_and_shapes():
    state = build("a").state_dict(task="a")
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "fc.a.module.A": (5, 2), "fc.a.module.B": (2, 6),
        "xfc.a.module.A": (4, 2), "xfc.a.module.B": (2, 5),
        "embed.a.module.A": (7, 2), "embed.a.module.B": (2, 6),
        "conv.a.module.A": (3, 2, 6, 2), "conv.a.module.B": (3, 2, 2, 2),
    }  # fmt: skip


def test_the_originals_layouts_give_the_originals_numbers():
    """A and B are swapped there, and a convolution has a pair for each kernel position, viewed as W."""
    model = build("a")
    state, net = model.state_dict(task="a"), model.model
    delta = {name: state[f"{name}.a.module.A"] @ state[f"{name}.a.module.B"] for name in ("fc", "embed", "conv")}
    x, image, ids = torch.randn(3, 6), torch.randn(2, 4, 5, 5), torch.tensor([0, 6, 2])
    with model.task("a"):
        torch.testing.assert_close(net.fc(x), x @ (net.fc.weight + delta["fc"]).T + net.fc.bias)
        torch.testing.assert_close(net.embed(ids), (net.embed.weight + delta["embed"])[ids])
        weight = net.conv.weight + delta["conv"].view(net.conv.weight.shape)
        torch.testing.assert_close(net.conv(image), nn.functional.conv2d(image, weight, net.conv.bias, groups=2))


@pytest.mark.parametrize("source", ["a", "other", "v1.0", "x.module.y"])
def test_a_file_of_any_task_loads_exactly(source, tmp_path):
    theirs = build(source)
    save_file(theirs.state_dict(task=source), tmp_path / "task.safetensors")
    model = build("b")
    report = model.load_state_dict(load_file(tmp_path / "task.safetensors"), task="b")
    assert not report.missing_keys and not report.unexpected_keys
    want = theirs.state_dict(task=source)
    for (name, tensor), expected in zip(model.state_dict(task="b").items(), want.values(), strict=True):
        assert torch.equal(tensor, expected), name
    ids = torch.tensor([1, 2])
    assert torch.equal(model(ids, task="b"), theirs(ids, task=source))


def test_loraliblike_and_peft_names_load_too():
    theirs, model = build("a"), build("a")
    layers = dict(theirs._layers())
    for form in ("{}.lora_{}", "base_model.model.{}.lora_{}.weight"):
        model.add_task("b", exist_ok=True)
        each = [(n, k, layer.tasks["a"].state_dict()["lora_" + k]) for n, layer in layers.items() for k in "AB"]
        given = {form.format(n, k): tensor for n, k, tensor in each}
        model.load_state_dict(given, task="b")
        want = theirs.state_dict(task="a").values()
        assert all(torch.equal(t, w) for t, w in zip(model.state_dict(task="b").values(), want, strict=True))
        model.remove_task("b")


def test_the_base_is_the_models_own_state_dict():
    model = build("a")
    plain = Net()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    given = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
    layers = ("fc", "xfc", "embed", "conv")
    assert {name.split(".")[0] for name in given} == set(layers)
    originals = {name.replace(".", ".module."): tensor for name, tensor in given.items()}
    for state in (given, originals):
        model.load_state_dict({name: torch.zeros_like(t) for name, t in given.items()})
        model.load_state_dict(state)
        assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())


def test_as_a_child_of_another_module():
    parent = nn.ModuleDict({"net": build("a")})
    assert list(parent.state_dict()) == [f"net.{name}" for name in Net().state_dict()]


def test_missing_and_unexpected_keys_are_reported_and_nothing_changes():
    model = build("a", "b")
    before = {name: t.clone() for name, t in model.state_dict(task="a").items()}
    good = {name: torch.ones_like(t) for name, t in before.items()}
    short = {name: t for name, t in good.items() if not name.startswith("conv")}
    bad = [
        (short, "missing: conv.lora_A, conv.lora_B"),
        ({**good, "head.a.module.A": torch.ones(2)}, "unexpected: head.a.module.A"),
        ({**good, "fc.a.module.A": torch.ones(5, 3)}, r"fc.lora_B: got shape \(5, 3\), expected \(5, 2\)"),
    ]
    for given, message in bad:
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(given, task="a")
    two = {**good, **{name.replace(".a.", ".c."): t for name, t in good.items()}}
    with pytest.raises(ValueError, match=r"the tasks \['a', 'c'\], expected one task, or 'b'"):
        model.load_state_dict(two, task="b")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict(task="a").items())
    report = model.load_state_dict({**short, "extra": torch.ones(1)}, task="a", strict=False)
    assert report.missing_keys == ["conv.lora_A", "conv.lora_B"] and report.unexpected_keys == ["extra"]
    assert model.state_dict(task="a")["fc.a.module.A"].eq(1).all()
    with pytest.raises(RuntimeError, match="missing: .*fc.weight"):
        model.load_state_dict({"xfc.weight": torch.ones(4, 5)})


class Doubled(nn.Module):
    """A task's module of a user's own: twice the base, and a bias."""

    def __init__(self, module):
        super().__init__()
        self.base, self.shift = [module], nn.Parameter(torch.ones(4))

    def forward(self, x):
        return 2 * self.base[0](x) + self.shift


class Block(nn.Sequential):
    """A container that a user registers: what is in it is left alone."""


@pytest.fixture
def registered():
    before = dict(tasks.base_module_wrappers)
    tasks.register_base_module_wrapper(Block, Doubled)
    yield
    tasks.base_module_wrappers.clear()
    tasks.base_module_wrappers.update(before)


def test_a_users_own_module_is_wrapped_and_not_entered(registered):
    block = Block(nn.Linear(3, 4), nn.ReLU())
    model = tasks.Model(nn.ModuleDict({"one": block, "two": block, "out": nn.Linear(4, 2)}))
    assert tasks.get_module_task_constructor(block) is Doubled and tasks.get_module_task_constructor(nn.ReLU()) is None
    model.add_task("a").add_task("b")
    one = model.model["one"]
    assert model.model["two"] is one and type(one.module[0]) is nn.Linear
    names = ["one.0.weight", "one.0.bias", "two.0.weight", "two.0.bias", "out.weight", "out.bias"]
    assert list(model.state_dict()) == names
    assert "one.a.module.shift" in model.state_dict(task="a")
    x = torch.randn(3, 3)
    base = block(x)
    with model.task("a"):
        torch.testing.assert_close(one(x), 2 * base + 1)
    with model.task({"a": 0.5, "b": 2.0}):
        torch.testing.assert_close(one(x), base + 2.5 * (base + 1))
    with model.task([["a"], [], ["a", "b"]]):
        torch.testing.assert_close(one(x), base + torch.tensor([[1.0], [0.0], [2.0]]) * (base + 1))
    model.load_state_dict({**model.state_dict(task="a"), "one.a.module.shift": torch.zeros(4)}, task="b")
    assert one.tasks["b"].shift.eq(0).all()
    with pytest.raises(ValueError, match="a module of a user's type"):
        model.merge_and_export("a")


def test_the_root_may_be_wrapped(registered):
    x = torch.randn(2, 3)
    model = tasks.Model(Block(nn.Linear(3, 4))).add_task("a")
    torch.testing.assert_close(model(x, task="a"), 2 * model(x) + 1)
    assert list(model.state_dict()) == ["0.weight", "0.bias"] and list(model.state_dict(task="a")) == ["a.module.shift"]
    model = tasks.Model(nn.Linear(3, 4)).add_task("a", init="original")
    assert list(model.state_dict(task="a")) == ["a.module.A", "a.module.B"]
    model.load_state_dict({"b.module.A": torch.ones(4, 1), "b.module.B": torch.ones(1, 3)}, task="a")
    torch.testing.assert_close(model(x, task="a"), model(x) + x.sum(-1, keepdim=True))


def test_a_rank_function_of_ones_own(registered):
    tasks.register_base_module_wrapper(nn.Linear, lambda module: tasks.Linear(module, rank=lambda *s: min(s) - 1))
    model = tasks.Model(nn.Sequential(nn.Linear(6, 5))).add_task("a").add_task("b", r=1)
    assert [model.model[0].tasks[name].r for name in "ab"] == [4, 1]
    for bad in ((int, Doubled), (nn.Linear, 3)):
        with pytest.raises(TypeError):
            tasks.register_base_module_wrapper(*bad)
    for nothing in (nn.ReLU(), tasks.Model(nn.Linear(2, 2)), "x"):
        with pytest.raises((ValueError, TypeError), match="model: got"):
            tasks.Model(nothing)
