"""What other libraries call a layer's tensors: read by a layer's own load_state_dict, and written."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora.nn import names

# name -> (here, loralib's class and arguments that make the same layer)
LORALIB = {
    "linear": (lambda lib: lib.Linear(6, 4, r=2, lora_alpha=3), ()),
    "transposed": (lambda lib: lib.Linear(6, 4, r=2, lora_alpha=3, fan_in_fan_out=True), ()),
    "merged": (lambda lib: lib.MergedLinear(6, 9, r=2, lora_alpha=3, enable_lora=[True, False, True]), ()),
    "embedding": (lambda lib: lib.Embedding(7, 5, r=2, lora_alpha=3), ()),
    "conv1d": (lambda lib: lib.Conv1d(4, 6, 1, r=2, lora_alpha=3), ("conv.weight", "conv.bias")),
    "conv2d": (lambda lib: lib.Conv2d(4, 6, 3, r=2, lora_alpha=3, groups=2), ("conv.weight", "conv.bias")),
    "plain conv2d": (lambda lib: lib.Conv2d(4, 6, 3), ("conv.weight", "conv.bias")),
}


def fill(module, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return module


def sample(layer):
    torch.manual_seed(2)
    if hasattr(layer, "num_embeddings"):
        return torch.randint(0, layer.num_embeddings, (2, 3))
    if hasattr(layer, "kernel_size"):
        return torch.randn(2, layer.in_channels, *(5 for _ in layer.kernel_size))
    return torch.randn(2, layer.in_features)


def same_tensors(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", LORALIB)
def test_loralib_both_ways(kind):
    loralib, (make, moved) = pytest.importorskip("loralib"), LORALIB[kind]
    theirs, ours = fill(make(loralib)), make(fastlora)
    stored = theirs.state_dict()
    assert set(moved) <= set(stored)
    assert ours.load_state_dict(stored) == ([], [])
    x = sample(ours)
    torch.testing.assert_close(ours(x), theirs(x))
    back = make(loralib)
    written = {names.base_name(ours, "loralib", n): t for n, t in ours.state_dict().items() if "lora_" not in n}
    if ours.r:
        written.update(names.write(ours, "loralib"))
    assert back.load_state_dict(written) == ([], [])
    same_tensors(back.state_dict(), stored)


def test_behaviour_15_loralib_head_names_a_convolution_twice():
    loralib = pytest.importorskip("loralib")
    theirs, ours = fill(loralib.Conv2d(4, 6, 3, r=2)), fastlora.Conv2d(4, 6, 3, r=2)
    stored = theirs.state_dict()
    stored.update(weight=stored["conv.weight"], bias=stored["conv.bias"].clone())
    before = dict(stored)
    assert ours.load_state_dict(stored) == ([], [])
    assert torch.equal(ours.weight, theirs.conv.weight) and torch.equal(ours.bias, theirs.conv.bias)
    assert stored.keys() == before.keys() and all(stored[name] is before[name] for name in before)
    stored["bias"] = stored["bias"] + 1
    with pytest.raises(ValueError, match="0.bias: got two names with different values"):
        nn.Sequential(ours).load_state_dict({f"0.{name}": tensor for name, tensor in stored.items()})


def test_strict_reports_stay_right():
    layer = fastlora.Conv2d(4, 6, 3, r=2)
    stored = {f"conv.{name}" if "lora" not in name else name: t for name, t in fill(layer).state_dict().items()}
    fewer = {name: tensor for name, tensor in stored.items() if name != "conv.bias"}
    assert layer.load_state_dict(fewer, strict=False) == (["bias"], [])
    more = {**stored, "conv.gain": torch.ones(1), "w_lora_C": torch.ones(1)}
    missing, unexpected = layer.load_state_dict(more, strict=False)
    assert missing == [] and sorted(unexpected) == ["gain", "w_lora_C"]
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        layer.load_state_dict(fewer)
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        layer.load_state_dict({**stored, "lora_A": torch.ones(3, 3)})


def test_own_names_are_not_looked_into(monkeypatch):
    model = nn.Sequential(fastlora.Linear(6, 4, r=2), fastlora.MultiheadAttention(4, 2, r=2))
    monkeypatch.setattr(names, "read", None)
    assert model.load_state_dict(model.state_dict()) == ([], [])


@pytest.mark.parametrize("mark", ["", ".default"])
def test_peft_names_of_a_layer(mark):
    conv = fastlora.Conv2d(4, 6, 3, r=2, form="peft", groups=2)
    for layer, head, tail, shape_A, shape_B in [
        (fastlora.Linear(6, 4, r=2), "lora_", ".weight", (2, 6), (4, 2)),
        (fastlora.Embedding(7, 5, r=2), "lora_embedding_", "", (2, 7), (5, 2)),
        (conv, "lora_", ".weight", (2, 4, 3, 3), (6, 1, 1, 1)),
    ]:
        written = {f"{head}A{mark}{tail}": shape_A, f"{head}B{mark}{tail}": shape_B}
        fill(layer)
        stored = {f"base_layer.{n}": torch.randn_like(t) for n, t in layer.state_dict().items() if "lora_" not in n}
        stored.update((name, torch.randn(shape)) for name, shape in written.items())
        assert layer.load_state_dict(stored) == ([], [])
        A, B = list(stored.values())[-2:]
        assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B)
        assert torch.equal(layer.weight, stored["base_layer.weight"])
        if not mark:
            same_tensors(names.write(layer, "peft"), {name: stored[name] for name in written})


LORATORCH = {
    "linear": (lambda: fastlora.Linear(6, 4, r=2, lora_alpha=3), (2, 6), (4, 2)),
    "merged": (lambda: fastlora.MergedLinear(6, 9, r=2, enable_lora=[True, False, True]), (4, 6), (6, 2)),
    "embedding": (lambda: fastlora.Embedding(7, 5, r=2, lora_alpha=3), (2, 5), (7, 2)),
    "conv1d": (lambda: fastlora.Conv1d(4, 6, 3, r=2, groups=2), (6, 12), (3, 6)),
    "conv2d": (lambda: fastlora.Conv2d(4, 6, 3, r=2, groups=2), (6, 12), (9, 6)),
    "conv3d": (lambda: fastlora.Conv3d(4, 6, 3, r=2, groups=2), (6, 36), (9, 6)),
}


@pytest.mark.parametrize("kind", LORATORCH)
def test_behaviour_2_loratorch_names_and_layouts(kind):
    make, shape_A, shape_B = LORATORCH[kind]
    layer = fill(make())
    base = {name: tensor for name, tensor in layer.state_dict().items() if "lora_" not in name}
    stored = {"w_lora_A": torch.randn(shape_A), "w_lora_B": torch.randn(shape_B)}
    assert layer.load_state_dict({**base, **stored}) == ([], [])
    same_tensors(names.write(layer, "loratorch"), stored)
    if kind != "merged":
        update = (stored["w_lora_B"] @ stored["w_lora_A"]).view(layer.weight.shape) * layer.lora_alpha / layer.r
        torch.testing.assert_close(layer.merged_weight(), layer.weight + update)


TASKS = {
    "linear": (lambda: fastlora.Linear(6, 4, r=2, lora_alpha=2), (4, 2), (2, 6)),
    "embedding": (lambda: fastlora.Embedding(7, 5, r=2, lora_alpha=2), (7, 2), (2, 5)),
    "conv1d": (lambda: fastlora.Conv1d(4, 6, 3, r=2, lora_alpha=2, form="tasks"), (3, 6, 2), (3, 2, 4)),
    "conv2d": (
        lambda: fastlora.Conv2d(4, 6, (3, 2), r=2, lora_alpha=2, form="tasks", groups=2), (3, 2, 6, 2), (3, 2, 2, 2)),
    "conv3d": (
        lambda: fastlora.Conv3d(4, 6, (3, 2, 1), r=2, lora_alpha=2, form="tasks"), (3, 2, 1, 6, 2), (3, 2, 1, 2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("task", ["a", "two.words", "a.module.b"])
@pytest.mark.parametrize("kind", TASKS)
def test_behaviour_3_the_letters_of_the_discomole_are_swapped(kind, task):
    make, shape_A, shape_B = TASKS[kind]
    layer = fill(make())
    base = {f"module.{name}": tensor for name, tensor in layer.state_dict().items() if "lora_" not in name}
    A, B = torch.randn(shape_A), torch.randn(shape_B)
    assert layer.load_state_dict({**base, f"{task}.module.A": A, f"{task}.module.B": B}) == ([], [])
    torch.testing.assert_close(layer.merged_weight(), layer.weight + (A @ B).view(layer.weight.shape))
    same_tensors(names.write(layer, "tasks"), {"default.module.A": A, "default.module.B": B})


def test_one_layer_takes_one_task():
    layer, A, B = fastlora.Linear(6, 4, r=2), torch.ones(4, 2), torch.ones(2, 6)
    several = {f"{task}.module.{x}": t for task in ("blue", "red") for x, t in (("A", A), ("B", B))}
    with pytest.raises(ValueError, match=r"got the tasks \['blue', 'red'\], expected a single one"):
        layer.load_state_dict(several, strict=False)
    _, unexpected = layer.load_state_dict({"module.A": A, "module.B": B}, strict=False)
    assert sorted(unexpected) == ["A", "B"]


def test_what_a_library_lacks_is_refused_by_name():
    conv = fastlora.Conv2d(4, 6, 3, r=2)
    for dialect in ("peft", "tasks"):
        with pytest.raises(ValueError, match="block.conv: got a convolution in the form 'loralib', expected"):
            names.write(conv, dialect, "block.conv")
    for form in ("peft", "tasks"):
        for dialect in ("loralib", "loratorch"):
            with pytest.raises(ValueError, match=f"x: got a convolution in the form {form!r}, expected 'loralib'"):
                names.write(fastlora.Conv2d(4, 6, 3, r=2, form=form), dialect, "x")
    with pytest.raises(ValueError, match="x: got lora_alpha = 3 at r = 2, expected lora_alpha = r"):
        names.write(fastlora.Linear(6, 4, r=2, lora_alpha=3), "tasks", "x")
    with pytest.raises(ValueError, match="x: got an attention layer, expected a layer that loralib has"):
        names.write(fastlora.MultiheadAttention(4, 2, r=2), "loralib", "x")


@pytest.mark.parametrize("flags", [[True, False, True], [False, True], [True], [True, True]])
@pytest.mark.parametrize("dialect", ["peft", "tasks"])
def test_merged_linear_as_a_linear_layer(flags, dialect):
    layer = fill(fastlora.MergedLinear(6, 12, r=2, lora_alpha=2, enable_lora=flags))
    written, groups = names.write(layer, dialect), sum(flags)
    linear = fastlora.Linear(6, 12, r=2 * groups, lora_alpha=2 * groups)
    base = {name: layer.state_dict()[name] for name in ("weight", "bias")}
    assert linear.load_state_dict({**base, **written}) == ([], [])
    torch.testing.assert_close(linear.merged_weight(), layer.merged_weight())
    again = fastlora.MergedLinear(6, 12, r=2, lora_alpha=2, enable_lora=flags)
    assert again.load_state_dict({**base, **written}) == ([], [])
    same_tensors(again.state_dict(), layer.state_dict())
    if len(flags) == 3:
        spread = {name: torch.ones_like(tensor) for name, tensor in written.items()}
        with pytest.raises(ValueError, match="lora_B: got an update across parts of a MergedLinear"):
            again.load_state_dict(spread, strict=False)


def test_a_layer_without_an_adapter_reports_one():
    layer = copy.deepcopy(fastlora.Linear(6, 4))
    stored = {**layer.state_dict(), "w_lora_A": torch.ones(2, 6)}
    assert layer.load_state_dict(stored, strict=False) == ([], ["lora_A"])
