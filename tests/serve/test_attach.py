"""A model whose batch rows have adapters of their own, against PEFT with one adapter at a time."""

import threading

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import fastlora
from fastlora import serve

SPECS = ["fr", None, "it", "dora"]


@pytest.fixture(scope="module")
def folders(tiny):
    own = tiny.root / "attach"
    dora = tiny.save_adapter(own / "dora", 5, r=12, use_dora=True)
    return {**{name: tiny.adapters / name for name in ("fr", "de", "it")}, "dora": dora}


@pytest.fixture
def attached(tiny, folders):
    model = tiny.make().requires_grad_(False)
    pool = serve.attach(model, adapters=8, max_rank=32)
    for name, folder in folders.items():
        pool.load(name, folder)
    return model, pool


def alone(tiny, folders, spec):
    """The model of PEFT with this adapter alone."""
    return tiny.make() if spec is None else peft.PeftModel.from_pretrained(tiny.make(), folders[spec]).eval()


def prompts(rows=4, tokens=7):
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_every_row_has_its_own(tiny, folders, attached):
    model, _ = attached
    ids = prompts()
    with serve.adapters(model, SPECS):
        logits = model(input_ids=ids).logits
        last = model(input_ids=ids, logits_to_keep=2).logits
    base = tiny.make()(input_ids=ids).logits
    for i, spec in enumerate(SPECS):
        expected = alone(tiny, folders, spec)(input_ids=ids[i : i + 1]).logits[0]
        torch.testing.assert_close(logits[i], expected, rtol=1e-3, atol=1e-3)
        assert spec is None or (expected - base[i]).abs().max() > 0.1
    torch.testing.assert_close(last, logits[:, -2:], rtol=1e-4, atol=1e-4)
    assert torch.equal(model(input_ids=ids).logits, base), "outside the block it is the base"


@torch.no_grad()
def test_a_sum_of_two(tiny, folders, attached):
    model, _ = attached
    with serve.adapters(model, [{"fr": 0.25, "it": 0.75}] * 2):
        logits = model(input_ids=prompts(2)).logits
    merged = alone(tiny, folders, "fr")
    merged.load_adapter(folders["it"], "it")
    merged.add_weighted_adapter(["default", "it"], [0.25, 0.75], "both", combination_type="cat")
    merged.set_adapter("both")
    torch.testing.assert_close(logits, merged(input_ids=prompts(2)).logits, rtol=1e-3, atol=1e-3)


def test_generate(tiny, folders, attached):
    model, _ = attached
    ids, mask = prompts(), torch.ones(4, 7, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 258, 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, adapters=SPECS, **options)
    for i, spec in enumerate(SPECS):
        start = 3 if i == 0 else 0
        lone = alone(tiny, folders, spec).generate(input_ids=ids[i : i + 1, start:], **options)
        assert together[i, start:].tolist() == lone[0].tolist(), spec
    beams = {**options, "num_beams": 2, "num_return_sequences": 2}
    found = model.generate(input_ids=ids[1:3], adapters=[None, "it"], **beams)
    lone = alone(tiny, folders, "it").generate(input_ids=ids[2:3], **beams)
    assert found[2:].tolist() == lone.tolist()
    assert model.generate(input_ids=ids[1:2], **options).shape == (1, 13)


