"""The routes of an OpenAI-compatible server."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from derta_jax.evaluation import generate
from derta_jax.evaluation.serving.answering import Answering
from derta_jax.evaluation.serving.engine import Engine
from derta_jax.evaluation.serving.guard import problem_response
from derta_jax.evaluation.serving.problems import Problem, first_problem, to_json
from derta_jax.evaluation.serving.prompts import chat_requests, completion_requests
from derta_jax.evaluation.serving.protocol import Asked, ChatAsked, CompletionAsked
from derta_jax.evaluation.serving.replies import CHAT, COMPLETION, Form, Reply
from derta_jax.evaluation.subject import Subject


@dataclasses.dataclass(frozen=True)
class Service:
    """What answers: `subject` under the name `model`, in `context` tokens."""

    subject: Subject
    engine: Engine
    model: str
    context: int

    async def reply(
        self, asked: Asked, form: Form, requests: Callable[[], Sequence[generate.Request]]
    ) -> "AnswerResponse":
        """Requests are made in another thread: a prompt may be long."""
        if asked.model not in (None, self.model):
            raise Problem(404, f"this server has the model {self.model!r} alone", "model", "model_not_found")
        made = await asyncio.to_thread(requests)
        answering = Answering(self.engine, self.subject.tokenizer, made, asked.stop)
        prompt_tokens = sum(len(request.prompt_ids) for request in made[:: asked.n])
        reply = Reply(answering, form, self.model, prompt_tokens, asked.stream_options.include_usage)
        if asked.stream:
            return AnswerResponse(answering, reply.stream(), "text/event-stream")
        return AnswerResponse(answering, reply.whole(), "application/json")


class AnswerResponse(Response):
    """Sends `chunks` until they end or the client is gone; whichever it is, nothing of `answering` stays behind.

    Begins with the first chunk, so that what goes wrong before it has a status of its own.
    """

    def __init__(self, answering: Answering, chunks: AsyncIterator[bytes], media_type: str):
        self._answering, self._chunks = answering, chunks
        super().__init__(None, 200, {"Cache-Control": "no-store"}, media_type)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._answering.cancel()
            sending.cancel()
            leaving.cancel()

    async def _send(self, send: Send) -> None:
        started = False
        async for chunk in self._chunks:
            if not started:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                started = True
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service) -> FastAPI:
    """Without pages of documentation, which would load scripts from elsewhere."""
    app = FastAPI(title="derta serve", docs_url=None, redoc_url=None)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatAsked) -> Response:
        return await service.reply(asked, CHAT, lambda: chat_requests(asked, service.subject, service.context))

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked) -> Response:
        return await service.reply(
            asked, COMPLETION, lambda: completion_requests(asked, service.subject, service.context)
        )

    @app.get("/v1/models")
    async def models() -> Response:
        model = {
            "id": service.model,
            "object": "model",
            "created": started,
            "owned_by": "derta_jax",
            "max_model_len": service.context,
        }
        return Response(to_json({"object": "list", "data": [model]}), media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        status = "stopping" if service.engine.closing else "ok"
        body = {"status": status} | dataclasses.asdict(service.engine.load)
        return Response(to_json(body), 503 if service.engine.closing else 200, media_type="application/json")

    _tell_problems(app)
    return app


def _tell_problems(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Response:
        return problem_response(problem)

    @app.exception_handler(RequestValidationError)
    async def on_bad_body(request: Request, error: RequestValidationError) -> Response:
        return problem_response(first_problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        return problem_response(Problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def on_our_mistake(request: Request, error: Exception) -> Response:
        return problem_response(Problem(500, "the server made a mistake: its log says which"))
