"""PEFT's folder with every kind of layer, to and from the real PEFT."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora.checkpoint import load_adapter, load_lora_state_dict, lora_state_dict, save_adapter

TARGETS = ["embed", "fc", "attn", "conv", "line", "volume"]
IDS = torch.arange(12).view(2, 6)


class Net(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.embed, self.fc = nn.Embedding(13, 8), nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.line = nn.Conv1d(8, 8, 3, padding=1, groups=groups)
        self.conv = nn.Conv2d(2, 4, (3, 1), stride=(2, 1), padding=(1, 0), groups=groups)
        self.volume = nn.Conv3d(4, 4, (1, 2, 1), groups=groups)

    def forward(self, ids):
        x = self.fc(self.embed(ids))
        x = self.attn(x, x, x, need_weights=False)[0]
        y = self.conv(self.line(x.transpose(1, 2)).unflatten(1, (2, 4)))
        return self.volume(y.unsqueeze(-1))


def build(groups=1):
    torch.manual_seed(0)
    return Net(groups).eval()


def wake(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def keys(folder):
    return {name: tuple(t.shape) for name, t in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("groups", [1, 2])
def test_peft_to_here_and_back(groups, tmp_path):
    peft = pytest.importorskip("peft")
    base = build(groups)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, rank_pattern={"attn": 2}, alpha_pattern={
        "conv": 5, "embed": 3})  # fmt: skip
    theirs = wake(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    want = theirs(IDS)
    assert (want - base(IDS)).abs().max() > 0.1
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(IDS), want)
    save_adapter(ours, tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(back(IDS), want)
    again = load_adapter(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(again(IDS), ours(IDS))
    mine, loaded = lora_state_dict(ours), lora_state_dict(again)
    assert mine.keys() == loaded.keys() and all(torch.equal(tensor, loaded[name]) for name, tensor in mine.items())


def test_an_injected_model_to_peft_and_back(tmp_path):
    """q, k, v and o are trained apart here; PEFT has one adapter for q, k and v, of three times the rank."""
    peft = pytest.importorskip("peft")
    base = build()
    model = wake(fastlora.inject(copy.deepcopy(base), r=2, lora_alpha=3, target_modules=TARGETS)).eval()
    save_adapter(model, tmp_path)
    assert keys(tmp_path)["base_model.model.attn.lora_A.weight"] == (6, 8)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS), model(IDS))
    fresh = load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert fresh.attn.lora_q.r == 2 and fresh.attn.lora_q.lora_alpha == 3
    assert torch.equal(fresh(IDS), model(IDS))
    mine, loaded = lora_state_dict(model), lora_state_dict(fresh)
    assert mine.keys() == loaded.keys() and all(torch.equal(tensor, loaded[name]) for name, tensor in mine.items())
    assert load_adapter(model, tmp_path) is model


class Fused(nn.Module):
    def __init__(self, form="peft"):
        super().__init__()
        self.attn = fastlora.MultiheadAttention(8, 2, enable_lora=["q", "v"], r=2, lora_alpha=3, batch_first=True)
        self.qkv = fastlora.MergedLinear(8, 12, r=2, lora_alpha=3, enable_lora=[True, False, True])
        self.conv = fastlora.Conv2d(1, 2, 3, r=2, lora_alpha=3, form=form)

    def forward(self, x):
        return self.conv(self.qkv(self.attn(x, x, x, need_weights=False)[0]).unsqueeze(1))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.qkv = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 12)
        self.conv = nn.Conv2d(1, 2, 3)

    forward = Fused.forward


def test_merged_linear_and_some_projections(tmp_path):
    peft, x = pytest.importorskip("peft"), torch.randn(2, 5, 8)
    model, base = wake(Fused()).eval(), Plain().eval()
    with torch.no_grad():
        model.qkv.weight.add_(0.1)
    base.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" not in n})
    save_adapter(model, tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {found["r"], *found["rank_pattern"].values()} == {2, 4}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(x), model(x))
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), model(x))
    again = Fused().eval()
    load_lora_state_dict(again, base.state_dict(), strict=False)
    load_adapter(again, tmp_path)
    mine, loaded = model.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in mine.items())
    assert again.qkv.lora_alpha == 3 and again.attn.lora_v.lora_alpha == 3


def test_an_untrained_attention_layer_of_peft_keeps_its_rank(tmp_path):
    peft, base = pytest.importorskip("peft"), build()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=6, target_modules=["attn"]))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    assert ours.attn.lora_q.r == 6
    assert torch.equal(ours.attn.lora_q.lora_A, ours.attn.lora_v.lora_A)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_every_kind(bias, tmp_path):
    base = build()
    model = wake(fastlora.inject(copy.deepcopy(base), r=2, target_modules=TARGETS))
    fastlora.mark_only_lora_as_trainable(model, bias=bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name and parameter.requires_grad:
                parameter.add_(0.2)
    save_adapter(model, tmp_path)
    # PEFT's "lora_only" has no word for an attention layer's biases
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == "all"
    fresh = load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(fresh(IDS), model.eval()(IDS))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS), model(IDS))


def test_what_peft_does_not_have_is_refused_before_a_file_is_written(tmp_path):
    for form in ("loralib", "tasks"):
        with pytest.raises(ValueError, match=f"conv: got a convolution in the form {form!r}, expected 'peft'"):
            save_adapter(Fused(form), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_convolutions_that_peft_computes_otherwise_are_named(options, tmp_path):
    base, x = nn.Sequential(nn.Conv2d(2, 3, 3, **options)).eval(), torch.randn(1, 2, 6, 6)
    model = wake(fastlora.inject(copy.deepcopy(base), r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="fastlora: 0: PEFT's adapter of a convolution has no dilation"):
        save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="no dilation"):
        assert torch.equal(load_adapter(base, tmp_path)(x), model(x))


def test_other_layers_than_the_files_are_refused(tmp_path):
    base = build()
    save_adapter(wake(fastlora.inject(copy.deepcopy(base), r=2, target_modules=["attn", "conv"])), tmp_path)
    for enabled, message in [
        ("qkv", r"got ranks \[None\] at \['attn.lora_o'\]"),
        ("qo", "changes k"),
        ("o", "changes q"),
    ]:
        fewer = fastlora.inject(copy.deepcopy(base), r=2, target_modules=["conv"])
        fewer.attn = fastlora.MultiheadAttention(8, 2, enable_lora=list(enabled), r=2)
        before = {name: tensor.clone() for name, tensor in fewer.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_adapter(fewer, tmp_path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in fewer.state_dict().items())
    with pytest.raises(ValueError, match="model: got LoRA layers without an adapter of their own"):
        save_adapter(fastlora.Linear(4, 4), tmp_path / "new")
    wider = copy.deepcopy(base)
    wider.conv = nn.Conv2d(2, 4, (3, 3))
    with pytest.raises(ValueError, match="conv: got lora_A"):
        load_adapter(wider, tmp_path)
    assert all(p.requires_grad for p in wider.parameters())


@pytest.mark.parametrize("version, factor", [(None, 2), ("0.14.0", 2), ("0.21.2", 2), ("0.22.1.dev0", 1)])
def test_how_often_peft_adds_an_output_projection(version, factor, tmp_path, recwarn):
    base = build()
    save_adapter(wake(fastlora.inject(copy.deepcopy(base), r=2, target_modules=["attn"])), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config.pop("peft_version") == "0.21.2"
    path.write_text(json.dumps({**config, **({"peft_version": version} if version else {})}))
    stored = load_file(tmp_path / "adapter_model.safetensors")[
        "base_model.model.attn.base_layer.out_proj.lora_B.weight"
    ]
    loaded = load_adapter(base, tmp_path)
    assert torch.equal(loaded.attn.lora_o.lora_B, factor * stored[:, :2])
    assert any("taken once from PEFT 0.22.1" in str(w.message) for w in recwarn) == (factor == 1)


def test_two_adapters_of_one_output_projection_and_one_alone_are_refused(tmp_path):
    """PEFT makes both from target_modules=["attn", "out_proj"], under names that differ in `base_layer` alone."""
    peft = pytest.importorskip("peft")
    both, alone = "two names with different values", "no adapter but out_proj's"
    for targets, message in ((["attn", "out_proj"], both), (["out_proj"], alone)):
        torch.manual_seed(0)
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=targets))
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        theirs.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            fastlora.load_adapter(model, tmp_path)
        assert type(model["attn"]) is nn.MultiheadAttention
