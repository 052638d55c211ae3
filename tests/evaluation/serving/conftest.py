"""A small model behind a real server, on a free port of this machine, in a thread of the test."""

import contextlib
import dataclasses
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from rich.console import Console

from derta_jax.data.template import Template
from derta_jax.evaluation.serving.app import Service
from derta_jax.evaluation.serving.server import address_of, answer, listener, prepare
from derta_jax.evaluation.serving.settings import Serving
from derta_jax.evaluation.subject import Generation, Subject, open_subject
from tests.conftest import write_tiny_model, write_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONTEXT = 2048
SLOTS = 8
QUEUE = 40


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    service: Service
    said: io.StringIO

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(**self._client_options | options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._client_options)

    @property
    def _client_options(self) -> dict:
        return {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}

    def post(self, path: str, body, **options) -> httpx.Response:
        """With `body` as JSON, in which half a surrogate pair is escaped."""
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{self.url}{path}", content=json.dumps(body), headers=headers, timeout=60, **options)

    def load(self) -> dict:
        return httpx.get(f"{self.url}/health").json()

    def wait_for(self, condition: Callable[[dict], bool], seconds: float = 10) -> dict:
        """The server's load, as soon as it is as it should be."""
        end = time.monotonic() + seconds
        while not condition(load := self.load()):
            assert time.monotonic() < end, load
            time.sleep(0.01)
        return load


@pytest.fixture(scope="module", autouse=True)
def no_proxy() -> Iterator[None]:
    """Until the module ends: JAX says at length that it does not like it where processes meet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        yield


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """The directory of a model with a chat template, which answers at length."""
    directory = tmp_path_factory.mktemp("models") / "talker"
    write_tiny_model(directory, max_position_embeddings=CONTEXT)
    write_tokenizer(directory, CHAT)
    return directory


@pytest.fixture(scope="session")
def subject(talker) -> Subject:
    return open_subject(talker, Generation(1, SLOTS, "chat", "float32"), Console(quiet=True))


@pytest.fixture(scope="session")
def instructed(subject) -> Subject:
    """The same model in a template of text."""
    return dataclasses.replace(subject, template=Template("[INST] {prompt} [\\INST]", subject.tokenizer))


@contextlib.contextmanager
def running(subject: Subject, slots: int = SLOTS, context: int = CONTEXT, **options) -> Iterator[Running]:
    defaults: dict[str, Any] = {"port": 0, "name": "talker", "queue": QUEUE, "grace": 0}
    serving = Serving(**defaults | options)
    listening, said = listener(serving), io.StringIO()
    service, compiled = prepare(subject, serving.name or "", slots, context, serving.queue)
    console = Console(file=said, width=200)
    thread = threading.Thread(target=answer, args=(service, serving, listening, compiled, console))
    url = address_of(serving.host, listening)
    thread.start()
    try:
        while "Ctrl-C" not in said.getvalue():
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(url, service, said)
    finally:
        service.engine.close(0)
        thread.join()


@pytest.fixture(scope="module")
def server(subject) -> Iterator[Running]:
    with running(subject) as server:
        yield server


@pytest.fixture(scope="module")
def instructed_server(instructed) -> Iterator[Running]:
    with running(instructed) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
