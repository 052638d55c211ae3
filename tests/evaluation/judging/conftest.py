"""A small HTTP server that answers as an OpenAI-compatible endpoint does, or as it should not."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class FakeEndpoint:
    """`answer(prompt, attempt)` gives (status, headers, body); `requests` keeps what was asked of it, in order."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answer: Callable[[str, int], tuple[int, dict[str, str], Any]] = lambda prompt, attempt: said("safe")


def said(text: str) -> tuple[int, dict[str, str], Any]:
    """A completion, for chat and for text alike."""
    return 200, {}, {"choices": [{"message": {"content": text}, "text": text}]}


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setenv("NO_PROXY", "*")
    fake, lock = FakeEndpoint(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
            with lock:
                attempt = sum(earlier["asked"] == prompt for earlier in fake.requests) + 1
                fake.requests.append({**body, "asked": prompt, "path": self.path})
                fake.headers.append(dict(self.headers))
            status, headers, content = fake.answer(prompt, attempt)
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that did not wait is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()
