"""OpenAI's HTTP interface to an engine, with vLLM's calls that load and unload adapters."""

import asyncio
import contextlib
import json
import time
import uuid
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fastlora.serve.engine import Full, Stopped
from fastlora.serve.guard import Guard, refusal
from fastlora.serve.metrics import Metrics
from fastlora.serve.pool import PoolFull
from fastlora.serve.spec import Chat, Completion, Load, Refused, Unload, adapters_of, unknown
from fastlora.serve.text import Text

PAGE = Path(__file__).with_name("page.html")


class Error(BaseModel):
    error: dict[str, Any]


class Server:
    """Answers for `engine` (an Engine) under the base's `name`; `app` is the ASGI application.

    `adapter_root` is the folder whose adapters clients may load, None for no such calls.
    """

    def __init__(self, engine, tokenizer, name, *, adapter_root=None, api_key=None, max_body=2**20, max_streams=128):
        self.engine, self.pool, self.tokenizer, self.name = engine, engine.pool, tokenizer, name
        self.root = None if adapter_root is None else Path(adapter_root).resolve()
        self.started, self.streams, self.max_streams = int(time.time()), 0, max_streams
        self.metrics = Metrics(engine, self.pool, name)
        errors = {code: {"model": Error} for code in (400, 401, 404, 413, 422, 429, 503)}
        self.app = FastAPI(title="fastlora", lifespan=self._lifespan, responses=errors)
        self.app.add_middleware(Guard, api_key=api_key, max_body=max_body)
        for kind, handler in (
            (RequestValidationError, _invalid),
            (HTTPException, lambda _, e: refusal(e.status_code, str(e.detail))),
            (Refused, lambda _, e: refusal(e.status, e.message, e.kind, e.param)),
            (Stopped, lambda _, e: refusal(503, str(e), "ServiceUnavailableError")),
            (Exception, lambda _, e: refusal(500, "an error of the server", "InternalServerError")),
        ):
            self.app.add_exception_handler(kind, handler)
        routes = {"/health": self.health, "/metrics": self.show_metrics, "/v1/models": self.models}
        for path, answer in {**routes, "/v1/models/{model:path}": self.model}.items():
            self.app.get(path)(answer)
        self.app.get("/", include_in_schema=False)(lambda: FileResponse(PAGE))
        self.app.post("/v1/completions")(self.completions)
        self.app.post("/v1/chat/completions")(self.chat)
        if self.root is not None:
            self.app.post("/v1/load_lora_adapter")(self.load)
            self.app.post("/v1/unload_lora_adapter")(self.unload)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        yield
        await asyncio.to_thread(self.engine.stop)

    def health(self):
        if not self.engine.alive:
            raise Stopped("the engine is stopping or has died")
        return {"status": "ok"}

    def show_metrics(self):
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def models(self):
        names = [(self.name, None), *((name, self.name) for name in self.pool.names())]
        return {"object": "list", "data": [self._card(*pair) for pair in names]}

    def model(self, model: str):
        if model not in (self.name, *self.pool.names()):
            raise unknown(model)
        return self._card(model, None if model == self.name else self.name)

    def _card(self, name, parent):
        owner = {"object": "model", "created": self.started, "owned_by": "fastlora"}
        return {"id": name, **owner, "root": parent or name, "parent": parent}

    # adapters

    def load(self, body: Load):
        folder, name = self._inside(body.lora_path), body.lora_name
        if name == self.name:
            raise Refused(400, f"{name!r} is the base model's name", "InvalidUserInput", "lora_name")
        known = name in self.pool.names()
        if known and not body.load_inplace:
            raise Refused(400, f"The lora adapter {name!r} has already been loaded.", "InvalidUserInput", "lora_name")
        try:
            (self.pool.replace if known else self.pool.load)(name, folder)
        except Exception as error:  # whatever a damaged file makes its readers raise
            raise Refused(400, str(error), param="lora_path") from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def unload(self, body: Unload):
        try:
            self.pool.unload(body.lora_name)
        except KeyError:
            raise unknown(body.lora_name) from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _inside(self, path):
        """The folder, where it and all in it lie below the root, links followed."""
        try:
            folder = (self.root / path).resolve()
            outside = [p for p in (folder, *folder.rglob("*")) if not p.resolve().is_relative_to(self.root)]
            there = not outside and folder != self.root and folder.is_dir()
        except (OSError, ValueError, RuntimeError):
            there, outside = False, []
        if outside:
            raise Refused(400, "lora_path leads out of the folder of adapters", "InvalidUserInput", "lora_path")
        if not there:
            raise Refused(404, f"No adapter found for {path!r}", "NotFoundError", "lora_path")
        return folder

    # answers

    async def completions(self, body: Completion, request: Request):
        prompt = body.prompt[0] if isinstance(body.prompt[0:1], list) and isinstance(body.prompt[0], str) else body.prompt
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        elif max(prompt) >= len(self.tokenizer):
            raise Refused(400, f"prompt: token {max(prompt)}, expected below {len(self.tokenizer)}", param="prompt")
        else:
            ids = prompt
        limit = body.max_tokens or 16
        return await self._answer(body, request, ids, limit, "text_completion", lambda text, _: {"text": text})

    async def chat(self, body: Chat, request: Request):
        messages = [{"role": m.role, "content": m.text()} for m in body.messages]
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # templates are programs of the model's authors, and raise what they like
            raise Refused(400, f"messages: the model's chat template: {error}", param="messages") from error
        limit = body.max_completion_tokens or body.max_tokens or max(self.engine.longest - len(ids), 1)

        def content(text, first):
            if not body.stream:
                return {"message": {"role": "assistant", "content": text, "refusal": None}}
            return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}

        return await self._answer(body, request, ids, limit, "chat.completion", content)

    async def _answer(self, body, request, ids, limit, kind, content):
        if self.streams >= self.max_streams:
            raise Refused(429, f"{self.max_streams} answers are under way already", "RateLimitError")
        head = {"id": f"fastlora-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        head["object"] = kind + (".chunk" if body.stream and kind.startswith("chat") else "")
        running = await self._submit(body, ids, limit)
        usage = {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
        pieces = self._pieces(body, running, usage, request)

        def reply(text, finish, first=True, **more):
            choice = {"index": 0, "finish_reason": finish, "logprobs": None, **content(text, first)}
            return {**head, "choices": [choice], **more}

        async def events():
            first = True
            async with contextlib.aclosing(pieces):
                try:
                    async for text, finish in pieces:
                        if text or finish or first:
                            yield f"data: {json.dumps(reply(text, finish, first))}\n\n"
                            first = False
                    if body.wants_usage():
                        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
                except Stopped as error:
                    yield f"data: {refusal(503, str(error), 'ServiceUnavailableError').body.decode()}\n\n"
            yield "data: [DONE]\n\n"

        if body.stream:
            return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async with contextlib.aclosing(pieces):
            parts = [piece async for piece in pieces]
        return reply("".join(text for text, _ in parts), parts[-1][1], usage=usage)

    async def _submit(self, body, ids, limit):
        """(the engine's request, the queue that its tokens come through, the time)"""
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue()
        spec = adapters_of(body.model, self.name, self.pool.names())

        def on_token(token, finish):
            loop.call_soon_threadsafe(tokens.put_nowait, (token, finish))

        options = {"temperature": 1.0 if body.temperature is None else body.temperature, "top_p": body.top_p or 1.0}
        options |= {"top_k": body.top_k or 0, "seed": body.seed, "ignore_eos": body.ignore_eos}
        try:
            running = self.engine.submit(ids, spec, on_token, max_new_tokens=limit, **options)
        except KeyError:
            raise unknown(body.model) from None
        except ValueError as error:
            raise Refused(400, str(error), param="max_tokens") from None
        except (Full, PoolFull) as error:
            raise Refused(429, str(error), "RateLimitError") from None
        self.streams += 1
        self.metrics.prompt_tokens.inc(len(ids))
        return running, tokens, time.perf_counter()

    async def _pieces(self, body, running, usage, request):
        """Yields (text, None or why it ended); a client that goes away cancels the request."""
        running, tokens, start = running
        text, finish, ended = Text(self.tokenizer, body.stops()), None, "abort"
        try:
            while finish is None:
                try:
                    token, finish = await asyncio.wait_for(tokens.get(), 0.5)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                if isinstance(finish, Exception):
                    raise unknown(body.model) if isinstance(finish, KeyError) else Stopped(str(finish))
                if not text.tokens:
                    self.metrics.first.observe(time.perf_counter() - start)
                piece = text.add(token)
                finish = "stop" if text.stopped else finish
                usage["completion_tokens"] = text.tokens
                usage["total_tokens"] = usage["prompt_tokens"] + text.tokens
                ended = finish or ended
                yield piece + (text.end() if finish else ""), finish
        finally:
            self.streams -= 1
            self.engine.cancel(running)
            self.metrics.generated.inc(text.tokens)
            self.metrics.whole.observe(time.perf_counter() - start)
            self.metrics.ended(ended)


def _invalid(request, error):
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:] if part != "body") or None
    return refusal(400, f"{where or 'body'}: {first['msg']}", param=where)
