"""From a model to a server that answers, and back: sockets, signals, and what is said on the way."""

import ipaddress
import json
import shlex
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import jax
import uvicorn
from rich.console import Console

from derta_jax.errors import RunFailed, UserError
from derta_jax.evaluation.generate import SMALLEST_BUCKET, Batch, bucket
from derta_jax.evaluation.serving.app import Service, make_app
from derta_jax.evaluation.serving.engine import Engine
from derta_jax.evaluation.serving.guard import Guard
from derta_jax.evaluation.serving.settings import Serving
from derta_jax.evaluation.subject import Generation, Subject, open_subject
from derta_jax.models.config import ModelConfig

USUAL_CONTEXT = 4096
EXAMPLE = "How do I make a kite?"
LAST_WORDS = 5
"""Seconds to send what is answered, once the devices are done."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Server(uvicorn.Server):
    """The first Ctrl-C or SIGTERM lets the engine finish, and then the server ends; the second ends both at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float, when_ready: Callable[[], None]):
        super().__init__(config)
        self._engine, self._grace, self._when_ready = engine, grace, when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._when_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What uvicorn calls for a signal."""
        if self._engine.closing:
            self._engine.close(0)
            self.should_exit = self.force_exit = True
        else:
            self._engine.close(self._grace)

    def end(self) -> None:
        """Send what is left to be sent, and stop listening."""
        self.should_exit = True


def run(model: str, generation: Generation, serving: Serving, console: Console) -> None:
    """Serve until a signal. Raises `RunFailed` where the devices are lost on the way."""
    with listener(serving) as listening:
        subject = open_subject(model, generation, console)
        context = context_of(serving.context, subject.source.config)
        service, lengths = prepare(subject, served_name(model, serving), generation.batch_size, context, serving.queue)
        answer(service, serving, listening, lengths, console)


def answer(
    service: Service, serving: Serving, listening: socket.socket, compiled: Sequence[int], console: Console
) -> None:
    """Answer at a bound socket until a signal; `compiled` lengths of prompts do not wait for their program."""
    address = address_of(serving.host, listening)
    hosts = {*LOOPBACK, address.partition("://")[2].rpartition(":")[0]} if is_loopback(listening) else None
    config = uvicorn.Config(
        Guard(make_app(service), hosts, serving.token),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_WORDS,
    )

    def say_ready() -> None:
        text = welcome(service, address, compiled, serving.token is not None)
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    server = Server(config, service.engine, serving.grace, say_ready)
    service.engine.start(when_over=server.end)
    try:
        server.run([listening])
    except OSError as error:
        raise UserError(f"{address}: {error.strerror}") from error
    finally:
        service.engine.close(0)
        service.engine.join()
    if service.engine.failure:
        raise RunFailed(f"the devices were lost: {service.engine.failure}")


def prepare(subject: Subject, name: str, slots: int, context: int, queue: int) -> tuple[Service, list[int]]:
    """A service that has compiled what its shortest prompts and its example need, and their padded lengths."""

    def new_batch() -> Batch:
        return Batch(subject.model, subject.params, subject.stop_ids, slots, context)

    example = subject.tokenizer.prompt_ids(subject.template.render(EXAMPLE))
    lengths = [length for length in (1, len(example)) if length + 2 <= context]
    try:
        engine = Engine(new_batch, subject.mesh, queue)
        engine.warm_up(lengths)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the devices have no room for {slots} answers of {context:,} tokens: lower --batch-size or --context"
        ) from error
    return Service(subject, engine, name, context), sorted({bucket(length) for length in lengths})


def context_of(asked: int | None, config: ModelConfig) -> int:
    """How many tokens a prompt and its answer may have."""
    if asked is not None and asked > config.max_positions:
        raise UserError(f"--context {asked}: the model was made for {config.max_positions} positions")
    return asked or min(config.max_positions, USUAL_CONTEXT)


def served_name(model: str, serving: Serving) -> str:
    """Of a directory its own name, of anything else what it is called by."""
    return serving.name or (Path(model).resolve().name if Path(model).is_dir() else model)


def listener(serving: Serving) -> socket.socket:
    """A socket at the address, bound but not yet listening. Raises `UserError` where that cannot be, or should not."""
    where = f"--host {serving.host} --port {serving.port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(serving.host, serving.port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"{where}: there is no such host ({error})") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        if serving.token is None and not is_loopback(bound):
            raise UserError(f"{where} can be reached from other machines: set DERTA_TOKEN, or give --token")
    except OSError as error:
        bound.close()
        raise UserError(f"{where}: {error.strerror}") from error
    except UserError:
        bound.close()
        raise
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def address_of(host: str, bound: socket.socket) -> str:
    """As a URL, with the port that was found where 0 was asked for."""
    return f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"


def welcome(service: Service, address: str, compiled: Sequence[int], with_token: bool) -> str:
    """Where the server is, and how to try it."""
    body = {"messages": [{"role": "user", "content": EXAMPLE}], "max_tokens": 64}
    token = ' -H "Authorization: Bearer $DERTA_TOKEN"' if with_token else ""
    padded = " and ".join(map(str, compiled))
    return f"""\
{service.model} answers at {address}/v1: {service.engine.load.slots} at a time, {service.context:,} tokens of context.

  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{token} -d {shlex.quote(json.dumps(body))}

Prompts are padded to a power of two, {SMALLEST_BUCKET} at least. Those of {padded} are compiled; the first of each
other length waits for its program, and what runs waits with it. Ctrl-C finishes what has begun."""
