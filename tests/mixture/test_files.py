"""Folders of xlora and of PEFT, both ways; what does not fit is named, and the model stays as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora import mixture
from fastlora.nn.fastpath import holds_adapters

PEFT_KEY = "base_model.internal_xlora_classifier."


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("names, safe", [("xlora", True), ("xlora", False), ("peft", True)])
def test_saved_and_loaded_is_exact(ours, tiny_llama, folders, ids, tmp_path, names, safe, depth):
    model = ours(xlora_depth=depth, layerwise_scalings=True, top_k_lora=2, xlora_dropout_p=0.1)
    want = logits(model, ids)
    model.save_pretrained(tmp_path, safe_serialization=safe, names=names)
    again = mixture.from_pretrained(tmp_path, tiny_llama(), folders, False, "cpu", safe)
    assert torch.equal(logits(again, ids), want)
    own = mixture.from_pretrained(load_directory=str(tmp_path), model=tiny_llama(), from_safetensors=safe)
    torch.testing.assert_close(logits(own, ids), want)
    assert list(own.expert_names) == (list(folders) if names == "xlora" else ["0", "1", "2"])


def test_xloras_names(ours, tmp_path):
    ours(xlora_depth=3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "xlora_classifier.safetensors")
    assert set(tensors) == {f"{n}.{k}" for n in ("inner.0", "inner.3", "last") for k in ("weight", "bias")}
    config = json.loads((tmp_path / "xlora_config.json").read_text())
    assert config["adapters"] == ["law.fr", "code", "train"] and "device" not in config and "per_token" not in config
    assert config["base_model_id"] == "" and config["hidden_size"] == 32
    ours(per_token=False).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "xlora_config.json").read_text())["per_token"] is False


@pytest.mark.parametrize("fields", [{"xlora_depth": 1}, {"xlora_depth": 3}, {"xlora_depth": 2, "xlora_dropout_p": 0.0}])
def test_peft_loads_ours(ours, tiny_llama, ids, tmp_path, fields):
    peft = pytest.importorskip("peft")
    model = ours(layerwise_scalings=True, **fields)
    model.save_pretrained(tmp_path, names="peft")
    adapters = {str(i): str(tmp_path / str(i)) for i in range(3)}
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, adapters=adapters)
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{"xlora_depth": 1}, {"xlora_depth": 3}, {"xlora_depth": 2, "xlora_dropout_p": 0.0}])
def test_pefts_own_folder_loads(peers, tiny_llama, ids, tmp_path, fields):
    theirs = peers(softmax_temperature=0.5, **fields)
    theirs.save_pretrained(tmp_path)
    whole = {PEFT_KEY + name: t for name, t in theirs.base_model.internal_xlora_classifier.state_dict().items()}
    file = tmp_path / "adapter_model.safetensors"
    # PEFT 0.21 leaves the first layer out of this file, and others may not
    for tensors in (load_file(file), whole):
        save_file(tensors, file)
        model = mixture.from_pretrained(tmp_path, tiny_llama())
        torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-4, atol=1e-4)
    last = max(whole, key=lambda name: int(name.split(".")[-2]))
    save_file({name: t for name, t in whole.items() if name != last}, file)
    for i in range(3):
        shutil.rmtree(tmp_path / str(i))
    with pytest.raises(ValueError, match="last.*expected"):
        mixture.from_pretrained(tmp_path, tiny_llama())


def test_trained_experts_are_saved(ours, tiny_llama, ids, tmp_path):
    model = ours(use_trainable_adapters=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = mixture.from_pretrained(tmp_path, tiny_llama(), ["law.fr", "code", "train"], False, "cpu")
    torch.testing.assert_close(logits(again, ids), logits(model, ids))
    assert again.get_use_trainable_adapters()


@pytest.mark.parametrize("later", [{"names": "peft"}, {"safe_serialization": False}])
def test_a_later_save_is_what_is_loaded(ours, tiny_llama, ids, tmp_path, later):
    model = ours()
    model.save_pretrained(tmp_path)
    torch.nn.init.normal_(model.xlora_classifier.last.weight)
    model.save_pretrained(tmp_path, **later)
    again = mixture.from_pretrained(tmp_path, tiny_llama(), from_safetensors="names" in later)
    torch.testing.assert_close(logits(again, ids), logits(model, ids))


def test_experts_keep_the_classifiers_order(ours, tiny_llama, folders, ids, tmp_path):
    model = ours()
    model.save_pretrained(tmp_path)
    turned = dict(reversed(folders.items()))
    for adapters in (turned, list(turned)):
        again = mixture.from_pretrained(tmp_path, tiny_llama(), adapters, False, "cpu")
        torch.testing.assert_close(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("name", ["..", "./code", "/tmp/x"])
def test_names_that_are_no_folders_below_are_not_written(ours, folders, tmp_path, name):
    model = ours(adapters={"code": folders["code"], name: folders["train"]})
    with pytest.raises(ValueError, match="names that can be folders of their own"):
        model.save_pretrained(tmp_path / "mixture")
    assert not any(tmp_path.iterdir())


def test_experts_in_the_first_versions_place(ours, tiny_llama, ids, tmp_path):
    model = ours()
    model.save_pretrained(tmp_path)
    for name in model.expert_names:
        shutil.move(tmp_path / name, tmp_path / "adapters" / name)
    assert torch.equal(logits(mixture.from_pretrained(tmp_path, tiny_llama()), ids), logits(model, ids))


def test_experts_from_tensors(tiny_llama, ids):
    torch.manual_seed(0)
    state = {f"model.layers.0.self_attn.q_proj.lora_{k}": torch.randn(s) for k, s in (("A", (2, 32)), ("B", (32, 2)))}
    model = mixture.add_xlora_to_model(tiny_llama(), mixture.xLoRAConfig(), {"a": state}, False)
    weight = model.model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    base = tiny_llama()
    A, B = state.values()
    base.model.layers[0].self_attn.q_proj.weight.data += B @ A
    assert torch.equal(weight, tiny_llama().model.layers[0].self_attn.q_proj.weight)
    torch.testing.assert_close(logits(model, ids), logits(base, ids), rtol=1e-4, atol=1e-4)


@pytest.fixture
def untouched(tiny_llama):
    """A model and what it must still be afterwards."""
    model = tiny_llama()
    before = {name: (type(m), dict(m._forward_pre_hooks)) for name, m in model.named_modules()}
    state, trained = model.state_dict(), [p.requires_grad for p in model.parameters()]
    yield model
    assert before == {name: (type(m), dict(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert trained == [p.requires_grad for p in model.parameters()]
    assert not any(map(holds_adapters, model.modules()))


def refuse(model, error, match, folders, **fields):
    with pytest.raises(error, match=match):
        mixture.add_xlora_to_model(model, mixture.xLoRAConfig(**fields), folders, False)


def test_what_does_not_fit_leaves_the_model_alone(untouched, folders, write_expert, tiny_llama, tmp_path):
    refuse(untouched, ValueError, "top_k_lora: got 4, expected None or an integer from 1 to 3", folders, top_k_lora=4)
    refuse(untouched, ValueError, "hidden_size: got 64, expected 32", folders, hidden_size=64)
    refuse(untouched, ValueError, "adapters: got none", {})
    refuse(untouched, TypeError, "adapters", "folder")
    refuse(untouched, FileNotFoundError, r"adapters\['x'\]", {**folders, "x": str(tmp_path / "none")})
    other = tiny_llama(tie_word_embeddings=False)
    other.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 40)
    stranger = write_expert(other, tmp_path / "stranger", 4, 4, ["q_proj"], 0)
    other = {**folders, "stranger": stranger}
    refuse(untouched, ValueError, r"adapters\['stranger'\].*layers.1.self_attn.q_proj", other)
    head = write_expert(tiny_llama(), tmp_path / "head", 4, 4, ["lm_head", "q_proj"], 0)
    refuse(untouched, ValueError, "adapters: got experts on lm_head", {"head": head})
    with pytest.raises(TypeError, match="xlora_config"):
        mixture.add_xlora_to_model(untouched, {"hidden_size": 32}, folders, False)


def test_a_folder_that_does_not_fit_leaves_the_model_alone(untouched, ours, folders, tmp_path):
    ours(layerwise_scalings=True).save_pretrained(tmp_path)
    two = dict(list(folders.items())[:2])
    with pytest.raises(ValueError, match="adapters: got 2 experts, expected 3"):
        mixture.from_pretrained(tmp_path, untouched, two, False, "cpu")
    with pytest.raises(ValueError, match="no folder of none"):
        mixture.from_pretrained(tmp_path, untouched, ["code", "none"], False, "cpu")
    file = tmp_path / "xlora_classifier.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "last.weight": tensors["last.weight"][1:]}, file)
    with pytest.raises(ValueError, match=r"last.weight.*\(23, 32\).*expected.*\(24, 32\)"):
        mixture.from_pretrained(tmp_path, untouched, folders, False, "cpu")
    file.write_bytes(b"cut off")
    with pytest.raises(Exception, match="(?i)header|deserializ"):
        mixture.from_pretrained(tmp_path, untouched, folders, False, "cpu")
    refuse(untouched, RuntimeError, "nonsense", folders, device="nonsense")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="xlora_classifier"):
        mixture.from_pretrained(tmp_path, untouched, folders, False, "cpu")
    with pytest.raises(FileNotFoundError, match="xlora_config"):
        mixture.from_pretrained(tmp_path / "nowhere", untouched, folders, False, "cpu")
    with pytest.raises(ValueError, match="load_directory"):
        mixture.from_pretrained(folders["code"], untouched, folders, False, "cpu")
