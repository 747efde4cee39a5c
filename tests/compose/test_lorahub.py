"""lorahub_learning and lorahub_inference: with encoder-decoder and causal models and classifiers, built here."""

import copy
import sys

import numpy
import pytest
import torch
from tiny_models import (
    BUILD,
    CLASSES,
    INPUTS,
    OUTPUTS,
    WORDS,
    Tokenizer,
    causal,
    classifier,
    learn,
    save_all,
    save_modules,
    seq2seq,
)

from fastlora.compose import (
    compose,
    default_get_loss,
    default_l1_regularization,
    lorahub_inference,
    lorahub_learning,
)

pytestmark = pytest.mark.filterwarnings("ignore:COBYLA")


def by_hand(kind, model):
    """The mean over the examples of each one's own mean over its tokens, an example at a time, without padding."""
    tokenizer, losses = Tokenizer(kind != "causal"), []
    for text, output in zip(INPUTS, CLASSES if kind == "classifier" else OUTPUTS, strict=True):
        ids = tokenizer([text], 99, True)["input_ids"]
        if kind == "classifier":
            labels = torch.tensor([model.config.label2id.get(output, 1)])
        else:
            target = Tokenizer()([output], 99, True)["input_ids"]
            ids, labels = (ids, target) if kind == "seq2seq" else (
                [ids[0] + target[0]], [[-100] * len(ids[0]) + target[0]])  # fmt: skip
            labels = torch.tensor(labels)
        with torch.no_grad():
            losses.append(model(input_ids=torch.tensor(ids), labels=labels).loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("mode", ["lorahub", "sum"])
@pytest.mark.parametrize("kind", BUILD)
def test_learning_merges_what_it_found(tmp_path, kind, mode):
    folders = save_modules(BUILD[kind], tmp_path, ((4, 8), (2, 2), (3, 1)))
    weights, model, tokenizer = learn(kind, folders, 60, mode=mode, method="gradient")
    assert isinstance(weights, numpy.ndarray) and weights.shape == (3,) and isinstance(tokenizer, Tokenizer)
    # the merged model, by another way
    made, other = compose(folders, weights, mode), BUILD[kind]()
    with torch.no_grad():
        for key in [key for key in made if ".lora_A." in key]:
            layer = other.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight += made[key.replace("lora_A", "lora_B")] @ made[key]
    for (name, got), (_, expected) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)
    plain = by_hand(kind, BUILD[kind]())
    assert by_hand(kind, model) + default_l1_regularization(weights) < plain - 0.002
    # evolution's first candidate is the plain model, so the best cannot be worse
    weights, model, _ = learn(kind, folders, 80, mode=mode, population=8)
    assert by_hand(kind, model) + default_l1_regularization(weights) < plain + 1e-5


@pytest.mark.parametrize("kind", BUILD)
def test_the_objective_is_the_mean_over_examples(tmp_path, kind, capsys):
    folders = save_modules(BUILD[kind], tmp_path)
    outputs = CLASSES if kind == "classifier" else OUTPUTS
    for batch_size in (None, 2):
        lorahub_learning(folders, INPUTS, outputs, 1, BUILD[kind](), batch_size, tokenizer=Tokenizer(kind != "causal"))
        # the first candidate is the plain model
        assert f"1/1 evaluations, best {by_hand(kind, BUILD[kind]()):.4f}" in capsys.readouterr().err


def test_the_originals_loss_depends_on_the_batch_size(tmp_path):
    folders, found = save_modules(seq2seq, tmp_path), []
    for size in (None, 1):
        learn("seq2seq", folders, steps=1, batch_size=size,
              get_loss=lambda *args: found.append(default_get_loss(*args)) or found[-1])  # fmt: skip
    assert found[1] > 4 * found[0]


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_inference_generates_the_same_in_batches(kind):
    model, tokenizer = BUILD[kind](), Tokenizer(kind != "causal")
    if kind == "causal":
        # nothing is said beyond the input
        model.lm_head.weight.data[1] += 10 * model.lm_head.weight.data.std()
    together, accuracy = lorahub_inference(INPUTS, model, tokenizer, 5, ["x"] * 5)
    apart, none = lorahub_inference(INPUTS, model, tokenizer, 1)
    assert together == apart and len(apart) == 5 and accuracy == 0 and none is None
    answers = [f" {text.upper()}. " for text in together[:4]] + ["something else"]
    assert lorahub_inference(INPUTS, model, tokenizer, 2, answers)[1] == 80


def test_a_classifiers_predictions_are_names():
    model = classifier()
    with torch.no_grad():
        expected = [model.config.id2label[model(torch.tensor(Tokenizer()([text], 9, True)["input_ids"]))
                    .logits.argmax().item()] for text in INPUTS]  # fmt: skip
    assert lorahub_inference(INPUTS, model, Tokenizer(), 2, expected) == (expected, 100)


def test_models_by_name(tmp_path):
    """The base is the first module's; a tokenizer goes with it."""
    for kind, build in BUILD.items():
        name, folders, tokenizer = save_all(kind, tmp_path)
        outputs = CLASSES if kind == "classifier" else WORDS[:5]
        weights, model, used = lorahub_learning(folders, INPUTS, outputs, 3, progress=False)
        assert type(model) is type(build()) and used.eos_token_id == 1
        again, _ = lorahub_inference(INPUTS, name, name, 5)
        assert again == lorahub_inference(INPUTS, build(), tokenizer, 5)[0]


def test_errors_leave_the_model_alone(tmp_path, monkeypatch):
    folders = save_modules(seq2seq, tmp_path)
    model = seq2seq()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]

    def fails(match, modules=folders, outputs=OUTPUTS, error=ValueError, **options):
        with pytest.raises(error, match=match):
            lorahub_learning(modules, INPUTS, outputs, 4, model, tokenizer=Tokenizer(), progress=False, **options)
        assert [type(m) for m in model.modules()] == kinds
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    fails("lora_module_list: got none, expected at least one", [])
    fails("m0 twice", [folders[0], folders[1], folders[0]])
    fails("4 for 5 inputs", outputs=OUTPUTS[:4])
    fails("get_loss: got a function, expected None with population", get_loss=default_get_loss, population=4)
    fails("expected the adapter's base model", save_modules(causal, tmp_path / "other"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails("huggingface_hub", [str(tmp_path / "nowhere")], error=ImportError)
    with pytest.raises(ValueError, match="model_name_or_path: got None"):
        lorahub_learning([{"fc.lora_A": torch.ones(1, 2), "fc.lora_B": torch.ones(2, 1)}], INPUTS, OUTPUTS, 4)
