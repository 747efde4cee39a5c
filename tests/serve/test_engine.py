"""The engine gives each token its request's adapters, whatever shares the batch, the cache or the pool with it."""

import queue
import time

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20")
from fastlora.serve import PoolFull, attach  # noqa: E402
from fastlora.serve import engine as module  # noqa: E402
from fastlora.serve.engine import Engine, Stopped  # noqa: E402

PROMPT = list(range(40, 90))


@pytest.fixture(scope="module")
def make(tiny):
    transformers = pytest.importorskip("transformers")
    engines = []

    def start(names=("fr", "de", "it"), adapters=8, **options):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny.model).eval()
        pool = attach(model.requires_grad_(False), adapters=adapters, max_rank=32)
        for name in names:
            pool.load(name, tiny.adapters / name)
        engine = Engine(model, pool, **{"cache_tokens": 2048, "batch_tokens": 64, "page": 16, **options})
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.stop(timeout=10)


@pytest.fixture(scope="module")
def engine(make):
    return make()


@pytest.fixture(scope="module")
def truth(tiny):
    """What plain transformers and PEFT answer, one prompt at a time."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

    def answer(prompt, spec, new):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny.model).eval()
        weights = {} if spec is None else spec if isinstance(spec, dict) else {spec: 1.0}
        for i, (name, weight) in enumerate(weights.items()):
            if i == 0:
                model = peft.PeftModel.from_pretrained(model, tiny.adapters / name, adapter_name=name)
            else:
                model.load_adapter(tiny.adapters / name, adapter_name=name)
            for layer in model.modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    layer.set_scale(name, weight)
        if len(weights) > 1:
            model.base_model.set_adapter(list(weights))
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **settings)
        return out[0, len(prompt) :].tolist()

    return answer


def start(engine, prompt, spec, new=8, **options):
    tokens = queue.Queue()
    options = {"ignore_eos": True, "temperature": 0, **options}
    request = engine.submit(prompt, spec, lambda *event: tokens.put(event), max_new_tokens=new, **options)
    return request, tokens


def collect(started):
    tokens, finish = [], None
    while finish is None:
        token, finish = started[1].get(timeout=60)
        if isinstance(finish, Exception):
            raise finish
        tokens.append(token)
    return tokens, finish


SPECS = [None, "fr", "de", "it", {"fr": 0.6, "de": 0.4}]


def test_together_each_answers_as_alone(engine, truth):
    """The same long prompt under every adapter at once, then one after the other on a cache that now knows it."""
    expected = [truth(PROMPT, spec, 8) for spec in SPECS]
    assert len({tuple(tokens) for tokens in expected}) == len(SPECS)
    started = [start(engine, PROMPT, spec) for spec in SPECS]
    assert [collect(one)[0] for one in started] == expected
    for _ in range(2):
        assert [collect(start(engine, PROMPT, spec))[0] for spec in SPECS] == expected
    cache = engine._manager.batch_processor.cache
    assert cache.use_prefix_sharing and any(a.ledger.hash_to_block for a in cache.cache_allocators.values())


def test_prompts_longer_than_a_step_and_mixed_lengths(engine, truth):
    prompts = [(list(range(5, 155)), "fr"), ([7], "de"), (PROMPT, None), (list(range(100, 220)), "it")]
    started = [start(engine, prompt, spec) for prompt, spec in prompts]
    assert [collect(one)[0] for one in started] == [truth(prompt, spec, 8) for prompt, spec in prompts]


def test_a_replaced_adapter_shares_no_blocks_and_old_requests_keep_the_old_one(make, tiny, truth):
    engine = make(names=("fr",))
    before = collect(start(engine, PROMPT, "fr", 40))[0]
    running = start(engine, PROMPT, "fr", 40)
    running[1].get(timeout=60)
    engine.pool.replace("fr", tiny.adapters / "de")
    assert collect(start(engine, PROMPT, "fr"))[0] == truth(PROMPT, "de", 8)
    rest = collect(running)[0]
    assert rest == before[1:]


def test_a_full_pool_makes_requests_wait_and_the_base_passes(make, truth):
    engine = make(adapters=1)
    assert engine.pool.page_count == 2
    started = [start(engine, PROMPT, name, 24) for name in ("it", "fr", "de")]
    assert engine.counts()[1] >= 1
    assert len(collect(start(engine, PROMPT, None))[0]) == 8
    expected = [truth(PROMPT, name, 24) for name in ("it", "fr", "de")]
    assert [collect(one)[0] for one in started] == expected
    assert engine.counts() == (0, 0)


def test_leases_end_with_their_requests(engine):
    done, cancelled = start(engine, PROMPT, "fr", 4), start(engine, PROMPT, "de", 200)
    cancelled[1].get(timeout=60)
    engine.cancel(cancelled[0])
    collect(done)
    deadline = time.monotonic() + 20
    while engine.counts() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.counts() == (0, 0)
    assert done[0].lease.released and cancelled[0].lease.released
    engine.cancel(done[0])


def test_sampling_is_each_requests_own(engine):
    def drawn(**options):
        return [collect(one)[0] for one in [start(engine, PROMPT, "fr", 12, temperature=1.5, **options)]][0]

    alone = drawn(seed=5)
    crowd = [start(engine, PROMPT, spec, 12, temperature=1.0, seed=9) for spec in SPECS]
    assert drawn(seed=5) == alone != drawn(seed=6)
    [collect(one) for one in crowd]
    greedy = collect(start(engine, PROMPT, "fr", 12))[0]
    assert drawn(top_k=1) == drawn(top_p=1e-6) == greedy != alone


def test_finish_reasons(engine, truth):
    tokens, finish = collect(start(engine, PROMPT, None, 5))
    assert finish == "length" and len(tokens) == 5
    engine.eos = (tokens[2],)
    try:
        assert collect(start(engine, PROMPT, None, 5, ignore_eos=False)) == (tokens[:3], "stop")
    finally:
        engine.eos = (257,)


def test_what_is_refused(engine, make):
    with pytest.raises(KeyError, match="klingon"):
        start(engine, PROMPT, "klingon")
    for prompt, new in (([], 1), (PROMPT, 10**9), (list(range(200)) * 3, 8)):
        with pytest.raises(ValueError):
            start(engine, prompt, None, new)
    small = make(most=1)
    first = start(small, PROMPT, None, 300)
    with pytest.raises(PoolFull):
        start(small, PROMPT, None)
    small.cancel(first[0])


def test_stop_finishes_what_runs_and_takes_no_more(make):
    engine = make()
    running = start(engine, PROMPT, "fr", 60)
    engine.stop()
    assert len(collect(running)[0]) == 60 and not engine.alive
    with pytest.raises(Stopped):
        start(engine, PROMPT, None)


def test_a_crash_is_told_to_every_request(make):
    engine = make(adapters=1)
    started = [start(engine, PROMPT, name, 400) for name in ("it", "fr", None)]
    started[2][1].get(timeout=60)
    engine.model.forward = None
    for one in started:
        with pytest.raises(Stopped):
            collect(one)
    assert not engine.alive and engine.counts() == (0, 0)


def test_other_transformers_are_refused_in_a_sentence(engine, monkeypatch):
    monkeypatch.setattr(module.transformers, "__version__", "5.4.0")
    with pytest.raises(RuntimeError, match=r"transformers >=5.20,<5.25, not 5.4.0"):
        Engine(engine.model, engine.pool)


def test_several_are_queued_or_none(make):
    engine = make(most=3)
    calls = [(PROMPT, "fr", lambda *event: None, {"max_new_tokens": 200, "ignore_eos": True}) for _ in range(2)]
    engine.submit_all(calls)
    assert engine.adapters() == [["fr"], []]
    for bad in ((PROMPT, "klingon", print, {"max_new_tokens": 1}), ([], None, print, {"max_new_tokens": 1})):
        with pytest.raises((KeyError, ValueError)):
            engine.submit_all([bad])
    with pytest.raises(PoolFull):
        engine.submit_all(calls)
    assert sum(engine.counts()) == 2
    for request in list(engine._requests.values()):
        engine.cancel(request)
    assert settled(engine) and engine.pool.info()["fr"]["leases"] == 0


def settled(engine, seconds=20):
    deadline = time.monotonic() + seconds
    while engine.counts() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    return engine.counts() == (0, 0)


def test_a_refusal_half_way_takes_back_the_others(make, monkeypatch):
    engine, count = make(), iter(range(9))
    add = engine._manager.add_request
    monkeypatch.setattr(engine._manager, "add_request", lambda **kw: add(**kw) if next(count) < 2 else None)
    told = []
    options = {"max_new_tokens": 400, "ignore_eos": True}
    with pytest.raises(Stopped):
        engine.submit_all([(PROMPT, "fr", lambda *event: told.append(event), options)] * 4)
    assert settled(engine, 3) and engine.pool.info()["fr"]["leases"] == 0 and not told


def test_names_of_adapters_that_run_and_wait(make):
    engine = make(adapters=1)
    started = [start(engine, PROMPT, spec, 300) for spec in ("it", {"fr": 0.5, "de": 0.5}, None)]
    assert engine.adapters() == [["it"], ["de", "fr"]]
    for one in started:
        engine.cancel(one[0])
    assert settled(engine) and engine.adapters() == [[], []]


def test_a_cancellation_before_its_request_is_known_is_kept(make, monkeypatch):
    """The manager empties its queue of requests before its queue of cancellations: one may come in between."""
    engine = make()
    processor = engine._manager.batch_processor or None
    deadline = time.monotonic() + 20
    while processor is None and time.monotonic() < deadline:
        time.sleep(0.01)
        processor = engine._manager.batch_processor
    late = []
    put = engine._manager.input_queue.put
    monkeypatch.setattr(engine._manager.input_queue, "put", lambda state, *rest, **kw: late.append(state))
    one = start(engine, PROMPT, "fr", 450)
    engine.cancel(one[0])
    time.sleep(0.5)
    put(late[0])
    assert settled(engine) and one[0].seen < 200, "it is not run to its end"


def test_a_cancelled_request_unblocks_those_put_back(make):
    """For want of blocks the manager puts requests back until one ends; one that is cancelled ends too."""
    engine = make()
    one = start(engine, PROMPT, "fr", 450)
    one[1].get(timeout=60)
    engine._manager.batch_processor.scheduler.block_new_requests = True
    other = start(engine, PROMPT, "de", 4)
    engine.cancel(one[0])
    assert len(collect(other)[0]) == 4


def test_log_probabilities_come_with_their_tokens(engine):
    def asked(**options):
        tokens = queue.Queue()
        options = {"ignore_eos": True, "temperature": 1.5, "seed": 3, **options}
        engine.submit(PROMPT, "fr", lambda *event: tokens.put(event), max_new_tokens=8, **options)
        return [tokens.get(timeout=60) for _ in range(8)]

    plain, found = asked(), asked(logprobs=2)
    assert [len(event) for event in plain] == [2] * 8 and [event[0] for event in found] == [event[0] for event in plain]
    for token, _, values, tokens in found:
        assert tokens[0] == token and len(values) == len(tokens) == 3 and values[1] >= values[2]


def test_tokens_that_the_model_has_not_are_refused(engine):
    for prompt, options in (([260], {}), (PROMPT, {"logit_bias": {260: 1.0}})):
        with pytest.raises(ValueError, match="token 260"):
            start(engine, prompt, None, **options)
