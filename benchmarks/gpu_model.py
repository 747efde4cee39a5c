"""A random model in the shape of Llama-3-8B, adapters on all its linear layers: a training and a decoding step."""

import functools
from dataclasses import dataclass

import torch

import fastlora

from .gpu_layers import pinned, skip
from .layers import twin
from .steps import TARGETS, decode_step, randomize, training_step

LLAMA = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
)  # fmt: skip
TINY = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, max_position_embeddings=64,
)  # fmt: skip
METHODS = ("base", "fastlora", "fastlora_kernels", "fastlora_triton", "peft", "peft_bf16")


@dataclass(frozen=True)
class ModelCase:
    mode: str  # training, or decode after `tokens` tokens
    batch: int
    tokens: int
    r: int = 16
    tiny: bool = False
    dtype: str = "bf16"
    graphs = False

    @property
    def name(self):
        model = "tiny" if self.tiny else "llama3-8b"
        return f"gpu/{model}/{self.mode}/{self.dtype}/b{self.batch}/t{self.tokens}/r{self.r}"


def cases(tiny=False):
    if tiny:
        return [ModelCase("training", 1, 16, 8, True), ModelCase("decode", 2, 8, 8, True)]
    return [ModelCase("training", 1, 4096), *(ModelCase("decode", batch, 512) for batch in (1, 16, 64))]


def methods(case):
    return list(METHODS)


def calls(case, device, wanted):
    """{method: [one call]}. The models share the base's weights; one that cannot be made here is left out, and said."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if case.tiny else LLAMA), tie_word_embeddings=False)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        base = LlamaForCausalLM(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    base.train(case.mode == "training")
    tokens = torch.randint(0, config.vocab_size, (case.batch, case.tokens), device=device)
    found = {}
    for method in wanted:
        try:
            step = training_step if case.mode == "training" else decode_step
            call = pinned(method, step, _adapted(base, method, case), tokens)
            found[method] = [functools.partial(pinned, method, call)]
            found[method][0]()
        except (ImportError, RuntimeError, NotImplementedError) as error:
            skip(case, method, error)
            found.pop(method, None)
    return found


def _adapted(base, method, case):
    model = twin(base)
    if method == "base":
        return model
    options = dict(r=case.r, lora_alpha=case.r, target_modules=list(TARGETS))
    if method.startswith("fastlora"):
        model = fastlora.inject(model, **options)
    else:
        import peft

        half = method == "peft_bf16"
        model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=not half)
    return randomize(model)
