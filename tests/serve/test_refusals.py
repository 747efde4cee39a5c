"""Fields that are out of range, malformed or unknown get OpenAI's body of an error."""

import json

import pytest

pytest.importorskip("transformers", minversion="5.20")
for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def served(serving):
    with serving() as running:
        yield running


@pytest.fixture
def post(served):
    def send(path, body):
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{served.url}/v1/{path}", content=content, headers=headers, timeout=60)

    return send


BODY = {"model": "fr", "prompt": "x"}
BAD = {
    "no prompt": {"model": "fr"},
    "null prompt": {**BODY, "prompt": None},
    "empty prompt": {**BODY, "prompt": ""},
    "empty tokens": {**BODY, "prompt": []},
    "token beyond": {**BODY, "prompt": [10**6]},
    "empty prompt of two": {**BODY, "prompt": ["a", ""]},
    "empty tokens of two": {**BODY, "prompt": [[1], []]},
    "mixed prompts": {**BODY, "prompt": ["a", [1]]},
    "token beyond of two": {**BODY, "prompt": [[1], [10**6]]},
    "too many prompts": {**BODY, "prompt": ["a"] * 9, "n": 15},
    "surrogate": '{"model": "fr", "prompt": "\\ud800"}',
    "surrogate field": '{"model": "fr", "prompt": "x", "\\ud800": 1}',
    "negative": {**BODY, "max_tokens": -1},
    "zero": {**BODY, "max_tokens": 0},
    "huge": {**BODY, "max_tokens": 10**30},
    "too many": {**BODY, "max_tokens": 10**6},
    "long prompt": {**BODY, "prompt": "x" * 2000},
    "temperature": {**BODY, "temperature": float("nan")},
    "hot": {**BODY, "temperature": 1e9},
    "top_p": {**BODY, "top_p": 0},
    "seed": {**BODY, "seed": 2**70},
    "text for a number": {**BODY, "max_tokens": "5"},
    "no choice": {**BODY, "n": 0},
    "n": {**BODY, "n": 17},
    "best of": {**BODY, "n": 2, "best_of": 2},
    "echo": {**BODY, "echo": True},
    "logprobs": {**BODY, "logprobs": 21},
    "logprobs of a chat": {**BODY, "logprobs": True},
    "penalty": {**BODY, "frequency_penalty": 2.5},
    "NaN penalty": {**BODY, "presence_penalty": float("nan")},
    "no repetition": {**BODY, "repetition_penalty": 0},
    "min_p": {**BODY, "min_p": 1.5},
    "bias": {**BODY, "logit_bias": {"5": 101}},
    "bias beyond": {**BODY, "logit_bias": {"1000000": 1}},
    "bias of a word": {**BODY, "logit_bias": {"word": 1}},
    "negative bias": {**BODY, "logit_bias": {"-1": 1}},
    "empty stop": {**BODY, "stop": ""},
    "many stops": {**BODY, "stop": list("abcde")},
    "unknown field": {**BODY, "guided_json": {}},
    "NaN weight": {**BODY, "model": "fr*nan+de*0.5"},
    "huge weight": {**BODY, "model": "fr*1e9"},
    "no weight": {**BODY, "model": "fr*+de"},
    "null model": {**BODY, "model": None},
    "no JSON": "{",
    "not UTF-8": b'{"model": "\xff"}',
    "a list": "[]",
    "deep": "[" * 50_000,
}


@pytest.mark.parametrize("case", BAD)
def test_bad_fields_are_400(case, post):
    answer = post("completions", BAD[case])
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["code"] == 400


@pytest.mark.parametrize("messages", [None, [], [{"role": "user"}], [{"role": "user", "content": None}], "hello"])
def test_bad_messages_are_400(messages, post):
    assert post("chat/completions", {"model": "fr", "messages": messages}).status_code == 400


@pytest.mark.parametrize("more", [{"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": 3}])
def test_bad_logprobs_of_a_chat_are_400(more, post):
    body = {"model": "fr", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **more}
    assert post("chat/completions", body).status_code == 400


@pytest.mark.parametrize("model", ["klingon", "base:klingon", "fr*0.5+klingon", "other:fr", "\0", "../fr", "fr+"])
def test_unknown_models_are_404(model, post):
    answer = post("completions", {**BODY, "model": model})
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "NotFoundError"
