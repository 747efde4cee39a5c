"""A two-layer model, its byte-level tokenizer and real PEFT adapters, made once; a server in a thread."""

import socket
import threading
import time
import types

import pytest
import torch

WEIGHTS = {"fr": 1, "de": 2, "it": 3}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_model(seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=260, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.6, eos_token_id=257,
        bos_token_id=256, pad_token_id=258, tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tiny_tokenizer():
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", "<pad>", "<unused>"])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_adapter(folder, seed, r=4, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(tiny_model(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """.root: a folder with the model in `model` and the adapters by name in `adapters`."""
    root = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    for name, seed in WEIGHTS.items():
        save_adapter(root / "adapters" / name, seed, r=4 * seed)
    return types.SimpleNamespace(root=root, model=root / "model", adapters=root / "adapters", save_adapter=save_adapter,
                                 make=tiny_model)  # fmt: skip


@pytest.fixture(scope="session")
def serving(tiny):
    """serving(**options) -> context manager of .url, .server, .engine, .pool, .stop() of a server on a free port."""
    pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    import contextlib

    from fastlora.serve import attach
    from fastlora.serve.engine import Engine
    from fastlora.serve.server import Server

    @contextlib.contextmanager
    def start(names=WEIGHTS, adapters=8, cache_tokens=2048, most=256, **options):
        pool = attach(tiny_model().requires_grad_(False), adapters=adapters, max_rank=32)
        for name in names:
            pool.load(name, tiny.adapters / (name if name in WEIGHTS else "fr"))
        engine = Engine(pool.model, pool, cache_tokens=cache_tokens, batch_tokens=64, page=16, most=most)
        server = Server(engine, tiny_tokenizer(), "base", **options)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        web = uvicorn.Server(uvicorn.Config(server.app, port=port, log_level="error"))
        thread = threading.Thread(target=web.run)
        thread.start()
        while not web.started and thread.is_alive():
            time.sleep(0.01)

        def stop():
            web.should_exit = True
            thread.join(60)
            assert not thread.is_alive()

        try:
            yield types.SimpleNamespace(
                url=f"http://127.0.0.1:{port}", server=server, engine=engine, pool=pool, stop=stop
            )
        finally:
            stop()

    return start
