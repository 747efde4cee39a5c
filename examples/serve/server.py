"""OpenAI's HTTP interface to an engine, with vLLM's calls that load and unload adapters."""

import asyncio
import contextlib
import hmac
import itertools
import json
import time
import uuid
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from fastlora.serve.engine import Stopped
from fastlora.serve.metrics import Metrics
from fastlora.serve.pool import PoolFull
from fastlora.serve.spec import Chat, Completion, Load, Refused, Unload, adapters_of, unknown
from fastlora.serve.text import Text
from starlette.exceptions import HTTPException


def refusal(status, message, kind="BadRequestError", param=None):
    """A response with OpenAI's body of an error; ASCII, as a message may quote what is no text."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return Response(json.dumps({"error": error}), status, media_type="application/json")


def _invalid(request, error):
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"][1:])) or "body"
    return refusal(400, f"{where}: {first['msg']}", param=where)


class Guard:
    """ASGI middleware: 401 under /v1 without `Authorization: Bearer <api_key>`, 413 for more than `max_body` bytes."""

    def __init__(self, app, api_key, max_body):
        self.app, self.max_body = app, max_body
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope, receive, send):
        length, given = 0, dict(scope.get("headers", ())).get(b"authorization", b"")
        guarded = self.key is not None and scope.get("path", "").startswith("/v1")
        if guarded and not hmac.compare_digest(given, self.key):
            return await refusal(401, "the API key is missing or wrong", "AuthenticationError")(scope, receive, send)

        async def counted():
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > self.max_body:
                raise HTTPException(413, f"the body has more than {self.max_body} bytes")
            return message

        await self.app(scope, counted, send)


class Server:
    """Answers for `engine` (an Engine) under the base's `name`; `app` is the ASGI application.

    Clients may load adapters from the folder `adapter_root`, where it is given; `max_streams` are answered at once.
    """

    def __init__(self, engine, tokenizer, name, *, adapter_root=None, api_key=None, max_body=2**20, max_streams=128):
        self.engine, self.pool, self.tokenizer, self.name = engine, engine.pool, tokenizer, name
        self.root = None if adapter_root is None else Path(adapter_root).resolve()
        self.started, self.streams, self.max_streams = int(time.time()), 0, max_streams
        self.metrics = Metrics(engine, self.pool, name)
        errors = {code: {"description": "OpenAI's body of an error"} for code in (400, 401, 404, 413, 429, 503)}
        self.app = app = FastAPI(title="fastlora", lifespan=self._lifespan, responses=errors)
        app.add_middleware(Guard, api_key=api_key, max_body=max_body)
        for kind, answer in (
            (RequestValidationError, _invalid),
            (HTTPException, lambda _, e: refusal(e.status_code, str(e.detail))),
            (Refused, lambda _, e: refusal(*e.told)),
            (Stopped, lambda _, e: refusal(503, str(e), "ServiceUnavailableError")),
            (Exception, lambda _, e: refusal(500, "an error of the server", "InternalServerError")),
        ):
            app.add_exception_handler(kind, answer)
        page, plain = Path(__file__).with_name("page.html"), "text/plain; version=0.0.4"
        app.get("/", include_in_schema=False)(lambda: FileResponse(page))
        app.get("/metrics")(lambda: PlainTextResponse(self.metrics.text(), media_type=plain))
        app.get("/health")(self.health)
        app.get("/v1/models")(lambda: {"object": "list", "data": self._cards()})
        app.get("/v1/models/{model:path}")(self.model)
        app.post("/v1/completions")(self.completions)
        app.post("/v1/chat/completions")(self.chat)
        if self.root is not None:
            app.post("/v1/load_lora_adapter")(self.load)
            app.post("/v1/unload_lora_adapter")(self.unload)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        yield
        await asyncio.to_thread(self.engine.stop)

    def health(self):
        if not self.engine.alive:
            raise Stopped("the engine is stopping or has died")
        return {"status": "ok"}

    def _cards(self):
        same = {"object": "model", "created": self.started, "owned_by": "fastlora"}
        names = [(self.name, None), *((name, self.name) for name in self.pool.names())]
        return [{"id": name, **same, "root": name, "parent": parent} for name, parent in names]

    def model(self, model: str):
        for card in self._cards():
            if card["id"] == model:
                return card
        raise unknown(model)

    def load(self, body: Load):
        folder, name = self._inside(body.lora_path), body.lora_name
        known = name in self.pool.names()
        if name == self.name or (known and not body.load_inplace):
            told = f"The lora adapter {name!r} has already been loaded, or has the base model's name."
            raise Refused(400, told, "InvalidUserInput", "lora_name")
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
            parts = itertools.chain([folder], folder.rglob("*"))
            if not all(self.root in part.resolve().parents for part in parts):
                raise Refused(400, "lora_path leads out of the folder of adapters", "InvalidUserInput", "lora_path")
            if folder.is_dir():
                return folder
        except (OSError, ValueError, RuntimeError):
            pass
        raise Refused(404, f"No adapter found for {path!r}", "NotFoundError", "lora_path")

    async def completions(self, body: Completion, request: Request):
        prompt = body.prompt[0] if isinstance(body.prompt, list) and isinstance(body.prompt[0], str) else body.prompt
        ids = self.tokenizer(prompt, verbose=False)["input_ids"] if isinstance(prompt, str) else prompt
        if max(ids, default=0) >= len(self.tokenizer):
            raise Refused(400, f"prompt: token {max(ids)}, expected below {len(self.tokenizer)}", param="prompt")
        limit = body.max_tokens or 16
        return await self._answer(body, request, ids, limit, "text_completion", lambda text, _: {"text": text})

    async def chat(self, body: Chat, request: Request):
        texts = [m.content if isinstance(m.content, str) else "".join(p.text for p in m.content) for m in body.messages]
        said = [{"role": message.role, "content": text} for message, text in zip(body.messages, texts, strict=True)]
        try:
            ids = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # templates are programs of the model's authors, and raise what they like
            raise Refused(400, f"messages: the model's chat template: {error}", param="messages") from error
        limit = body.max_completion_tokens or body.max_tokens or max(self.engine.longest - len(ids), 1)

        def content(text, first):
            role = {"role": "assistant"} if first else {}
            return {"delta" if body.stream else "message": {**role, "content": text}}

        return await self._answer(body, request, ids, limit, "chat.completion", content)

    async def _answer(self, body, request, ids, limit, kind, content):
        usage = {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
        pieces = self._pieces(request, body, usage, *self._submit(body, ids, limit))
        chunk = ".chunk" if body.stream and kind.startswith("chat") else ""
        head = {"id": f"fastlora-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        head["object"] = kind + chunk

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
                    if (body.stream_options or {}).get("include_usage"):
                        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
                except Stopped as error:
                    yield f"data: {refusal(503, str(error), 'ServiceUnavailableError').body.decode()}\n\n"
            yield "data: [DONE]\n\n"

        if body.stream:
            return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async with contextlib.aclosing(pieces):
            parts = [piece async for piece in pieces]
        return reply("".join(text for text, _ in parts), parts[-1][1] if parts else None, usage=usage)

    def _submit(self, body, ids, limit):
        """(the engine's request, the queue that its tokens come through)"""
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue()

        def on_token(*event):
            loop.call_soon_threadsafe(tokens.put_nowait, event)

        spec = adapters_of(body.model, self.name, self.pool.names())
        try:
            if self.streams >= self.max_streams:
                raise PoolFull(f"{self.max_streams} answers are under way already")
            started = self.engine.submit(ids, spec, on_token, max_new_tokens=limit, **body.sampling())
        except KeyError:
            raise unknown(body.model) from None
        except ValueError as error:
            raise Refused(400, str(error), param="max_tokens") from None
        except PoolFull as error:
            raise Refused(429, str(error), "RateLimitError") from None
        self.streams += 1
        self.metrics.prompt_tokens.inc(len(ids))
        return started, tokens

    async def _pieces(self, request, body, usage, started, tokens):
        """Yields (text, None or why it ended); a client that goes away cancels the request."""
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        text, finish, start = Text(self.tokenizer, stops), None, time.perf_counter()
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
                if not text.count:
                    self.metrics.first.observe(time.perf_counter() - start)
                piece = text.add(token, finish is not None)
                finish = "stop" if text.stopped else finish
                usage |= {"completion_tokens": text.count, "total_tokens": usage["prompt_tokens"] + text.count}
                yield piece, finish
        finally:
            self.streams -= 1
            self.engine.cancel(started)
            self.metrics.generated.inc(text.count)
            self.metrics.whole.observe(time.perf_counter() - start)
            self.metrics.ended(finish if isinstance(finish, str) else "abort")
