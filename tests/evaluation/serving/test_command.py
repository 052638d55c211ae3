"""`derta serve`: what it refuses to begin with, and how a process of it begins and ends."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from derta_jax.cli import main
from derta_jax.errors import UserError
from derta_jax.evaluation.serving.server import address_of, context_of, is_loopback, listener
from derta_jax.evaluation.serving.settings import Serving
from tests.evaluation.serving.conftest import CONTEXT, running

USER = [{"role": "user", "content": "How do I make kite 1?"}]


@pytest.fixture
def refused(talker, monkeypatch, capsys):
    """What `derta serve` says when it ends with 2, without a model having been read."""
    monkeypatch.delenv("DERTA_TOKEN", raising=False)

    def run(*options, model=talker):
        assert main(["serve", str(model), *options]) == 2
        out, err = capsys.readouterr()
        assert "loaded" not in out
        return err

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 --port 8000 can be reached from other machines: set DERTA_TOKEN"),
        (["--host", "::"], "can be reached from other machines"),
        (["--token", ""], "the token must be of printable ASCII characters, and not empty"),
        (["--token", "ö"], "the token must be of printable ASCII"),
        (["--host", "no.such.host.invalid"], "there is no such host"),
        (["--host", "192.0.2.1", "--token", "t"], "--host 192.0.2.1 --port 8000: Cannot assign requested address"),
        (["--port", "65536"], "--port must be 0 to 65535"),
        (["--queue", "-1"], "--queue must not be negative"),
        (["--grace", "-1"], "--grace must be a number of seconds"),
        (["--grace", "inf"], "--grace must be a number of seconds"),
        (["--context", "1"], "--context must hold a prompt and an answer"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--template", "no place"], "--template must be `chat` or contain {prompt} once"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_said_before_a_model_is_loaded(refused, options, message):
    if options == ["--host", "::"] and not socket.has_ipv6:
        pytest.skip("no IPv6")
    assert message in refused(*options)


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: Address already in use" in refused("--port", port)


def test_no_model_is_no_server(refused, tmp_path):
    assert str(tmp_path / "nothing") in refused("--port", "0", model=tmp_path / "nothing")


def test_a_context_is_at_most_what_the_model_was_made_for(subject, refused):
    config = subject.source.config
    assert context_of(None, config) == CONTEXT
    assert context_of(100, config) == 100
    with pytest.raises(UserError, match=f"--context {CONTEXT + 1}: the model was made for {CONTEXT} positions"):
        context_of(CONTEXT + 1, config)


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("::1", "[::1]")])
def test_loopback_needs_no_token(host, name):
    try:
        bound = listener(Serving(host=host, port=0))
    except UserError as error:
        pytest.skip(f"this machine has no {host}: {error}")
    with bound:
        assert is_loopback(bound)
        assert re.fullmatch(rf"http://{re.escape(name)}:\d+", address_of(host, bound))


# A process


@pytest.fixture
def start(talker, tmp_path):
    """Starts `derta serve` as a process of its own: the process, its address and what it said."""
    started = []

    def run(*options, **environment):
        command = [sys.executable, "-m", "derta_jax.cli", "serve", str(talker), "--port", "0", "--batch-size", "8"]
        with (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [*command, "--dtype", "float32", "--template", "chat", *options],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"COLUMNS": "40"} | environment,
            )
        started.append(process)
        assert process.stdout
        said = ""
        while "Ctrl-C" not in said:
            line = process.stdout.readline()
            assert line, (tmp_path / "stderr").read_text()
            said += line
        (url,) = set(re.findall(r"http://[\w.]+:\d+", said))
        return process, url, said

    yield run
    for process in started:
        process.kill()
        process.communicate()


def in_background(function, *args, **options):
    """The result of a call in a thread, as a list that it will be in."""
    results: list = []
    thread = threading.Thread(target=lambda: results.append(function(*args, **options)))
    thread.start()
    return thread, results


def wait_until_running(url, count=1):
    end = time.monotonic() + 20
    while httpx.get(f"{url}/health").json()["running"] < count:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_lets_what_has_begun_finish_takes_no_more_and_ends_with_0(start, tmp_path):
    process, url, _ = start()
    body = {"messages": USER, "max_tokens": 600, "temperature": 0}
    thread, results = in_background(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=60)
    wait_until_running(url)
    process.terminate()
    end = time.monotonic() + 10
    while (health := httpx.get(f"{url}/health")).status_code == 200:
        assert time.monotonic() < end
    assert (health.status_code, health.json()["status"]) == (503, "stopping")
    late = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert (late.status_code, late.json()["error"]["message"]) == (503, "the server is stopping")
    thread.join()
    assert results[0].json()["usage"]["completion_tokens"] == 600
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.slow
def test_what_takes_longer_than_the_grace_period_is_broken_off(start):
    process, url, _ = start("--grace", "0.2", "--name", "other")
    body = {"messages": USER, "max_tokens": 1900, "temperature": 0, "n": 4}
    whole, results = in_background(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=60)
    stream, events = in_background(httpx.post, f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=60)
    wait_until_running(url, 8)
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "other"
    process.terminate()
    assert process.wait(timeout=20) == 0
    whole.join()
    stream.join()
    assert results[0].status_code == 503
    last = events[0].text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_the_token_is_that_of_the_environment(start):
    process, url, said = start(DERTA_TOKEN="open-sesame")
    headers = {"Authorization": "Bearer open-sesame"}
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
    body = {"messages": USER, "max_tokens": 1900, "temperature": 0}
    thread, results = in_background(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=60, headers=headers)
    wait_until_running(url)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    thread.join()
    assert results[0].status_code == 503
    assert "open-sesame" not in said


def test_the_example_that_is_printed_works(subject):
    with running(subject) as server:
        (line,) = [line for line in server.said.getvalue().splitlines() if line.strip().startswith("curl ")]
        words = shlex.split(line)
        body = json.loads(words[words.index("-d") + 1])
        assert words[1] == f"{server.url}/v1/chat/completions"
        assert server.post("/v1/chat/completions", body).status_code == 200
