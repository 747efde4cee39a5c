"""The choices of one call: submitted together, read as they come, left together."""

import asyncio
import functools
import time

from fastlora.serve.pool import PoolFull
from fastlora.serve.spec import Refused, adapters_of, unknown
from fastlora.serve.text import Text


class Answer:
    """The `body`'s n choices for each of `prompts` (lists of tokens), numbered prompt · n + choice; to be closed.

    Raises Refused, PoolFull and Stopped, with nothing begun.
    """

    def __init__(self, server, body, prompts, limit):
        self.server, self.body, self.start = server, body, time.perf_counter()
        length, n = sum(map(len, prompts)), body.n or 1
        arrive = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, self._arrive)
        self.usage = {"prompt_tokens": length, "completion_tokens": 0, "total_tokens": length}
        self.queue, count, most = asyncio.Queue(), n * len(prompts), min(server.max_streams, server.engine.most)
        if count > most:
            raise Refused(400, f"n: got {count} choices in all, expected at most {most}", param="n")
        spec = adapters_of(body.model, server.name, server.pool.names())
        calls = [(ids, spec, functools.partial(arrive, i * n + j), {"max_new_tokens": limit, **body.sampling(j)})
                 for i, ids in enumerate(prompts) for j in range(n)]  # fmt: skip
        try:
            if server.streams + count > server.max_streams:
                raise PoolFull(f"{server.streams} answers are under way already, of {server.max_streams} at most")
            self.requests = server.engine.submit_all(calls)
        except KeyError:
            raise unknown(body.model) from None
        except ValueError as error:
            raise Refused(400, str(error)) from None
        server.streams += count
        server.metrics.prompt_tokens.inc(length)
        self.texts, self.ended, self.last = [Text(server.tokenizer, body.stop or ()) for _ in calls], {}, {}

    def _arrive(self, *event):
        self.queue.put_nowait(event)

    async def pieces(self, request):
        """Yields (number, text, None or why it ended, [(offset, log-probabilities, tokens)]), until the client goes."""
        looked, engine, metrics = self.start, self.server.engine, self.server.metrics
        while len(self.ended) < len(self.texts):
            if time.perf_counter() > looked + 0.5:
                looked = time.perf_counter()
                if await request.is_disconnected():
                    break
            try:
                number, token, finish, *logprobs = await asyncio.wait_for(self.queue.get(), 0.5)
            except TimeoutError:
                continue
            if isinstance(finish, Exception):
                gone = isinstance(finish, KeyError)
                raise unknown(self.body.model) if gone else Refused(503, str(finish), "ServiceUnavailableError")
            if number in self.ended:
                continue
            text, now = self.texts[number], time.perf_counter()
            metrics.next.observe(now - self.last[number]) if text.count else metrics.first.observe(now - self.start)
            self.last[number], offset, piece = now, text.length, text.add(token, finish is not None)
            self.usage |= {name: self.usage[name] + 1 for name in ("completion_tokens", "total_tokens")}
            if text.stopped or finish:
                self.ended[number] = finish = "stop" if text.stopped else finish
                engine.cancel(self.requests[number])
            # JSON has no infinity and no NaN
            drawn = [(offset, [max(-9999.0, x) for x in logprobs[0]], logprobs[1])] if logprobs else []
            yield number, piece, finish, drawn
        self.close()

    def close(self):
        """Cancel what still runs, and count, once."""
        self.server.streams, metrics = self.server.streams - len(self.requests), self.server.metrics
        for number, request in enumerate(self.requests):
            self.server.engine.cancel(request)
            metrics.generated.inc(self.texts[number].count)
            metrics.whole.observe(time.perf_counter() - self.start)
            metrics.ended(self.ended.get(number, "abort"))
        self.requests = []
