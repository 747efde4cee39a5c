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
from starlette.exceptions import HTTPException

from fastlora.serve.answer import Answer
from fastlora.serve.engine import Stopped
from fastlora.serve.metrics import Metrics
from fastlora.serve.pool import PoolFull
from fastlora.serve.spec import Chat, Completion, Load, Refused, Unload, unknown
from fastlora.serve.text import Names


def refusal(status, message, kind="BadRequestError", param=None):
    """A response with OpenAI's body of an error; ASCII, as a message may quote what is no text."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return Response(json.dumps({"error": error}), status, media_type="application/json")


def _invalid(request, error):
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"][1:])) or "body"
    return refusal(400, f"{where}: {first['msg']}", param=where)


class Guard:
    """ASGI middleware: 401 under /v1 without `Authorization: Bearer <api_key>`, 413 for more than `max_body` bytes.

    scope["closing"] is an ExitStack that is left however a call ends, its response begun or not.
    """

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

        with contextlib.ExitStack() as scope["closing"]:
            await self.app(scope, counted, send)


class Server:
    """Answers for `engine` (an Engine) under the base's `name`; `app` is the ASGI application.

    Clients may load adapters from the folder `adapter_root`, where it is given; `max_streams` are answered at once.
    """

    def __init__(self, engine, tokenizer, name, *, adapter_root=None, api_key=None, max_body=2**20, max_streams=128):
        self.engine, self.pool, self.tokenizer, self.name = engine, engine.pool, tokenizer, name
        self.root = None if adapter_root is None else Path(adapter_root).resolve()
        self.started, self.streams, self.max_streams = int(time.time()), 0, max_streams
        self.metrics, self.names = Metrics(engine, self.pool, name), Names(tokenizer)
        errors = {code: {"description": "OpenAI's body of an error"} for code in (400, 401, 404, 413, 429, 503)}
        self.app = app = FastAPI(title="fastlora", lifespan=self._lifespan, responses=errors)
        app.add_middleware(Guard, api_key=api_key, max_body=max_body)
        for kind, answer in (
            (RequestValidationError, _invalid),
            (HTTPException, lambda _, e: refusal(e.status_code, str(e.detail))),
            (Refused, lambda _, e: refusal(*e.told)),
            (PoolFull, lambda _, e: refusal(429, str(e), "RateLimitError")),
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
        ids = [self.tokenizer(p, verbose=False)["input_ids"] if isinstance(p, str) else p for p in body.prompt]
        return await self._answer(body, request, ids, body.max_tokens or 16, "text_completion", self.names.completion)

    async def chat(self, body: Chat, request: Request):
        if body.top_logprobs and not body.logprobs:
            raise Refused(400, "top_logprobs needs logprobs", param="top_logprobs")
        said = [{"role": message.role, "content": message.content} for message in body.messages]
        try:
            ids = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # templates are programs of the model's authors, and raise what they like
            raise Refused(400, f"messages: the model's chat template: {error}", param="messages") from error
        limit = body.max_completion_tokens or body.max_tokens or max(self.engine.longest - len(ids), 1)
        return await self._answer(body, request, [ids], limit, "chat.completion", self.names.chat)

    async def _answer(self, body, request, prompts, limit, kind, log):
        answer, chat = Answer(self, body, prompts, limit), kind.startswith("chat")
        request.scope["closing"].callback(answer.close)
        head = {"id": f"fastlora-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        head["object"] = kind + (".chunk" if body.stream and chat else "")

        def choice(number, text, finish, drawn, first=True):
            message = {"role": "assistant", "content": text} if first else {"content": text}
            said = {"delta" if body.stream else "message": message} if chat else {"text": text}
            logprobs = None if body.tops is None else log(drawn)
            return {"index": number, "finish_reason": finish, "logprobs": logprobs, **said}

        async def events():
            begun = set()
            try:
                async for number, text, finish, drawn in answer.pieces(request):
                    if text or finish or drawn or number not in begun:
                        made = choice(number, text, finish, drawn, number not in begun)
                        yield f"data: {json.dumps({**head, 'choices': [made]})}\n\n"
                        begun.add(number)
                if (body.stream_options or {}).get("include_usage"):
                    yield f"data: {json.dumps({**head, 'choices': [], 'usage': answer.usage})}\n\n"
            except Refused as error:
                yield f"data: {refusal(*error.told).body.decode()}\n\n"
            yield "data: [DONE]\n\n"

        if body.stream:
            return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        whole = {number: ("", None, []) for number in range(len(answer.texts))}
        async for number, text, finish, drawn in answer.pieces(request):
            whole[number] = whole[number][0] + text, finish, whole[number][2] + drawn
        return {**head, "choices": [choice(number, *parts) for number, parts in whole.items()], "usage": answer.usage}
