"""Several choices of several prompts, their log-probabilities, and what changes the draws, from the openai client."""

import itertools
import json
import math
import socket
import time

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.20")
for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
from fastlora.serve.text import Names  # noqa: E402

PROMPTS = ["the first of two", "and another"]
MESSAGES = [{"role": "user", "content": "Hello"}]
LONG = {"ignore_eos": True}


@pytest.fixture(scope="module")
def served(serving):
    with serving(most=16, max_streams=12) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return transformers.AutoTokenizer.from_pretrained(tiny.model)


@pytest.fixture(scope="module")
def logits(tiny):
    """(the base model's logits after these tokens, vocabulary)"""
    model = tiny.make()

    @torch.no_grad()
    def of(tokens):
        return model(input_ids=torch.tensor([tokens])).logits[0, -1]

    return of


def ask(client, prompt, model="fr", extra=(), **options):
    options = {"max_tokens": 8, "temperature": 1.2, "extra_body": {**LONG, **dict(extra)}, **options}
    return client.completions.create(model=model, prompt=prompt, **options)


def gather(chunks, text=lambda choice: choice.text):
    """{number: the text} of a stream, whose every choice ends once."""
    texts, ended = {}, []
    for choice in itertools.chain.from_iterable(chunk.choices for chunk in chunks):
        assert choice.index not in ended
        texts[choice.index] = texts.get(choice.index, "") + (text(choice) or "")
        ended += [choice.index] if choice.finish_reason else []
    assert sorted(ended) == sorted(texts)
    return texts


def test_choices_are_numbered_and_seeded(client, tokenizer):
    alone = {(p, s): ask(client, p, seed=s).choices[0].text for p in PROMPTS for s in (7, 8, 9)}
    assert len(set(alone.values())) == 6
    whole = ask(client, PROMPTS, n=3, seed=7)
    expected = [alone[p, s] for p in PROMPTS for s in (7, 8, 9)]
    assert [(c.index, c.text) for c in whole.choices] == list(enumerate(expected))
    assert {c.finish_reason for c in whole.choices} == {"length"}
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (sum(map(len, PROMPTS)), 48)
    assert usage.total_tokens == usage.prompt_tokens + 48
    tokens = ask(client, [tokenizer(p)["input_ids"] for p in PROMPTS], n=3, seed=7)
    assert [c.text for c in tokens.choices] == expected
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, PROMPTS, n=3, seed=7, **options))
    assert gather(chunks) == dict(enumerate(expected)) and chunks[-1].usage == usage
    assert len({chunk.choices[0].index for chunk in chunks[:12]}) > 1, "they run together"


def test_choices_of_a_chat(client):
    options = {"model": "de", "messages": MESSAGES, "max_tokens": 8, "temperature": 1.2, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**options, extra_body=LONG)
    texts = {c.index: c.message.content for c in whole.choices}
    assert list(texts) == [0, 1, 2] and len(set(texts.values())) == 3
    chunks = list(client.chat.completions.create(**options, extra_body=LONG, stream=True))
    assert gather(chunks, lambda choice: choice.delta.content) == texts
    roles = [c.index for chunk in chunks for c in chunk.choices if c.delta.role == "assistant"]
    assert sorted(roles) == [0, 1, 2], "each choice's first delta has the role"


def test_choices_without_a_seed_differ_and_greedy_ones_do_not(client):
    assert len({c.text for c in ask(client, "x", n=4).choices}) == 4
    assert len({c.text for c in ask(client, "x", n=4, temperature=0).choices}) == 1


def test_a_choice_that_stops_leaves_the_others(client, served):
    texts = [c.text for c in ask(client, "x", n=4, seed=1, max_tokens=30).choices]
    stop = texts[2][10:13]
    stopped = ask(client, "x", n=4, seed=1, max_tokens=30, stop=stop)
    assert [c.text for c in stopped.choices] == [t.partition(stop)[0] for t in texts]
    reasons = ["stop" if stop in t else "length" for t in texts]
    assert [c.finish_reason for c in stopped.choices] == reasons and "stop" in reasons
    assert served.server.streams == 0


