"""Names, and PEFT's folder format both ways."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora.checkpoint import load_adapter, lora_state_dict, save_adapter
from fastlora.model import adapt, inject, mark_only_lora_as_trainable, merge, set_scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x):
        return self.inner(self.second(torch.tanh(self.first(x))))


def build():
    torch.manual_seed(0)
    return Net(), torch.randn(3, 6)


def wake(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("targets", ["all-linear", ["inner.0"], ["first", "second"]])
def test_a_round_trip_into_a_plain_and_an_injected_model(targets, tmp_path):
    base, x = build()
    model = wake(inject(copy.deepcopy(base), r=2, lora_alpha=6, lora_dropout=0.25, target_modules=targets))
    save_adapter(model, tmp_path / "new" / "folder")
    fresh = load_adapter(copy.deepcopy(base), tmp_path / "new" / "folder")
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == list(lora_state_dict(model))
    assert max(m.lora_dropout.p for m in fresh.modules() if hasattr(m, "lora_dropout")) == 0.25
    again = merge(inject(copy.deepcopy(base), r=2, target_modules=targets).eval())
    with torch.no_grad():
        again(x)
        kept = [p for p in again.parameters() if p.requires_grad]
        assert load_adapter(again, tmp_path / "new" / "folder") is again
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
    assert all(p is q for p, q in zip(kept, (p for p in again.parameters() if p.requires_grad), strict=True))


def test_a_bare_layer(tmp_path):
    model, x = wake(inject(nn.Linear(6, 4), r=2)), torch.randn(2, 6)
    save_adapter(model, tmp_path)
    plain = nn.Linear(6, 4)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(load_adapter(plain, tmp_path)(x), model(x))


def test_run_time_scale_and_dtype(tmp_path):
    base, x = build()
    model = wake(inject(copy.deepcopy(base).bfloat16(), r=2, dtype=torch.bfloat16))
    want = model(x.bfloat16())
    set_scale(model, 0.5)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(model, tmp_path)(x.bfloat16()), want)
    assert load_adapter(copy.deepcopy(base), tmp_path).first.lora_A.dtype == torch.float32
    assert load_adapter(copy.deepcopy(base), tmp_path, dtype=torch.float64).first.lora_A.dtype == torch.float64


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_part_of_it(bias, tmp_path):
    base, x = build()
    model = wake(inject(copy.deepcopy(base), r=2, target_modules=["first"]))
    mark_only_lora_as_trainable(model, bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == bias
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(x), model(x))
    torch.testing.assert_close(peft_logits(tmp_path, base, x), model(x))
    save_adapter(loaded, tmp_path / "again")
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path / "again")(x), model(x))


def test_a_layer_under_two_names(tmp_path):
    layer = nn.Linear(4, 4)
    base, x = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4)
    model = wake(inject(copy.deepcopy(base), r=2))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(base, tmp_path)(x), model(x))


def test_a_name_that_ends_another(tmp_path):
    base, x = nn.Sequential(nn.Linear(4, 4), *(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))), torch.ones(4)
    model = wake(adapt(copy.deepcopy(base), {"0": (2, 3), "1.0": (4, 5), "2.0": (4, 5)}))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path)(x), model(x))
    torch.testing.assert_close(peft_logits(tmp_path, base, x), model(x))


def test_what_is_not_saved_is_said(tmp_path):
    model = inject(build()[0], r=2, target_modules=["first"])
    model.second.weight.requires_grad = True
    with pytest.warns(UserWarning, match="second.weight: trained, but not saved"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "adapter_config.json: got use_dora = True, expected plain LoRA"),
    ({"modules_to_save": ["head"]}, "modules_to_save"),
    ({"a_field_of_the_future": 1}, "a_field_of_the_future = 1"),
    ({"peft_type": "LOHA"}, "peft_type: got 'LOHA', expected 'LORA'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
])  # fmt: skip
def test_configs_that_mean_more_are_refused(change, message, tmp_path):
    base, _ = build()
    save_adapter(inject(copy.deepcopy(base), r=2), tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        load_adapter(base, tmp_path)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("change, message", [
    (lambda t: t.update({"base_model.model.first.lora_magnitude_vector": torch.ones(8)}), "lora_magnitude_vector"),
    (lambda t: t.update({"base_model.model.gone.lora_A.weight": torch.ones(2, 2)}), "a Net without a layer 'gone'"),
    (lambda t: t.update({"base_model.model.inner.1.lora_A.weight": torch.ones(2, 4)}), "without a layer 'inner.1'"),
    (lambda t: t.update({"base_model.model.first.lora_A.weight": torch.ones(2, 5)}), r"first: got lora_A \(2, 5\)"),
    (lambda t: t.pop("base_model.model.first.lora_B.weight"), "first: got lora_A"),
    (lambda t: t.update({"base_model.model.first.base_layer.weight": torch.ones(8, 6)}), "first.weight: got another"),
    (lambda t: t.clear(), "no lora_A"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    base, _ = build()
    save_adapter(inject(copy.deepcopy(base), r=2), tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_adapter(base, tmp_path)
    assert all(p.requires_grad for p in base.parameters())


def test_a_model_with_other_adapters_is_refused(tmp_path):
    base, _ = build()
    save_adapter(inject(copy.deepcopy(base), r=2), tmp_path)
    for other in (inject(copy.deepcopy(base), r=3), inject(copy.deepcopy(base), r=2, target_modules=["first"])):
        with pytest.raises(ValueError, match=r"model: got ranks .*, expected \[2"):
            load_adapter(other, tmp_path)


def peft_logits(folder, base, x):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x)


def test_ranks_and_alphas_per_layer_are_read_by_peft(tmp_path):
    base, x = build()
    plan = {"first": (2, 3), "second": (4, 3), "inner.0": (4, 10.5)}
    model = wake(adapt(copy.deepcopy(base), plan))
    save_adapter(model, tmp_path)
    torch.testing.assert_close(peft_logits(tmp_path, base, x), model(x))
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), model(x))


@pytest.mark.parametrize("options", [
    {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.*": 5}},
    {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
])  # fmt: skip
def test_peft_and_back(options, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    if "fan_in_fan_out" in options:
        base = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2))  # fmt: skip
    else:
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2))  # fmt: skip
    base, ids = base.eval(), torch.randint(0, 64, (2, 7))
    theirs = wake(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    want = theirs(ids).logits
    assert (want - base(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(ours(ids).logits, want, rtol=1e-5, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(back(ids).logits, want, rtol=1e-5, atol=1e-5)
