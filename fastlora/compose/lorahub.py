"""The functions of sail-sg/lorahub, PyPI's lorahub 0.1.0, for causal language models and classifiers as well."""

import json
import pathlib

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from fastlora.compose.bank import named, opened
from fastlora.compose.search import default_l1_regularization, merge_composed, optimise, search
from fastlora.ops import check

LENGTH, NEW_TOKENS, IGNORED = 2048, 256, -100


def lorahub_learning(lora_module_list, example_inputs, example_outputs, max_inference_step, model_name_or_path=None,
                     batch_size=None, get_loss=None, get_regular=default_l1_regularization, seed=42, tokenizer=None, *,
                     mode="lorahub", progress=True, **options):  # fmt: skip
    """Find weights for LoRA modules on a few examples, and merge them: (weights (N,), merged model, tokenizer).

    `lora_module_list`: folders in PEFT's format, names on Hugging Face's hub, or tensors by name, of any rank and
    lora_alpha. `model_name_or_path`: a model, which is merged in place, or a name; None: the first module's base.
    `tokenizer`: one, or a name; None: the model's. `max_inference_step` candidates are evaluated. Texts: an
    encoder-decoder's labels are the outputs' tokens, a causal model's the output's after the input's and an end token,
    a classifier's the outputs as names in config.label2id or numbers. The loss is a mean over examples of each one's
    mean over its tokens; `get_loss=default_get_loss`, or get_loss(example_dataset, model, batch_size) -> number, has
    the original's, for one candidate at a time. `options`: those of `search`. Raises ValueError naming the argument
    for no module, one twice, one that does not fit the model; the model is then as it was. Source: arXiv 2307.13269.
    """
    check.value(lora_module_list, "lora_module_list", "none", "at least one LoRA module")
    adapters = {name: _folder(source) for name, source in named(lora_module_list).items()}
    counts = len(example_inputs), len(example_outputs)
    check.value(counts[0] == counts[1] > 0, "example_outputs", f"{counts[1]} for {counts[0]} inputs", "one an input")
    model, tokenizer = _load(model_name_or_path, tokenizer, adapters)
    inputs = encode(model, tokenizer, example_inputs, example_outputs)
    options |= {"steps": max_inference_step, "seed": seed, "progress": progress}
    if get_loss is None:
        row_losses = None if _kind(model) != "classifier" else (
            lambda outputs, given: F.cross_entropy(outputs.logits.float(), given["labels"], reduction="none")
        )  # fmt: skip
        result = search(model, adapters, inputs, row_losses, mode=mode, regular=get_regular, batch_size=batch_size,
                        **options)  # fmt: skip
    else:
        single = options.get("population", 1) == 1 and options.get("method", "evolution") == "evolution"
        check.value(single, "get_loss", "a function", "None with population or method='gradient': it has one candidate")
        examples = Examples({"input": example_inputs, "output": example_outputs, **inputs})
        with opened(model, adapters, mode) as owner:

            def evaluate(weights):
                with owner.running(weights.to(next(model.parameters()).device)):
                    return torch.tensor([float(get_loss(examples, model, batch_size))])

            result = optimise(evaluate, len(adapters), get_regular, **options)
    return result.weights.numpy(), merge_composed(model, adapters, result.weights, mode), tokenizer


@torch.no_grad()
def lorahub_inference(example_inputs, model_or_name_path, tokenizer_or_tokenizer_path, batch_size,
                      example_outputs=None):  # fmt: skip
    """(predicted texts, accuracy in percent): greedy, at most 256 new tokens; a classifier's are its labels' names.

    The accuracy, None without `example_outputs`, counts equal texts, without case, full stops and outer blanks.
    """
    model, tokenizer = _load(model_or_name_path, tokenizer_or_tokenizer_path, {})
    model.eval()
    predictions = []
    for start in range(0, len(example_inputs), batch_size):
        inputs = encode(model, tokenizer, example_inputs[start : start + batch_size])
        inputs = {name: value.to(next(model.parameters()).device) for name, value in inputs.items()}
        if _kind(model) == "classifier":
            names = getattr(model.config, "id2label", {})
            predictions += [str(names.get(i, i)) for i in model(**inputs).logits.argmax(-1).tolist()]
            continue
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        made = made[:, inputs["input_ids"].shape[1] :] if _kind(model) == "causal" else made
        predictions += tokenizer.batch_decode(made.cpu(), skip_special_tokens=True)
    if example_outputs is None:
        return predictions, None
    bare = [[str(text).strip().lower().replace(".", "") for text in texts] for texts in (predictions, example_outputs)]
    return predictions, 100 * sum(made == wanted for made, wanted in zip(*bare, strict=True)) / len(predictions)


