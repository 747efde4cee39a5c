"""The HTTP side, from the real openai client and from clients that mean harm."""

import asyncio
import json
import threading
import time

import pytest

pytest.importorskip("transformers", minversion="5.20")
for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")

PROMPT, LONG = "the same words for everyone, longer than a block", {"ignore_eos": True}
GREEDY = {"temperature": 0, "max_tokens": 8, "extra_body": LONG}


@pytest.fixture(scope="module")
def served(serving, tiny):
    with serving(adapter_root=tiny.adapters, max_body=100_000) as running:
        yield running


def client_of(served, **options):
    return openai.OpenAI(base_url=f"{served.url}/v1", **{"api_key": "none", "max_retries": 0, **options})


@pytest.fixture(scope="module")
def client(served):
    return client_of(served)


@pytest.fixture
def post(served):
    def send(path, body, **options):
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return httpx.post(f"{served.url}/v1/{path}", content=content, headers=headers, timeout=60, **options)

    return send


def complete(client, model, prompt=PROMPT, **options):
    return client.completions.create(model=model, prompt=prompt, **{**GREEDY, **options})


def idle(served, seconds=20):
    deadline = time.monotonic() + seconds
    while served.engine.counts() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    return served.engine.counts() == (0, 0)


def test_models_are_the_base_and_every_adapter(client, served):
    models = client.models.list().data
    assert [(m.id, m.parent) for m in models] == [("base", None), *((n, "base") for n in served.pool.names())]
    assert client.models.retrieve("fr").id == "fr"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("klingon")


def test_names_and_mixtures(client):
    answers = {m: complete(client, m).choices[0].text for m in ("base", "fr", "de", "fr*0.6+de*0.4")}
    assert len(set(answers.values())) == 4
    for same, model in {"base:fr": "fr", "fr*1": "fr", "de*0.4 + fr*0.6": "fr*0.6+de*0.4", "de*0+it*0": "base"}.items():
        assert complete(client, same).choices[0].text == answers[model]


def test_completion_counts_and_streams_the_same(client):
    whole = complete(client, "fr")
    assert whole.object == "text_completion" and whole.model == "fr"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 8)
    assert whole.choices[0].finish_reason == "length"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(complete(client, "fr", **options))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage == whole.usage
    assert complete(client, "fr", prompt=list(PROMPT.encode())).usage.prompt_tokens == len(PROMPT)
    assert complete(client, "fr", max_tokens=None).usage.completion_tokens == 16


