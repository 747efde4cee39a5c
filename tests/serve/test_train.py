"""Adapters that are trained in an attached model, beside those that are served from pages."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from fastlora import serve
from fastlora.serve.batch import Batch


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def attached(tiny, request):
    model = tiny.make().to(request.param).requires_grad_(False)
    pool = serve.attach(model, adapters=4, max_rank=32)
    pool.load("fr", tiny.adapters / "fr")
    return model, pool


def prompts(rows, tokens=6):
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(1))


def loss(model, specs):
    with serve.adapters(model, specs):
        logits = model(input_ids=prompts(len(specs))).logits.float()
    return logits.log_softmax(-1)[..., 0].mean()


def test_only_what_a_token_used_has_gradients(attached):
    model, pool = attached
    parts = pool.create("q", 4, target_modules=["q_proj"]), pool.create("all", 8), pool.create("idle", 2)
    for p in (p for part in parts for p in part):
        nn.init.normal_(p, std=0.1)
    loss(model, ["q", {"all": 0.5, "fr": 1.0}, None]).backward()
    q, everything, idle = parts
    assert len(q) == 4 and all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in q)
    assert all(p.grad.any() for p in (*q, *everything)) and all(p.grad is None for p in idle)
    assert all(not p.grad for p in model.parameters() if p.grad is not None)


def test_steps_change_their_rows_alone(attached):
    model, pool = attached
    parameters = pool.create("new", 4)
    ids = prompts(3)

    @torch.no_grad()
    def logits():
        with serve.adapters(model, ["new", "fr", None]):
            return model(input_ids=ids).logits

    before, optimizer, losses = logits(), torch.optim.AdamW(parameters, 0.01), []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loss(model, ["new", "fr"]))
        losses[-1].backward()
        optimizer.step()
    after = logits()
    assert losses[-1] < losses[0] and not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_a_trained_adapter_never_leaves_for_another(tiny, attached):
    model, pool = attached
    (p, *_) = pool.create("new", 4)
    pool.unpin("new")
    slot = pool.acquire("new").entries[0][0]
    pool.load("de", tiny.adapters / "de")
    pool.load("it", tiny.adapters / "it")
    for name in ("fr", "de", "it", "fr") * 2:
        pool.acquire(name).release()
    assert pool.acquire("new").entries[0][0] == slot >= pool.slots and pool.parameters("new")[0] is p
    with pytest.raises(ValueError, match="being trained"):
        pool.replace("new", tiny.adapters / "fr")


def test_unloaded_it_is_gone_when_its_last_use_ends(attached):
    model, pool = attached
    for p in pool.create("new", 4):
        nn.init.normal_(p, std=0.1)
    kept = weakref.ref(pool.parameters("new")[0])
    del p
    lease = pool.acquire("new")
    pool.unload("new")
    gc.collect()
    assert kept() is not None
    lease.release()
    del lease
    gc.collect()
    assert kept() is None
    pool.create("new", 2)
    assert torch.isfinite(loss(model, ["new", "fr"]))


def test_pairs_are_narrowed_once_a_batch(attached):
    """Layers get the same tuples in every call of a batch, and new ones when an adapter comes or goes."""
    model, pool = attached
    for name in ("a", "b"):
        pool.create(name, 2)
    arena = pool.arenas["lm_head"]
    assert arena.own_of(frozenset({0, 1})) is arena.own
    batches = [Batch([pool.acquire(name).entries], pool.device) for name in ("a", "a", "b", "fr")]
    for batch in batches:
        with pool.running(batch):
            pass
    assert [batch.pairs for batch in batches] == [{0}, {0}, {1}, set()]
    narrowed = [arena.own_of(batch.pairs) for batch in batches]
    assert arena.own_of(batches[3].pairs) is narrowed[3] and arena.own_of(batches[0].pairs) is not narrowed[3]
    assert narrowed[0] is narrowed[1]
    assert [[len(A) for A in own[0]] for own in narrowed] == [[2, 0], [2, 0], [0, 2], [0, 0]]
    assert [[B.shape[1] for B in own[1]] for own in narrowed] == [[2, 0], [2, 0], [0, 2], [0, 0]]
    before = arena.own_of(frozenset({0}))
    pool.create("c", 4)
    after = arena.own_of(frozenset({0}))
    assert after is not before and after[0][0] is before[0][0] and [len(A) for A in after[0]] == [2, 0, 0]


def test_created_while_others_run(attached):
    model, pool = attached
    pool.create("first", 2)
    failures, done = [], threading.Event()

    @torch.no_grad()
    def run():
        try:
            while not done.is_set():
                loss(model, ["first", "fr"])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for i in range(30):
        pool.create(str(i), 2, target_modules=["q_proj", "lm_head"])
    done.set()
    thread.join()
    assert not failures


def test_an_attached_model_can_be_collected(tiny):
    model = tiny.make()
    serve.attach(model, adapters=1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