def default_get_loss(example_dataset, model, batch_size):
    """The original's loss, which depends on batch_size: the sum of the batches' mean losses, over the examples."""
    from transformers import default_data_collator

    count, device, total = len(example_dataset), next(model.parameters()).device, 0.0
    size = min(count, batch_size or count)
    for start in range(0, count, size):
        batch = default_data_collator([example_dataset[i] for i in range(start, min(start + size, count))])
        with torch.no_grad():
            total += float(model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss)
    return total / count


class Examples:
    """What a `get_loss` gets: columns by name, rows by number, as of a `datasets.Dataset`."""

    def __init__(self, columns):
        self.columns = {k: v.tolist() if isinstance(v, torch.Tensor) else list(v) for k, v in columns.items()}

    def __len__(self):
        return len(self.columns["input"])

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: of[key] for name, of in self.columns.items()}


def encode(model, tokenizer, inputs, outputs=None):
    """The model's arguments as tensors; without `outputs` a causal model's are padded on the left, to be continued."""

    def tokens(texts, special=True):
        return tokenizer(list(texts), max_length=LENGTH, truncation=True, add_special_tokens=special)["input_ids"]

    def padded(rows, value):
        return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value, padding_side=side)

    kind, ids, end, found = _kind(model), tokens(inputs), tokenizer.eos_token_id, {}
    side = "left" if kind == "causal" and outputs is None else "right"
    if kind == "causal":
        ids = [row[:-1] if len(row) > 1 and row[-1] == end else row for row in ids]
    if outputs is not None and kind == "classifier":
        known = getattr(model.config, "label2id", {})
        found["labels"] = torch.tensor([known[text] if text in known else int(text) for text in outputs])
    elif outputs is not None:
        labels = tokens(outputs, special=kind != "causal")
        if kind == "causal":
            labels = [row + [end] * (end is not None) for row in labels]
            ids, labels = zip(*((a + b, [IGNORED] * len(a) + b) for a, b in zip(ids, labels, strict=True)), strict=True)
        found["labels"] = padded(labels, IGNORED)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    return {"input_ids": padded(ids, pad), "attention_mask": padded([[1] * len(row) for row in ids], 0), **found}


def _kind(model):
    if getattr(model.config, "is_encoder_decoder", False):
        return "seq2seq"
    return "causal" if hasattr(model, "can_generate") and model.can_generate() else "classifier"


def _folder(source):
    """A folder, downloaded if there is none of this name."""
    if isinstance(source, dict) or pathlib.Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download

    return snapshot_download(str(source), allow_patterns="adapter_*")


def _load(model, tokenizer, adapters):
    """The model and the tokenizer, by name or as they are; a model that is loaded goes to the GPU."""
    import transformers

    if model is None:
        first = next(iter(adapters.values()))
        check.value(not isinstance(first, dict), "model_name_or_path", None, "a model, as the first module is tensors")
        model = json.loads((pathlib.Path(first) / "adapter_config.json").read_text())["base_model_name_or_path"]
    if isinstance(model, str):
        config = transformers.AutoConfig.from_pretrained(model)
        classifies = (config.architectures or [""])[0].endswith("ForSequenceClassification")
        end = "SequenceClassification" if classifies else "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
        model = getattr(transformers, f"AutoModelFor{end}").from_pretrained(model)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer or getattr(model, "name_or_path", None))
    return model, tokenizer
