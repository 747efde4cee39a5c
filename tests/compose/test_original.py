"""lorahub_learning against the original's loop on a PEFT model, and against the package where it is installed."""

import copy

import nevergrad as ng
import numpy
import peft
import pytest
import torch
import transformers
from tiny_models import INPUTS, OUTPUTS, WORDS, Tokenizer, learn, save_all, save_modules, seq2seq
from torch.utils.data import DataLoader

from fastlora.compose import (
    compose,
    default_get_loss,
    default_l1_regularization,
    lorahub_inference,
    lorahub_learning,
    merge_composed,
)
from fastlora.compose.lorahub import Examples, encode

pytestmark = pytest.mark.filterwarnings("ignore:COBYLA")


def original_loss(example_dataset, model, batch_size):
    """The original's, by torch's DataLoader."""
    size = len(example_dataset) if batch_size is None else min(len(example_dataset), batch_size)
    loss = 0
    for batch in DataLoader(example_dataset, size, collate_fn=transformers.default_data_collator):
        with torch.no_grad():
            loss += model(**{k: v for k, v in batch.items()}).loss.detach().float()
    return float(loss) / len(example_dataset["input"])


def original_learning(folders, model, tokenizer, batch_size, steps, seed):
    """The original's loop, on its factors of one rank and one lora_alpha; (weights, objective)."""
    examples = Examples({"input": INPUTS, "output": OUTPUTS, **encode(model, tokenizer, INPUTS, OUTPUTS)})
    wrapped = peft.PeftModel.from_pretrained(model, folders[0]).eval()
    cache = [{k: v.clone() for k, v in peft.utils.load_peft_weights(folder, device="cpu").items()}
             for folder in folders]  # fmt: skip

    def score(weights):
        final = {key: sum(w * module[key] for w, module in zip(weights, cache, strict=True)) for key in cache[0]}
        peft.set_peft_model_state_dict(wrapped, final)
        return original_loss(examples, wrapped, batch_size) + default_l1_regularization(weights)

    numpy.random.seed(seed)
    count = len(folders)
    space = ng.p.Array(init=[0] * count, lower=[-1.5] * count, upper=[1.5] * count)
    found = ng.optimizers.NGOpt(parametrization=space, budget=steps).minimize(score).value
    return found, score(found)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_with_default_get_loss_it_is_the_original(tmp_path, batch_size):
    """The same program in the same steps; Cobyla's path is sensitive to rounding, so the start of it is compared."""
    folders, seen = save_modules(seq2seq, tmp_path), []

    def watched(examples, model, size):
        assert examples[0]["input"] == INPUTS[0] and len(examples) == 5
        assert default_get_loss(examples, model, size) == pytest.approx(original_loss(examples, model, size), rel=1e-6)
        seen.append(default_get_loss(examples, model, size))
        return seen[-1]

    weights, model, _ = learn("seq2seq", folders, steps=20, batch_size=batch_size, get_loss=watched, seed=7)
    expected, objective = original_learning(folders, seq2seq(), Tokenizer(), batch_size, 20, 7)
    assert len(seen) == 20
    own = min(seen)
    assert own <= objective + 1e-3
    numpy.testing.assert_allclose(weights, expected, atol=2e-2)


def test_against_the_real_package(tmp_path):
    """lorahub.algorithm's own functions, where what it imports is installed: datasets and pandas."""
    real = pytest.importorskip("lorahub.algorithm")
    folders = save_modules(seq2seq, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(seq2seq(), folders[0]).eval()
    loaded = {f: peft.utils.load_peft_weights(f, device="cpu") for f in folders}
    weights = [0.7, -1.1, 0.4]
    final = real.get_final_weights(weights, folders, loaded)
    made = compose(folders, weights, scale=2.0)
    for key, tensor in final.items():
        assert torch.equal(made[key], tensor)
    tokenizer = Tokenizer()
    examples = Examples({"input": INPUTS, "output": OUTPUTS, **encode(seq2seq(), tokenizer, INPUTS, OUTPUTS)})
    score = real.get_score(weights, wrapped, loaded, examples, 2, real.default_get_loss, real.default_l1_regularization)
    ours = default_get_loss(examples, merge_composed(seq2seq(), folders, weights), 2)
    assert score == pytest.approx(ours + default_l1_regularization(weights), rel=1e-5)


def test_learning_against_the_real_package(tmp_path, monkeypatch):
    """The same candidates until rounding, which Cobyla's steps magnify, parts the ways; as good an end."""
    real = pytest.importorskip("lorahub.algorithm")
    # as git HEAD does: in 0.1.0 the last module's tensors are the model's own, and each candidate overwrites them
    of = real.get_peft_model_state_dict
    monkeypatch.setattr(real, "get_peft_model_state_dict", lambda model: copy.deepcopy(of(model)))
    name, folders, tokenizer = save_all("seq2seq", tmp_path)
    there, here = [], []

    def note(losses, get_loss):
        return lambda *args: losses.append(get_loss(*args)) or losses[-1]

    texts = INPUTS, WORDS[:5]
    real.lorahub_learning(folders, *texts, 20, name, 2, note(there, real.default_get_loss))
    _, model, _ = lorahub_learning(folders, *texts, 20, name, 2, note(here, default_get_loss), progress=False)
    assert len(there) == len(here) == 20
    numpy.testing.assert_allclose(here[:6], there[:6], rtol=1e-5)
    assert min(here) < there[0] - 0.5 and min(here) == pytest.approx(min(there), rel=0.1)
    # one text at a time: the original gives the model no mask, and so it reads the padding of a batch
    answers = [infer(INPUTS[:2], model, tokenizer, 1)[0] for infer in (lorahub_inference, real.lorahub_inference)]
    assert all(long.startswith(short) and short for short, long in zip(*answers, strict=True))
