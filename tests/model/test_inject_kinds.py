"""inject and what follows it, on models with embeddings, convolutions and attention."""

import copy
import io

import pytest
import torch
from torch import nn

import fastlora as lora

TARGETS = ["embed", "conv", "image", "attention", "fc"]


class Net(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.embed, self.fc = nn.Embedding(11, 8, padding_idx=0), nn.Linear(8, 4)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=groups)
        self.image = nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        x = x + self.image(x.unsqueeze(1)).view(2, 2, -1, 8).mean(1)
        return self.fc(x + self.attention(x, x, x, need_weights=False)[0])


IDS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


def build(groups=1):
    torch.manual_seed(0)
    return Net(groups)


def wake(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def adapted(model):
    return {name for name, m in model.named_modules() if isinstance(m, lora.LoRALayer)}


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]


PROJECTIONS = {f"attention.lora_{name}" for name in "qkvo"}


@pytest.mark.parametrize("targets, expected", [
    ("all-linear", {"fc", *PROJECTIONS}),
    ("attention", PROJECTIONS),
    (["embed", "conv"], {"embed", "conv"}),
    ("conv|image", {"conv", "image"}),
])  # fmt: skip
def test_kinds_by_name_and_all_linear(targets, expected):
    model = build()
    before, keys = model(IDS), model.state_dict().keys()
    lora.inject(model, r=2, target_modules=targets)
    torch.testing.assert_close(model(IDS), before)
    assert adapted(model) == expected and not trained(model)
    assert model.state_dict().keys() - keys == {f"{name}.lora_{x}" for name in expected for x in "AB"}
    assert not keys - model.state_dict().keys()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_life_of_an_injected_model(training, groups):
    base = build(groups).train(training)
    model = wake(lora.inject(copy.deepcopy(base), r=2, lora_alpha=3, target_modules=TARGETS))
    y = model(IDS)
    assert (y - base(IDS)).abs().max() > 0.1
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_" in name)
    with lora.disable_adapter(model):
        torch.testing.assert_close(model(IDS), base(IDS))
    lora.set_scale(model, 0.0)
    torch.testing.assert_close(model(IDS), base(IDS))
    lora.set_scale(model, 1.0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(IDS), y)
    if groups == 1:
        state = copy.deepcopy(model.state_dict())
        exported = lora.merge_and_export(model)
        assert [type(m) for m in exported.modules()] == [type(m) for m in base.modules()]
        torch.testing.assert_close(exported(IDS), y, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        with torch.no_grad():
            torch.testing.assert_close(lora.merge(model)(IDS), y, rtol=1e-4, atol=1e-4)
        lora.unmerge(model)
    lora.remove(model)
    # torch takes other kernels for a frozen model
    assert torch.equal(model(IDS), base.requires_grad_(False)(IDS)) and str(model) == str(base)
    assert model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_adapters_dtypes_and_a_compiled_model(dtype):
    model = lora.inject(build().to(dtype), r=2, target_modules=TARGETS)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(p.dtype == wanted for name, p in wake(model).named_parameters() if "lora_" in name)
    y = model(IDS)
    assert y.dtype == dtype
    if dtype == torch.bfloat16:
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS), y, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("options, message", [
    ({"r": 3, "target_modules": ["embed", "attention", "conv"]}, "r: got 3, expected a multiple of groups = 2"),
    ({"target_modules": ["embed", "out_proj"]}, "out_proj of nn.MultiheadAttention, whose weight is read without"),
    ({"target_modules": ["fc", "norm"]}, "target_modules: got 'norm', the name of a LayerNorm"),
    ({"target_modules": ["fc", "mine"]}, "target_modules: got 'mine', the name of a Mine"),
    ({"target_modules": ["fc", "attend"]}, "target_modules: got 'attend', the name of a Attend"),
    ({"target_modules": ["fc", "lazy"]}, "target_modules: got 'lazy', the name of a LazyConv1d"),
    ({"target_modules": ["fc", "short"]}, "max_norm: got 1.0, expected None"),
])  # fmt: skip
def test_refusals_change_nothing(options, message):
    class Mine(nn.Conv2d):
        pass

    class Attend(nn.MultiheadAttention):
        pass

    model = build(groups=2)
    model.norm, model.mine, model.attend = nn.LayerNorm(8), Mine(1, 2, 3), Attend(8, 2)
    model.lazy, model.short = nn.LazyConv1d(4, 3), nn.Embedding(3, 4, max_norm=1.0)
    before = str(model)
    with pytest.raises(ValueError, match=message):
        lora.inject(model, **{"r": 2, **options})
    assert str(model) == before and not adapted(model) and all(p.requires_grad for p in model.parameters())


