"""What stands before the application: who may ask, under which name, and how much they may send."""

import hmac
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from derta_jax.evaluation.serving.problems import Problem, to_json

LONGEST_BODY = 4 * 2**20
"""Bytes."""
OPEN_PATHS = ("/health",)
"""Answered without a token."""


class Guard:
    """Lets through what names one of `hosts` and brings the `token`, where these are given, and is not too long.

    A web page can have its own name resolve to 127.0.0.1 and ask from a browser here; its requests name that host.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, token: str | None):
        self._app, self._hosts = app, hosts
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif problem := self._problem(scope):
            await problem_response(problem)(scope, receive, send)
        else:
            await self._app(scope, _limited(receive), send)

    def _problem(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self._hosts is not None and host not in self._hosts:
            return Problem(403, f"this server is {' or '.join(sorted(self._hosts))}, not {host!r}", code="wrong_host")
        if self._token is not None and scope["path"] not in OPEN_PATHS:
            kind, _, token = headers.get("authorization", "").partition(" ")
            # a header's bytes are decoded as Latin-1
            if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), self._token):
                return Problem(401, "this server wants its token, as Authorization: Bearer …", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > LONGEST_BODY:
            return Problem(413, TOO_LONG)
        return None


TOO_LONG = f"a body may have {LONGEST_BODY:,} bytes"


def _limited(receive: Receive) -> Receive:
    """For bodies that do not say how long they are."""
    length = 0

    async def counted() -> Message:
        nonlocal length
        message = await receive()
        length += len(message.get("body", b""))
        if length > LONGEST_BODY:
            raise HTTPException(413, TOO_LONG)
        return message

    return counted


def problem_response(problem: Problem) -> Response:
    """In OpenAI's shape."""
    return Response(to_json(problem.as_json()), problem.status, problem.headers, "application/json")
