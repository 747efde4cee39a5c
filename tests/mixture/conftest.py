"""A tiny Llama with distinct experts in PEFT's folders, our mixture of them, and PEFT's own."""

import copy

import pytest
import torch

from fastlora import mixture

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def _tiny_llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def _write_expert(model, folder, r, alpha, targets, seed, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **options)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return str(folder)


def _randomize(classifier):
    torch.manual_seed(3)
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.5)


@pytest.fixture(scope="session")
def tiny_llama():
    return _tiny_llama


@pytest.fixture(scope="session")
def write_expert():
    """An adapter by PEFT itself, with random factors: (model, folder, r, lora_alpha, targets, seed) -> folder."""
    return _write_expert


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{name: folder} of three experts of different ranks, scales and layers, with names that PEFT does not take."""
    root, model = tmp_path_factory.mktemp("experts"), _tiny_llama()
    kinds = {"law.fr": (4, 8, TARGETS), "code": (2, 3, TARGETS), "train": (8, 8, TARGETS[:2])}
    return {name: _write_expert(model, root / name, *kind, seed) for seed, (name, kind) in enumerate(kinds.items())}


@pytest.fixture
def ids():
    torch.manual_seed(7)
    return torch.randint(3, 61, (2, 9))


@pytest.fixture
def ours(folders):
    """A mixture, its classifier random: (**fields of xLoRAConfig) -> xLoRAModel."""

    def make(model=None, adapters=folders, **fields):
        config = mixture.xLoRAConfig(**{"xlora_size": 16, **fields})
        made = mixture.add_xlora_to_model(_tiny_llama() if model is None else model, config, adapters, False)
        _randomize(made.xlora_classifier)
        return made

    return make


@pytest.fixture
def peers(folders):
    """PEFT's mixture with the same experts, under the only names that it takes, and a classifier's values."""
    peft = pytest.importorskip("peft")

    def make(**fields):
        adapters = {str(i): folder for i, folder in enumerate(folders.values())}
        config = peft.XLoraConfig(hidden_size=32, adapters=adapters, **{"xlora_size": 16, **fields})
        made = peft.get_peft_model(_tiny_llama(), config).eval()
        _randomize(made.base_model.internal_xlora_classifier)
        return made

    return make