def test_layers_without_an_adapter_count_as_lora_layers():
    model = nn.Sequential(lora.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="model: got a model with LoRA layers"):
        lora.inject(model)
    assert type(lora.merge_and_export(model)[0]) is nn.MultiheadAttention
    assert type(lora.remove(model)[0]) is nn.MultiheadAttention


def test_biases_of_each_kind():
    model = lora.inject(build(), r=2, target_modules=TARGETS)
    ours = {"fc.bias", "conv.bias", "attention.in_proj_bias", "attention.out_proj.bias"}
    for bias, expected in (("none", set()), ("lora_only", ours), ("all", ours)):
        lora.mark_only_lora_as_trainable(model, bias=bias)
        assert set(trained(model)) == expected
        assert {name for name in lora.lora_state_dict(model, bias=bias) if "lora_" not in name} == expected
    for enabled, expected in (("qv", ["in_proj_bias"]), ("o", ["out_proj.bias"]), ("", [])):
        lone = nn.Sequential(lora.MultiheadAttention(8, 2, list(enabled), r=2, add_bias_kv=True), nn.Linear(2, 2))
        lora.mark_only_lora_as_trainable(lone, bias="lora_only")
        assert trained(lone) == [f"0.{name}" for name in expected]
    bare = lora.MultiheadAttention(8, 2, ["q"], r=2, bias=False)
    lora.mark_only_lora_as_trainable(bare, bias="lora_only")
    assert not trained(bare)


def test_behaviour_16_a_bias_is_found_whatever_its_adapter_is_called():
    """loralib derives its name from `lora_A`'s, loratorch from `w_lora_A`'s, which gives w_bias."""
    layers = {
        "fc": lora.Linear(4, 4, r=2),
        "fused": lora.MergedLinear(4, 6, r=2, enable_lora=[True, False]),
        "conv": lora.Conv2d(1, 2, 3, r=2),
    }
    model = nn.ModuleDict({**layers, "plain": nn.Linear(3, 3), "embed": lora.Embedding(4, 3, r=2)})
    for names, conv in (("fastlora", "conv.bias"), ("loralib", "conv.conv.bias"), ("loratorch", "conv.bias")):
        found = lora.lora_state_dict(model, "lora_only", names=names)
        assert {name for name in found if "lora_" not in name} == {"fc.bias", "fused.bias", conv}
        other = copy.deepcopy(model)
        with torch.no_grad():
            [other[name].bias.zero_() for name in layers]
        lora.load_lora_state_dict(other, found, strict=False)
        assert all(torch.equal(other[name].bias, layer.bias) for name, layer in layers.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_an_adapted_embedding_beside_a_tied_head(family, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 17, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2}
    if family == "Llama":
        options |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        cls, targets = transformers.LlamaForCausalLM, ["embed_tokens", "q_proj"]
    else:
        options |= {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12}
        cls, targets = transformers.GPT2LMHeadModel, ["wte", "c_attn"]
    torch.manual_seed(0)
    base = cls(getattr(transformers, f"{family}Config")(**options)).eval()
    model = wake(lora.inject(copy.deepcopy(base), r=2, target_modules=targets))
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    want = model(IDS).logits
    assert (head.weight is embed.weight) == tied and not torch.allclose(want, base(IDS).logits, atol=0.01)
    exported = lora.merge_and_export(model)
    torch.testing.assert_close(exported(IDS).logits, want, rtol=1e-4, atol=1e-4)
    assert (head.weight is embed.weight) == tied == model.config.tie_word_embeddings
    exported.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(cls.from_pretrained(tmp_path / "whole").eval()(IDS).logits, want, rtol=1e-4, atol=1e-4)
    lora.save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(lora.load_adapter(copy.deepcopy(base), tmp_path / "adapter")(IDS).logits, want)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, want)
    # a frozen base under checkpointing trains only if the embeddings' output requires gradients
    lora.enable_input_require_grads(model)
    model.train().gradient_checkpointing_enable()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert embed.lora_A.grad.any(0).nonzero().flatten().tolist() == IDS[:, :-1].unique().tolist()