def test_training_together_equals_apart(attached):
    """Four adapters in one batch have the gradients of four runs, and a fifth, which no row used, has none."""
    model, pool = attached
    made = [pool.create(f"new{i}", r, 2 * r, None if i else ["q_proj"]) for i, r in enumerate((4, 8, 2, 16, 4))]
    for p in (p for adapter in made for p in adapter):
        nn.init.normal_(p, std=0.1)
    ids = prompts(4)

    def loss(rows, specs):
        with serve.adapters(model, specs):
            logits = model(input_ids=ids[rows]).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[rows, 1:].flatten(), reduction="sum")

    loss([0, 1, 2, 3], ["new0", "new1", "new2", "new3"]).backward()
    together = [[p.grad for p in adapter] for adapter in made]
    assert all(grad is None for grad in together[4])
    for i in range(4):
        apart = torch.autograd.grad(loss([i], [f"new{i}"]), made[i])
        for got, expected in zip(together[i], apart, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_checkpointing_restores_the_route(attached):
    model, pool = attached
    parameters = pool.create("new", 4)
    for p in parameters:
        nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 5, 32, requires_grad=True)
    layer = model.model.layers[0].mlp

    def grads(run):
        with serve.adapters(model, ["new", "fr"]):
            y = run(x)
        mine = [p for name, p in zip(pool.arenas, parameters, strict=False)]
        return torch.autograd.grad(y.square().sum(), [x, *mine], allow_unused=True)

    plain = grads(layer)
    carried = {"use_reentrant": False, "context_fn": fastlora.checkpoint_context}
    for a, b in zip(plain, grads(lambda x: checkpoint(layer, x, **carried)), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    with pytest.raises(RuntimeError, match="checkpoint_context"):
        grads(lambda x: checkpoint(layer, x, use_reentrant=False))


def test_saved_adapters_are_peft_s(tiny, attached, tmp_path):
    model, pool = attached
    for p in pool.create("mine", 4, 16, ["q_proj", "down_proj"]):
        nn.init.normal_(p, std=0.1)
    pool.save("mine", tmp_path)
    ids = prompts(1)
    with torch.no_grad(), serve.adapters(model, ["mine"]):
        logits = model(input_ids=ids).logits
    theirs = peft.PeftModel.from_pretrained(tiny.make(), tmp_path).eval()
    torch.testing.assert_close(logits, theirs(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_convolutions_of_gpt2_are_linear_layers(tmp_path):
    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    state, ids = {k: v.clone() for k, v in made.state_dict().items()}, prompts(2) % 64
    theirs = peft.get_peft_model(made, config).eval()
    theirs.save_pretrained(tmp_path)
    expected = theirs(input_ids=ids).logits
    model = GPT2LMHeadModel(made.config).eval()
    model.load_state_dict(state)
    pool = serve.attach(model, adapters=2, max_rank=8)
    pool.load("a", tmp_path)
    with serve.adapters(model, ["a", None]):
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-3, atol=1e-3)


def test_threads_have_batches_of_their_own(attached):
    model, _ = attached
    ids, results = prompts(2), {}

    @torch.no_grad()
    def run(name):
        with serve.adapters(model, [name, name]):
            results[name] = [model(input_ids=ids).logits for _ in range(5)]

    threads = [threading.Thread(target=run, args=(name,)) for name in ("fr", "de", "it")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("fr", "de", "it"):
        with torch.no_grad(), serve.adapters(model, [name, name]):
            alone = model(input_ids=ids).logits
        assert all(torch.equal(got, alone) for got in results[name])


def test_detach_and_refusals(tiny, attached):
    model, pool = attached
    with pytest.raises(ValueError, match="fastlora: model"):
        serve.attach(model)
    with pytest.raises(KeyError, match="nobody"), serve.adapters(model, ["nobody"]):
        pass
    with serve.adapters(model, ["fr", "fr", "de"]), pytest.raises(ValueError, match="fastlora: adapters"):
        model(input_ids=prompts(4))
    with pytest.raises(ValueError, match="another model"):
        serve.attach(tiny.make(), pool)
    for wrong, error in (("fr", TypeError), (["fr"] * 2, ValueError)):
        with pytest.raises(error, match="fastlora: adapters"):
            model.generate(input_ids=prompts(4), adapters=wrong, max_new_tokens=1)
    with serve.adapters(model, ["fr", "de"]), pytest.raises(ValueError, match="do not lie in rows"):
        model.lm_head(torch.zeros(4, 32))
    serve.detach(model)
    with pytest.raises(ValueError, match="not attached"):
        serve.detach(model)
    assert type(model.lm_head) is nn.Linear and not hasattr(model.lm_head, "arena")
    with pytest.raises(ValueError, match="not attached"), serve.adapters(model, ["fr"]):
        pass
    with pytest.raises(ValueError, match="dense linear"):
        serve.AdapterPool(nn.Sequential(nn.Conv1d(2, 2, 1)))
