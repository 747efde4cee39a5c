"""inject in transformers' models: Conv1D, output heads, tied heads, generation, exports that load again."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastlora.model import disable_adapter, inject, merge, merge_and_export

transformers = pytest.importorskip("transformers")


def llama(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1,
                                     eos_token_id=2)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def wake(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make, count", [(llama, 14), (gpt2, 8)])
def test_all_linear_leaves_the_head_out(make, count, ids):
    base = make()
    model = inject(copy.deepcopy(base), r=4)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == count
    assert not hasattr(model.lm_head, "lora_A")
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    out = wake(model)(ids).logits
    assert (out - base(ids).logits).abs().max() > 0.01
    with disable_adapter(model):
        assert torch.equal(model(ids).logits, base(ids).logits)
    torch.testing.assert_close(merge_and_export(model)(ids).logits, out, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(merge(model)(ids).logits, out, rtol=1e-4, atol=1e-4)


def test_conv1d_is_dense_and_its_shapes_are_right(ids):
    model = wake(inject(gpt2(), r=4, target_modules=["c_attn"]))
    layer = model.transformer.h[0].attn.c_attn
    assert layer.lora_A.shape == (4, 32) and layer.lora_B.shape == (96, 4) and layer.fan_in_fan_out
    x = torch.randn(2, 3, 32)
    want = x @ layer.weight + layer.bias + x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), want)
    assert type(merge_and_export(layer)) is type(gpt2().transformer.h[0].attn.c_attn)


def test_a_merged_tied_head_survives_a_round_trip(tmp_path, ids):
    model = wake(inject(llama(tied=True), r=4, target_modules=["lm_head", "q_proj"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out, embedding = model(ids).logits, model.model.embed_tokens.weight.detach().clone()
    plain = merge_and_export(model)
    assert torch.equal(plain.model.embed_tokens.weight, embedding)
    assert model.config.tie_word_embeddings and not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, ids):
    model = wake(inject(llama(), r=4, lora_dropout=0.1)).train()

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, want[name], msg=lambda text, name=name: f"{name}: {text}")


def test_generation(ids):
    model = wake(inject(llama(), r=4))
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), merge_and_export(model).generate(ids, **options))


def test_importing_fastlora_does_not_import_transformers():
    code = "import fastlora.model, torch, sys; fastlora.model.inject(torch.nn.Linear(2, 2)); " \
           "sys.exit('transformers' in sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