def idle(served, seconds=30):
    deadline = time.monotonic() + seconds
    while (served.engine.counts(), served.server.streams) != ((0, 0), 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    return served.engine.counts() == (0, 0) and served.server.streams == 0


def test_all_are_admitted_or_none(client, served):
    """12 streams at most, of 16 requests: 8 under way leave room for 4, not for 5."""
    stream = ask(client, "x", n=8, max_tokens=300, stream=True)
    next(iter(stream))
    assert served.server.streams == 8
    with pytest.raises(openai.RateLimitError):
        ask(client, "x", n=5)
    assert served.server.streams == 8 and sum(served.engine.counts()) == 8
    assert len(ask(client, ["x", "y"], n=2).choices) == 4
    with pytest.raises(openai.BadRequestError, match="at most 12"):
        ask(client, "x", n=13)
    stream.close()
    assert idle(served)
    taken = [
        served.engine.submit([1], None, lambda *event: None, max_new_tokens=300, ignore_eos=True) for _ in range(10)
    ]
    with pytest.raises(openai.RateLimitError):
        ask(client, "x", n=7)
    assert served.server.streams == 0 and sum(served.engine.counts()) == 10
    for request in taken:
        served.engine.cancel(request)
    assert idle(served)


def metrics(served):
    text = httpx.get(f"{served.url}/metrics").text
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")}


def test_clients_that_are_gone_before_the_answer_begins(served):
    """Their streams may never start, and are counted no longer all the same."""
    body = b'{"model": "fr", "prompt": "x", "max_tokens": 300, "ignore_eos": true, "stream": true, "n": 2}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"

    def ended():
        return sum(value for name, value in metrics(served).items() if "request_success_total" in name)

    before, deadline = ended(), time.monotonic() + 30
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
            connection.sendall(head % len(body) + body)
    while ended() < before + 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended() == before + 10 and idle(served)


def test_an_adapter_unloaded_while_a_stream_waits_for_it(serving):
    """The stream has begun with a 200: the error comes in it, and it ends as streams do."""
    with serving(adapters=1) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        first = ask(client, "x", model="it", max_tokens=400, stream=True)
        next(iter(first))
        body = {"model": "fr", "prompt": "x", "max_tokens": 4, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as second:
            assert second.status_code == 200 and served.engine.counts() == (1, 1)
            served.pool.unload("fr")
            first.close()
            lines = [line for line in second.iter_lines() if line]
        error = json.loads(lines[0].removeprefix("data: "))["error"]
        assert error["code"] == 404 and "fr" in error["message"] and lines[1:] == ["data: [DONE]"]
        assert idle(served)


def test_log_probabilities_are_the_models_own(client, logits, tokenizer):
    options = {"model": "base", "temperature": 0.7, "seed": 1, "max_tokens": 16}
    whole = ask(client, "log", logprobs=3, **options).choices[0]
    found, names = whole.logprobs, {Names(tokenizer)[token][0]: token for token in range(260)}
    tokens = tokenizer("log")["input_ids"]
    for i, name in enumerate(found.tokens):
        expected = logits(tokens).log_softmax(-1)
        assert found.token_logprobs[i] == pytest.approx(float(expected[names[name]]), abs=1e-3)
        best = {names[n]: value for n, value in found.top_logprobs[i].items()}
        values, likeliest = expected.topk(3)
        assert set(best) == {*likeliest.tolist(), names[name]}
        assert [best[t] for t in likeliest.tolist()] == pytest.approx(values.tolist(), abs=1e-3)
        if not any(name.startswith("\\x") for name in found.tokens[max(i - 1, 0) : i + 1]):
            assert whole.text[found.text_offset[i] :].startswith(name)
        tokens.append(names[name])
    assert tokenizer.decode(tokens[3:], skip_special_tokens=True) == whole.text and len(found.tokens) == 16
    parts = [chunk.choices[0].logprobs for chunk in ask(client, "log", logprobs=3, stream=True, **options)]
    for name in ("tokens", "text_offset", "token_logprobs"):
        streamed = list(itertools.chain.from_iterable(getattr(part, name) for part in parts))
        assert streamed == (pytest.approx if name == "token_logprobs" else list)(getattr(found, name))
    none = ask(client, "log", logprobs=0, **options).choices[0].logprobs
    assert none.token_logprobs == pytest.approx(found.token_logprobs)
    assert [list(top) for top in none.top_logprobs] == [[name] for name in found.tokens]


def test_log_probabilities_of_a_chat(client):
    options = {"model": "fr", "messages": MESSAGES, "max_tokens": 24, "temperature": 1.2, "seed": 5, "n": 2}
    options |= {"logprobs": True, "top_logprobs": 2, "extra_body": LONG}
    whole = client.chat.completions.create(**options)
    for choice in whole.choices:
        content = choice.logprobs.content
        raw = bytes(itertools.chain.from_iterable(part.bytes for part in content if part.token[0] != "<"))
        assert raw.decode(errors="replace") == choice.message.content and len(content) == 24
        assert any(part.token.startswith("\\x") for part in content), "some are no whole character"
        for part in content:
            first, second = part.top_logprobs
            assert first.logprob >= second.logprob and first.logprob >= part.logprob
            assert sum(math.exp(p) for p in {part.logprob, first.logprob, second.logprob}) < 1 + 1e-5
    streamed = {0: [], 1: []}
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.logprobs.content
    for choice in whole.choices:
        mine = streamed[choice.index]
        assert [p.token for p in mine] == [p.token for p in choice.logprobs.content]
        assert [p.logprob for p in mine] == pytest.approx([p.logprob for p in choice.logprobs.content])
    plain = client.chat.completions.create(**{**options, "logprobs": None, "top_logprobs": None})
    assert [c.message.content for c in plain.choices] == [c.message.content for c in whole.choices]
    assert plain.choices[0].logprobs is None


def test_biases_and_penalties(client, logits, tokenizer):
    greedy = {"model": "base", "temperature": 0, "logprobs": 0, "max_tokens": 40}

    def tokens(**options):
        return ask(client, "x", **{**greedy, **options}).choices[0].logprobs.tokens

    plain, a, x = tokens(), *(tokenizer(c)["input_ids"][0] for c in "Ax")
    biased = ask(client, "x", **greedy, logit_bias={str(a): 100}).choices[0]
    assert biased.text == "A" * 40
    before = float(logits([x]).log_softmax(-1)[a])
    assert biased.logprobs.token_logprobs[0] == pytest.approx(before, abs=1e-3), "the model's, without the bias"
    assert plain[0] not in tokens(logit_bias={str(int(logits([x]).argmax())): -100})
    assert len(plain) > len(set(plain)) + 5, "it repeats itself"
    for options in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra": {"repetition_penalty": 100}}):
        assert len(set(tokens(**options))) > len(set(plain)) + 5, options
    assert tokens(temperature=2, extra={"min_p": 1}) == plain != tokens(temperature=2, seed=1)
    neutral = {"frequency_penalty": 0, "presence_penalty": 0, "extra": {"repetition_penalty": 1, "min_p": 0}}
    assert tokens(**neutral) == plain


def test_adapters_and_times_in_the_metrics(client, served):
    before = metrics(served)
    (info,) = (line for line in before if line.startswith("vllm:lora_requests_info"))
    assert info == 'vllm:lora_requests_info{max_lora="16",running_lora_adapters="",waiting_lora_adapters=""}'
    stream = ask(client, "x", model="fr*0.5+it*0.5", n=2, max_tokens=300, stream=True)
    next(iter(stream))
    (info,) = (line for line in metrics(served) if line.startswith("vllm:lora_requests_info"))
    assert 'running_lora_adapters="fr,it"' in info and 'waiting_lora_adapters=""' in info
    assert abs(metrics(served)[info] - time.time()) < 60
    stream.close()
    assert idle(served)
    before = metrics(served)
    ask(client, "x", n=2, max_tokens=5)
    after = metrics(served)
    for name, more in (("time_to_first_token", 2), ("inter_token_latency", 8), ("e2e_request_latency", 2)):
        title = f'vllm:{name}_seconds_count{{model_name="base"}}'
        assert after[title] - before[title] == more
    title = 'vllm:generation_tokens_total{model_name="base"}'
    assert after[title] - before[title] == 10
