"""Requests of many kinds, in any order, while adapters come, go and change: every answer is the one it has alone."""

import asyncio
import json
import random
import resource
import threading
import time

import pytest

pytest.importorskip("transformers", minversion="5.20")
for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")

STEADY = ["base", "fr", "de", "it", "fr*0.6+de*0.4", "it*0.5+de*0.25+fr*0.25"]
BAD = [{"prompt": None}, {"max_tokens": -1}, {"model": "klingon"}, {"temperature": 99}, {"prompt": "x" * 5000}]


def kinds(count):
    """`count` bodies of requests that no adapter's coming and going changes."""
    pick, found = random.Random(0), []
    for i in range(count):
        prompt = pick.choice(["shared words that fill a block of keys", "ab" * 40, "x", "question "]) + str(i % 3)
        body = {"model": STEADY[i % len(STEADY)], "prompt": prompt, "max_tokens": pick.randint(1, 12)}
        sampled = {"temperature": 1.2, "seed": i} if i % 4 == 0 else {"temperature": 0}
        found.append({**body, **sampled, "stream": i % 2 == 0})
    return found


async def ask(client, body):
    answer = await client.completions.create(**body, extra_body={"ignore_eos": True})
    if not body["stream"]:
        return answer.choices[0].text
    return "".join([chunk.choices[0].text async for chunk in answer])


async def hang_up(web, body):
    try:
        sent = {**body, "max_tokens": 200, "ignore_eos": True, "stream": True}
        async with web.stream("POST", "completions", json=sent) as answer:
            async for _ in answer.aiter_raw():
                break
    except httpx.HTTPError:
        pass


async def changes(web, root, done):
    """Load, ask, replace and unload adapters of their own names until `done`; returns how often."""
    count = 0
    while not done.is_set():
        name = f"passing{count % 5}"
        for folder, inplace in (("fr", False), ("de", True)):
            body = {"lora_name": name, "lora_path": str(root / folder), "load_inplace": inplace}
            assert (await web.post("load_lora_adapter", json=body)).status_code == 200
            asked = {"model": name, "prompt": "hello", "max_tokens": 3}
            assert (await web.post("completions", json=asked)).status_code == 200
        assert (await web.post("unload_lora_adapter", json={"lora_name": name})).status_code == 200
        count += 1
        await asyncio.sleep(0.05)
    return count


async def storm(served, root, bodies, requests, at_once=24):
    pick, gate, done = random.Random(1), asyncio.Semaphore(at_once), asyncio.Event()
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)
    web = httpx.AsyncClient(base_url=f"{served.url}/v1/", timeout=120)
    alone = [await ask(client, body) for body in bodies]
    order = [i % len(bodies) for i in range(requests)]
    pick.shuffle(order)
    wrong = []

    async def one(i, number):
        async with gate:
            if number % 11 == 0:
                await hang_up(web, bodies[i])
            if number % 13 == 0:
                bad = await web.post("completions", content=json.dumps({**bodies[i], **pick.choice(BAD)}))
                assert bad.status_code in (400, 404), bad.text
            if (got := await ask(client, bodies[i])) != alone[i]:
                wrong.append((bodies[i], alone[i], got))

    changing = asyncio.create_task(changes(web, root, done))
    await asyncio.gather(*(one(i, number) for number, i in enumerate(order)))
    done.set()
    changed = await changing
    await client.close()
    await web.aclose()
    return wrong, changed, len(set(alone))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def run(serving, tiny, rounds, requests):
    bodies = kinds(40)
    with serving(adapter_root=tiny.adapters, adapters=2) as served:
        memory = []
        for _ in range(rounds):
            wrong, changed, distinct = asyncio.run(storm(served, tiny.adapters, bodies, requests))
            assert not wrong and changed and distinct > 30
            memory.append(resident())
        deadline = time.monotonic() + 30
        while served.engine.counts() != (0, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert served.engine.counts() == (0, 0) and served.server.streams == 0
        assert sorted(served.pool.names()) == ["de", "fr", "it"]
        assert all(held.leases == 0 for held in served.pool._names.values())
        assert served.pool.evictions > 0
    assert threading.active_count() < 50
    return memory


def test_a_minute_of_it(serving, tiny):
    run(serving, tiny, 1, 120)


@pytest.mark.slow
def test_two_thousand_requests(serving, tiny):
    memory = run(serving, tiny, 4, 500)
    assert memory[-1] < memory[0] + 30e6, [f"{m / 1e6:.0f} MB" for m in memory]
