"""Tiny models of three kinds, a tokenizer of seven words, and folders of modules, for the tests of LoraHub."""

import json
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import nn

import fastlora
from fastlora.compose import lorahub_learning

INPUTS = ["one two", "two three four", "five", "four five six", "seven"]
OUTPUTS = ["two", "four", "six.", "SEVEN ", "one"]
WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


class Tokenizer:
    """A word is a number; `end` is added as T5's tokenizer does, unless the model continues texts."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, adds_end=True):
        self.adds_end = adds_end

    def __call__(self, texts, max_length, truncation, add_special_tokens=True):
        end = [1] * (self.adds_end and add_special_tokens)
        known = [[2 + WORDS.index(word.strip(".").lower()) for word in text.split()] for text in texts]
        return {"input_ids": [row + end for row in known]}

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(WORDS[i - 2] for i in row if i > 1) for row in rows.tolist()]


def seq2seq():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                                   decoder_start_token_id=0, dropout_rate=0.0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def causal():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=2, eos_token_id=1, bos_token_id=1,
                                      pad_token_id=0)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def classifier():
    torch.manual_seed(0)
    names = dict(enumerate(["bad", "so-so", "good"]))
    config = transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, id2label=names, label2id={v: k for k, v in names.items()},
                                     num_labels=3, hidden_dropout_prob=0.0)  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


BUILD = {"seq2seq": seq2seq, "causal": causal, "classifier": classifier}
CLASSES = ["good", "bad", "good", "1", "so-so"]


def save_modules(build, path, ranks=((4, 8),) * 3):
    """Folders of modules that do something."""
    folders = []
    for i, (r, lora_alpha) in enumerate(ranks):
        model = fastlora.inject(build(), r, lora_alpha)
        torch.manual_seed(10 + i)
        for layer in model.modules():
            if isinstance(layer, fastlora.LoRALayer):
                nn.init.normal_(layer.lora_A, std=0.4)
                nn.init.normal_(layer.lora_B, std=0.4)
        fastlora.save_adapter(model, path / f"m{i}")
        folders.append(str(path / f"m{i}"))
    return folders


def save_all(kind, path):
    """(a folder with model and tokenizer, folders of its modules)."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", *WORDS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    BUILD[kind]().save_pretrained(path / kind)
    tokenizer.save_pretrained(path / kind)
    folders = save_modules(BUILD[kind], path / f"{kind}-modules")
    for folder in folders:
        file = Path(folder, "adapter_config.json")
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"base_model_name_or_path": str(path / kind)}))
    return str(path / kind), folders, tokenizer


def learn(kind, folders, steps=24, tokenizer=None, **options):
    outputs = CLASSES if kind == "classifier" else OUTPUTS
    tokenizer = tokenizer or Tokenizer(kind != "causal")
    return lorahub_learning(folders, INPUTS, outputs, steps, BUILD[kind](), tokenizer=tokenizer, progress=False,
                            **options)  # fmt: skip