def test_chat(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    whole = client.chat.completions.create(model="de", messages=messages, **GREEDY)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len("user: Hello\nassistant:")
    chunks = list(client.chat.completions.create(model="de", messages=messages, stream=True, **GREEDY))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[0].object == "chat.completion.chunk" and chunks[0].choices[0].delta.role == "assistant"


def test_stop_strings_end_the_text_before_them(client):
    text = complete(client, "fr", max_tokens=30).choices[0].text
    stop = text[10:12]
    for stream in (False, True):
        answer = complete(client, "fr", max_tokens=30, stop=[stop, "never this"], stream=stream)
        pieces = list(answer) if stream else [answer]
        assert "".join(p.choices[0].text for p in pieces) == text[: text.index(stop)]
        assert pieces[-1].choices[0].finish_reason == "stop"


def test_seeds(client):
    options = {"temperature": 1.5, "max_tokens": 12}
    texts = [complete(client, "fr", seed=seed, **options).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


BODY = {"model": "fr", "prompt": "x"}


def test_other_calls_have_openai_bodies_too(served, post):
    assert httpx.get(f"{served.url}/v1/nothing").json()["error"]["code"] == 404
    assert httpx.get(f"{served.url}/v1/completions").json()["error"]["code"] == 405
    assert post("completions", {**BODY, "prompt": "x" * 200_000}).status_code == 413
    chunks = (b"x" * 50_000 for _ in range(10))
    assert httpx.post(f"{served.url}/v1/completions", content=chunks).status_code == 413


def test_load_and_unload(client, served, post, tiny):
    names = served.pool.names()
    tiny.save_adapter(tiny.adapters / "later", 9)
    assert post("load_lora_adapter", {"lora_name": "new", "lora_path": "later"}).status_code == 200
    first = complete(client, "new").choices[0].text
    again = {"lora_name": "new", "lora_path": str(tiny.adapters / "fr")}
    assert post("load_lora_adapter", again).json()["error"]["type"] == "InvalidUserInput"
    assert post("load_lora_adapter", {**again, "load_inplace": True}).status_code == 200
    assert complete(client, "new").choices[0].text == complete(client, "fr").choices[0].text != first
    assert post("unload_lora_adapter", {"lora_name": "new", "lora_int_id": 3}).status_code == 200
    assert post("unload_lora_adapter", {"lora_name": "new"}).status_code == 404
    with pytest.raises(openai.NotFoundError):
        complete(client, "new")
    assert served.pool.names() == names


@pytest.mark.parametrize("path", ["", "\0", ".", "..", "../model", "/", "x" * 1000, "missing", "linked", "out/in"])
def test_no_path_leads_out_of_the_root(path, post, served, tiny):
    linked, inner = tiny.adapters / "linked", tiny.adapters / "out" / "in"
    if not linked.exists():
        linked.symlink_to(tiny.model)
        inner.mkdir(parents=True)
        (inner / "adapter_config.json").symlink_to(tiny.model / "config.json")
    answer = post("load_lora_adapter", {"lora_name": "x", "lora_path": path})
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"]
    assert "x" not in served.pool.names()


@pytest.mark.parametrize("name", ["a*b", "a+b", "a:b", " ", "", "base", "\0", "fr"])
def test_names_that_are_refused(name, post):
    assert post("load_lora_adapter", {"lora_name": name, "lora_path": "fr"}).status_code == 400


def test_a_damaged_adapter_is_refused_and_changes_nothing(post, served, tiny):
    broken = tiny.adapters / "broken"
    tiny.save_adapter(broken, 4)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    used = served.pool.used_pages()
    answer = post("load_lora_adapter", {"lora_name": "broken", "lora_path": "broken"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert "broken" not in served.pool.names() and served.pool.used_pages() == used


def test_a_client_that_hangs_up_frees_its_request(served):
    body = {**BODY, **LONG, "max_tokens": 400}
    for stream in (True, False):
        try:
            with httpx.stream("POST", f"{served.url}/v1/completions", json={**body, "stream": stream}, timeout=1) as r:
                next(r.iter_raw())
        except httpx.ReadTimeout:
            pass
        assert idle(served) and served.server.streams == 0


def test_metrics_and_health(client, served):
    complete(client, "fr")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    lines = dict(
        line.rsplit(" ", 1)
        for line in httpx.get(f"{served.url}/metrics").text.splitlines()
        if line and not line.startswith("#")
    )
    label = '{model_name="base"}'
    for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count"):
        assert float(lines[name + label]) > 0
    assert float(lines["fastlora:pool_pages_used" + label]) == served.pool.used_pages() > 0
    assert float(lines["fastlora:pool_evictions_total" + label]) == served.pool.evictions
    assert float(lines['vllm:request_success_total{finished_reason="length",model_name="base"}']) > 0


def test_an_api_key_is_asked_for_and_too_many_get_429(serving):
    with serving(names=("fr",), api_key="secret", most=1, max_streams=1) as served:
        for key in ("none", "secrets", "sécret"):
            answer = httpx.get(f"{served.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "AuthenticationError"
        assert httpx.get(f"{served.url}/health").status_code == 200
        client = client_of(served, api_key="secret")
        stream = complete(client, "fr", max_tokens=400, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            complete(client, "base")
        stream.close()
        assert idle(served)
        assert complete(client, "base").choices
        # without --allow-runtime-lora there are no such calls
        answer = httpx.post(f"{served.url}/v1/load_lora_adapter", json={}, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 404


def test_shutdown_finishes_what_runs(serving):
    with serving(names=("fr",)) as served:
        client, got = client_of(served), []
        stream = complete(client, "fr", max_tokens=60, stream=True)
        next(iter(stream))
        thread = threading.Thread(target=lambda: got.extend(stream))
        thread.start()
        served.stop()
        thread.join(10)
        assert got[-1].choices[0].finish_reason == "length"
        assert not served.engine.alive
        with pytest.raises(openai.APIConnectionError):
            complete(client, "fr")


def test_a_dead_engine_is_a_503(serving):
    with serving(names=("fr",)) as served:
        served.engine.model.forward = None
        client = client_of(served)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as caught:
                complete(client, "fr")
            assert caught.value.status_code == 503
        assert httpx.get(f"{served.url}/health").status_code == 503


def test_many_at_once(served):
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    models = ["base", "fr", "de", "it", "fr*0.6+de*0.4"] * 4

    async def everyone():
        answers = await asyncio.gather(*(complete(client, m) for m in models))
        return [a.choices[0].text for a in answers]

    alone = {m: complete(client_of(served), m).choices[0].text for m in set(models)}
    assert asyncio.run(everyone()) == [alone[m] for m in models]
