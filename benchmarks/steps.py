"""What is timed of a language model, whatever library its adapters are of: a decoding step and a training step."""

import inspect

import torch
from torch import nn
from transformers import DynamicCache

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def randomize(model, seed=0):
    """Give every B values, so that no library computes with zeros."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    return model


def decode_step(model, tokens):
    """A function of one decoding step after the prompt `tokens` (batch, past); the cache is cut back after each."""
    # PEFT's wrapper has a forward that takes anything
    language_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(language_model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    cache, last = DynamicCache(config=model.config), tokens[:, -1:]
    with torch.inference_mode():
        model(tokens, use_cache=True, **{name: cache})

    @torch.inference_mode()
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
