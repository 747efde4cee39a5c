"""State dicts of whole models and of adapters alone, from and to other libraries; nothing changes by a refused one."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import tasks
from fastlora.checkpoint import load_lora_state_dict, lora_state_dict


class Net(nn.Module):
    """A program for loralib, or for fastlora in its place."""

    def __init__(self, lib=fastlora):
        super().__init__()
        self.embed = lib.Embedding(11, 6, r=2, lora_alpha=2)
        self.fc, self.xfc = lib.Linear(6, 8, r=2, lora_alpha=2), lib.Linear(8, 6, r=2, lora_alpha=2)
        self.qkv = lib.MergedLinear(6, 12, r=2, lora_alpha=2, enable_lora=[True, False, True])
        self.norm, self.plain = nn.LayerNorm(12), nn.Linear(12, 12)
        self.conv = lib.Conv2d(1, 3, 3, r=2, lora_alpha=2)

    def forward(self, ids):
        y = self.plain(self.norm(self.qkv(self.xfc(torch.tanh(self.fc(self.embed(ids)))))))
        return self.conv(y.unsqueeze(1))


class WithAttention(nn.Module):
    def __init__(self, form="tasks"):
        super().__init__()
        self.embed, self.fc = fastlora.Embedding(11, 8, r=2, lora_alpha=2), fastlora.Linear(8, 8, r=2, lora_alpha=2)
        self.attn = fastlora.MultiheadAttention(8, 2, enable_lora=["q", "v", "o"], r=2, lora_alpha=2)
        self.conv = fastlora.Conv2d(1, 3, 3, r=2, lora_alpha=2, form=form)
        self.qkv = fastlora.MergedLinear(8, 12, r=2, lora_alpha=2, enable_lora=[True, False, True])


IDS = torch.arange(10).view(2, 5)


def wake(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("head", [False, True])
def test_loralib_whole_models_and_adapters(head):
    loralib = pytest.importorskip("loralib")
    theirs, whole, part = wake(Net(loralib)), wake(Net(), 1), wake(Net(), 2)
    stored, adapters = theirs.state_dict(), loralib.lora_state_dict(theirs)
    if head:
        stored.update({"conv.weight": stored["conv.conv.weight"], "conv.bias": stored["conv.conv.bias"]})
    before = dict(stored)
    assert load_lora_state_dict(whole, stored) == ([], [])
    assert stored.keys() == before.keys()
    torch.testing.assert_close(whole(IDS), theirs(IDS))
    base = {name: tensor.clone() for name, tensor in part.state_dict().items() if "lora_" not in name}
    missing, unexpected = load_lora_state_dict(part, adapters)
    assert set(missing) == set(base) and not unexpected
    assert all(torch.equal(part.state_dict()[name], tensor) for name, tensor in base.items())
    written = lora_state_dict(part, names="loralib")
    assert written.keys() == adapters.keys() and all(torch.equal(t, adapters[n]) for n, t in written.items())


def test_biases_go_under_the_dialects_names():
    loralib = pytest.importorskip("loralib")
    model, theirs = wake(Net()), Net(loralib)
    for bias in ("all", "lora_only"):
        written = lora_state_dict(model, bias, names="loralib")
        assert "conv.conv.bias" in written and ("norm.bias" in written) == (bias == "all")
        assert theirs.load_state_dict(written, strict=False).unexpected_keys == []
        assert torch.equal(theirs.conv.conv.bias, model.conv.bias)
        assert load_lora_state_dict(wake(Net(), 3), written).unexpected_keys == []
    assert "fc.bias" in lora_state_dict(model, "lora_only", names="loratorch")
    model.conv = fastlora.Conv2d(1, 3, 3, r=2, lora_alpha=2, form="tasks")
    assert "fc.module.bias" in lora_state_dict(model, "lora_only", names="tasks")


@pytest.mark.parametrize("names, form", [
    ("fastlora", "peft"), ("fastlora", "loralib"), ("loratorch", "loralib"), ("tasks", "tasks"),
])  # fmt: skip
def test_round_trips_through_files_are_exact(names, form, tmp_path):
    model, again = wake(WithAttention(form)), wake(WithAttention(form), 1)
    written = lora_state_dict(model, bias="all", names=names)
    save_file(written, tmp_path / "adapters.safetensors")
    assert load_lora_state_dict(again, load_file(tmp_path / "adapters.safetensors")).unexpected_keys == []
    mine, loaded = lora_state_dict(model, bias="all"), lora_state_dict(again, bias="all")
    assert mine.keys() == loaded.keys() and all(torch.equal(tensor, loaded[name]) for name, tensor in mine.items())


def test_written_keys_of_each_library():
    model = WithAttention("loralib")
    keys = lora_state_dict(model, names="loratorch").keys()
    assert keys == {f"{n}_lora_{x}" for n in ("embed.w", "fc.w", "attn.qv", "attn.o", "conv.w", "qkv.w") for x in "AB"}
    keys = lora_state_dict(WithAttention(), names="tasks").keys()
    layers = "embed", "fc", "attn.lora_q", "attn.lora_v", "attn.lora_o", "conv", "qkv"
    assert keys == {f"{n}.default.module.{x}" for n in layers for x in "AB"}


@pytest.mark.parametrize("task", ["a", "xfc", "v1.0", "module", "fc.module"])
def test_a_file_of_the_discomole(task):
    """Names of children that end each other, and names of tasks that look like paths, are told apart."""
    model = wake(Net())
    model.conv = fastlora.Conv2d(1, 3, 3, r=2, lora_alpha=2, form="tasks")
    model.qkv = nn.Linear(6, 12)
    stored = {
        f"embed.{task}.module.A": torch.randn(11, 2), f"embed.{task}.module.B": torch.randn(2, 6),
        f"fc.{task}.module.A": torch.randn(8, 2), f"fc.{task}.module.B": torch.randn(2, 6),
        f"xfc.{task}.module.A": torch.randn(6, 2), f"xfc.{task}.module.B": torch.randn(2, 8),
        f"conv.{task}.module.A": torch.randn(3, 3, 3, 2), f"conv.{task}.module.B": torch.randn(3, 3, 2, 1),
        "fc.module.weight": torch.randn(8, 6), "qkv.module.weight": torch.randn(12, 6), "norm.weight": torch.ones(12),
    }  # fmt: skip
    assert load_lora_state_dict(model, stored).unexpected_keys == []
    for name in ("fc", "xfc"):
        assert torch.equal(getattr(model, name).lora_B, stored[f"{name}.{task}.module.A"])
    assert torch.equal(model.fc.weight, stored["fc.module.weight"])
    assert torch.equal(model.qkv.weight, stored["qkv.module.weight"])
    assert torch.equal(model.embed.lora_A, stored[f"embed.{task}.module.A"].T)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"xfc.\*.module.A: got the tasks"):
        load_lora_state_dict(model, {**stored, "xfc.second.module.A": torch.randn(6, 2)})
    assert_same(model, before)


def test_state_dicts_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["embed", "fc", "attn"])
    theirs = wake(peft.get_peft_model(Branches(), config), 1).eval()
    base = theirs.get_base_model().state_dict()
    for state in (theirs.state_dict(), peft.get_peft_model_state_dict(theirs)):
        ours = fastlora.inject(Branches(), r=2, lora_alpha=3, target_modules=["embed", "fc", "attn"]).eval()
        load_lora_state_dict(ours, base, strict=False)
        missing, unexpected = load_lora_state_dict(ours, state)
        assert not unexpected and not [name for name in missing if "lora_" in name]
        torch.testing.assert_close(ours(IDS), theirs(IDS))

    ours.attn = nn.MultiheadAttention(8, 2)
    _, unexpected = load_lora_state_dict(ours, theirs.state_dict(), strict=False)
    assert torch.equal(ours.attn.in_proj_bias, base["attn.base_layer.in_proj_bias"])
    assert unexpected == [name for name in theirs.state_dict() if "attn" in name and "lora_" in name]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.attn = nn.Embedding(11, 8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

    def forward(self, ids):
        x = self.fc(self.embed(ids))
        return self.attn(x, x, x, need_weights=False)[0]


def test_to_named_tasks_and_back():
    base = wake(Branches())
    one = fastlora.inject(wake(Branches()), r=2, target_modules=["embed", "fc", "attn"])
    for name, parameter in one.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    many = tasks.Model(base, r=2).add_task("formal")
    many.load_state_dict(lora_state_dict(one, names="tasks"), task="formal")
    torch.testing.assert_close(many(IDS, task="formal"), one(IDS))
    again = fastlora.inject(wake(Branches()), r=2, target_modules=["embed", "fc", "attn"])
    load_lora_state_dict(again, many.state_dict(task="formal"))
    assert torch.equal(again(IDS), one(IDS))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("fc.lora_B"), "missing fc.lora_B; nothing was loaded"),
    (lambda s: s.update({"gone.lora_A": torch.ones(2, 2)}), "unexpected gone.lora_A"),
    (lambda s: s.update({"fc.lora_A": torch.ones(3, 6)}), r"fc.lora_A: got shape \(3, 6\), expected \(2, 6\)"),
    (lambda s: s.update({"norm.weight": torch.ones(5)}), r"norm.weight: got shape \(5,\), expected \(12,\)"),
])  # fmt: skip
def test_what_does_not_fit_changes_nothing(change, message):
    model, stored = wake(Net()), dict(wake(Net(), 1).state_dict())
    change(stored)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=message):
        load_lora_state_dict(model, stored)
    assert_same(model, before)


def test_without_strict_names_may_differ_but_not_shapes():
    model, stored = wake(Net()), dict(wake(Net(), 1).state_dict())
    del stored["fc.lora_B"]
    stored["gone.lora_A"] = torch.ones(2, 2)
    assert load_lora_state_dict(model, stored, strict=False) == (["fc.lora_B"], ["gone.lora_A"])
    assert torch.equal(model.fc.lora_A, stored["fc.lora_A"])
    with pytest.raises(RuntimeError, match="fc.lora_A: got shape"):
        load_lora_state_dict(model, {"fc.lora_A": torch.ones(3, 3)}, strict=False)


def test_a_bare_layer_and_a_model_without_layers():
    layer, other = wake(fastlora.Conv1d(4, 6, 3, r=2)), wake(fastlora.Conv1d(4, 6, 3, r=2), 1)
    stored = {"conv.weight": layer.weight, "conv.bias": layer.bias, **lora_state_dict(layer, names="loratorch")}
    assert load_lora_state_dict(other, stored) == ([], [])
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="without LoRA layers"):
        load_lora_state_dict(nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="names: got 'peft', expected one of fastlora, loralib, loratorch, tasks"):
        lora_state_dict(layer, names="peft")
    with pytest.raises(ValueError, match="0: got named tasks"):
        lora_state_dict(tasks.Model(nn.Sequential(nn.Linear(2, 2))).add_task("a").model, names="loralib")


def test_a_merged_copy_is_dropped():
    model, other = wake(Net()).eval(), wake(Net(), 1).eval()
    with torch.no_grad():
        model(IDS)
        load_lora_state_dict(model, other.state_dict())
        torch.testing.assert_close(model(IDS), other(IDS))
