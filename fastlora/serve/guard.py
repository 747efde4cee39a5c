"""What every call meets before anything reads it: the API key, and the most bytes of a body."""

import hmac
import json

from starlette.exceptions import HTTPException
from starlette.responses import Response


def refusal(status, message, kind="BadRequestError", param=None):
    """A response with OpenAI's body of an error; ASCII, as a message may quote what is no text."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return Response(json.dumps({"error": error}), status, media_type="application/json")


class Guard:
    """ASGI middleware: 401 under /v1 without `Authorization: Bearer <api_key>`, 413 for more than `max_body` bytes."""

    def __init__(self, app, api_key, max_body):
        self.app, self.max_body = app, max_body
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length, given = 0, dict(scope["headers"]).get(b"authorization", b"")
        guarded = self.key is not None and scope["path"].startswith("/v1")
        if guarded and not hmac.compare_digest(given, self.key):
            answer = refusal(401, "the API key is missing or wrong", "AuthenticationError")
            return await answer(scope, receive, send)

        async def counted():
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > self.max_body:
                raise HTTPException(413, f"the body has more than {self.max_body} bytes")
            return message

        await self.app(scope, counted, send)
