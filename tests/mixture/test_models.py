"""Encoders, encoder-decoders, GPT-2; and models checkpointed, copied, pickled, compiled, in threads."""

import copy
import io
import pickle
import threading

import pytest
import torch

from fastlora import mixture
from fastlora.nn.switch import selected

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def bert(cls="BertModel", **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, max_position_embeddings=32, initializer_range=0.3, **options)
    return getattr(transformers, cls)(config, **({"add_pooling_layer": False} if cls == "BertModel" else {})).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=1.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def bart():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, init_std=0.3,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).eval()


def two_experts(model, write_expert, root, targets):
    return {name: write_expert(model, root / name, 2 + 2 * i, 4, targets, i) for i, name in enumerate("ab")}


@pytest.mark.parametrize("cls", ["BertModel", "BertForSequenceClassification", "BertForTokenClassification"])
def test_encoders(ours, write_expert, tmp_path, ids, cls):
    made = bert(cls)
    targets = ["query", "value", "word_embeddings", "position_embeddings"]
    model = ours(made, two_experts(made, write_expert, tmp_path, targets), layerwise_scalings=True).eval()
    output = model(input_ids=ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert model.get_latest_scalings().shape == (2, 9, 6, 2)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids)
    assert (output[0] - base[0]).abs().max() > 0.05
    # each layer's gates stand in its own place
    gates = model.get_latest_scalings().detach().unbind(2)
    with torch.no_grad(), selected(model.owner, model.keys, gates):
        for handle in model.stacks[0].handles:
            handle.remove()
        torch.testing.assert_close(model(input_ids=ids)[0], output[0].detach(), rtol=1e-4, atol=1e-4)
    output[0].sum().backward()
    assert model.xlora_classifier.last.weight.grad.abs().max() > 0


@pytest.mark.parametrize("build, targets", [(t5, ["q", "v", "wo"]), (bart, ["q_proj", "v_proj", "fc2"])])
def test_encoder_decoders(ours, write_expert, tmp_path, ids, build, targets):
    made = build()
    model = ours(made, two_experts(made, write_expert, tmp_path, targets), layerwise_scalings=True).eval()
    model.enable_scalings_logging()
    output = model(input_ids=ids, decoder_input_ids=ids[:, :5])
    encoder, decoder = model.get_scalings_log()
    count = len(model.experts)
    assert encoder.shape == (2, 9, count, 2) and decoder.shape == (2, 5, count, 2)
    # the encoder's gates do not depend on the decoder, whose own come from its tokens up to each
    model(input_ids=ids, decoder_input_ids=ids[:, :3])
    again = model.get_scalings_log()[2:]
    assert torch.equal(again[0], encoder)
    torch.testing.assert_close(again[1], decoder[:, :3])
    output.logits.sum().backward()
    assert model.xlora_classifier.last.weight.grad.abs().max() > 0
    for beams in (1, 3):
        options = {"max_new_tokens": 8, "num_beams": beams, "output_scores": True, "return_dict_in_generate": True}
        want, got = (model.generate(input_ids=ids, use_cache=use, **options) for use in (False, True))
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), rtol=1e-3, atol=1e-3)
        with model.disable_adapter():
            assert (model.generate(input_ids=ids, **options).scores[0] - want.scores[0]).abs().max() > 0.01


def test_gpt2_and_its_fused_layers(ours, write_expert, tmp_path, ids):
    made = gpt2()
    adapters = two_experts(made, write_expert, tmp_path, ["c_attn", "c_proj"])
    model = ours(made, adapters, layerwise_scalings=True).eval()
    want = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True), want)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [p.grad.clone() for p in model.xlora_classifier.parameters()]


def test_activation_checkpointing(ours, ids):
    model = ours(layerwise_scalings=True).train()
    want = gradients(model, ids)
    enables = [n for n in ("gradient", "activation") if hasattr(model.model, f"{n}_checkpointing_enable")]
    for name in enables:
        getattr(model, f"{name}_checkpointing_enable")()
        for got, exact in zip(gradients(model, ids), want, strict=True):
            torch.testing.assert_close(got, exact)
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="checkpoint_context"):
        gradients(model, ids)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch"])
def test_copies_are_of_their_own(ours, ids, way):
    def by_torch(m):
        file = io.BytesIO()
        torch.save(m, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    model = ours(layerwise_scalings=True).eval()
    # its last scalings have a graph
    model(ids)
    other = (by_torch if way == "torch" else way)(model)
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(other(ids).logits, want)
        other.set_global_scaling_weight(0.0)
        other.xlora_classifier.last.weight.zero_()
        assert not torch.equal(other(ids).logits, want)
        assert torch.equal(model(ids).logits, want)
        with other.disable_adapter():
            assert torch.equal(model(ids).logits, want)


def test_threads(ours, ids):
    model, found = ours(layerwise_scalings=True).eval(), {}
    inputs = {i: ids[:, : 3 + i] for i in range(4)}
    with torch.no_grad():
        want = {i: model(x).logits for i, x in inputs.items()}

    def run(i):
        with torch.no_grad():
            found[i] = [model(inputs[i]).logits for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, want[i]) for i, each in found.items() for y in each)


def test_an_error_inside_leaves_no_gates_behind(ours, ids):
    model = ours(layerwise_scalings=True).eval()
    with torch.no_grad():
        want = model(ids).logits
        with pytest.raises(IndexError):
            model(ids + 1000)
        block = model.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        block.remove()
        layer = model.model.model.layers[0].self_attn.q_proj
        x = torch.randn(2, 3, 32)
        # outside a forward no expert is chosen
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))
        assert torch.equal(model(ids).logits, want)


def test_compiled(ours, ids):
    model = ours(layerwise_scalings=True).eval()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for x in (ids, ids[:, :6], ids):
            torch.testing.assert_close(compiled(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["whole", "module", "method"])
def test_a_compiled_transformer_sees_its_gates(ours, ids, part):
    model = ours(layerwise_scalings=True).eval()
    with torch.no_grad():
        want = model(ids).logits
        if part == "whole":
            model.compile(backend="eager")
        elif part == "module":
            model.model.model = torch.compile(model.model.model, backend="eager")
        else:
            model.model.model.compile(backend="eager")
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    model(ids, labels=ids).loss.backward()
    assert model.xlora_classifier.last.weight.grad.abs().max() > 0


def test_mixtures_of_one_configuration_are_apart(tiny_llama, folders):
    config = mixture.xLoRAConfig(scaling_pass_value=None)
    one = mixture.add_xlora_to_model(tiny_llama(), config, folders)
    two = mixture.add_xlora_to_model(tiny_llama(), config, dict(list(folders.items())[:2]))
    two.set_topk_lora(1)
    assert one.get_topk_lora() is None and two.xlora_config.scaling_pass_value == 0.5
    assert config == mixture.xLoRAConfig(scaling_pass_value=None)


def test_a_state_dict_goes_back(ours, tiny_llama, folders, ids):
    model, other = ours(xlora_depth=2).eval(), ours(xlora_depth=2, adapters=folders).eval()
    torch.nn.init.zeros_(other.xlora_classifier.last.weight)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert mixture.add_xlora_to_model(other.remove(), mixture.xLoRAConfig(), folders, False)
