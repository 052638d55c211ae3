"""What the server does not answer: bodies with something wrong, strangers, and what is too long."""

import socket

import httpx
import openai
import pytest

from derta_jax.evaluation.serving.guard import LONGEST_BODY
from tests.evaluation.serving.conftest import CONTEXT, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "How?"}]


def problem_of(response):
    """The status, and the error in OpenAI's shape."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return response.status_code, error


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"top_p": 0.9}, "top_p", "top_p is not supported: leave it out, or give 1"),
        ({"top_k": 40}, "top_k", "top_k is not supported: leave it out, or give -1 or 0"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"presence_penalty": -1}, "presence_penalty", "not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
        ({"logit_bias": {"50": 1}}, "logit_bias", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported: leave it out, or give False"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"temprature": 1}, "temprature", "there is no parameter 'temprature'; did you mean 'temperature'?"),
        ({"temperature": -0.1}, "temperature", "temperature: Input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "are one thing"),
        ({"n": 0}, "n", "n: Input should be greater"),
        ({"n": 200}, "n", "n: Input should be less"),
        ({"seed": "one"}, "seed", "valid integer"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ["x" * 257]}, "stop[0]", "at most 256 characters"),
        ({"stop": 5}, "stop", "valid list"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "Field required"),
        ({"messages": "How?"}, "messages", "valid list"),
        ({"messages": ["How?"]}, "messages[0]", "valid dictionary"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "valid string"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content", "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]", "only text can be read"),
        ({"messages": [{**USER[0], "name": "Ada {x}"}]}, "messages[0]", "a message cannot have 'name' here"),
        ({"continue_final_message": True}, "continue_final_message", "only the assistant's last message"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "either the last message goes on"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
        ({"\ud800{param}": 1}, r"\ud800{param}", "there is no parameter"),
    ],
    ids=lambda value: str(sorted(value))[:40] if isinstance(value, dict) else "",
)
def test_a_bad_parameter_is_named(server, change, param, message):
    status, error = problem_of(server.post(CHAT, {"messages": USER} | change))
    assert status == 400
    assert message in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "Field required"),
        ({"prompt": []}, "prompt", "text, token ids, or a list"),
        ({"prompt": [1, "a"]}, "prompt", "text, token ids, or a list"),
        ({"prompt": ["a", "\udc00"]}, "prompt", "text, token ids, or a list"),
        ({"prompt": [[]]}, "prompt", "the prompt has no tokens"),
        ({"prompt": [1, 10**6]}, "prompt", "the model has tokens 0 to "),
        ({"prompt": [-1]}, "prompt", "not -1"),
        ({"prompt": "a", "logprobs": 0}, "logprobs", "not supported: leave it out"),
        ({"prompt": "a", "echo": True}, "echo", "not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of", "not supported"),
        ({"prompt": "a", "messages": USER}, "messages", "there is no parameter 'messages'"),
    ],
    ids=str,
)
def test_a_bad_completion_is_named(server, body, param, message):
    status, error = problem_of(server.post(COMPLETIONS, body))
    assert (status, error["param"]) == (400, param)
    assert message in error["message"]


def test_what_changes_nothing_is_passed_over(server):
    harmless = {
        "top_p": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "stop": None,
        "seed": None,
        "n": None,
        "temperature": None,
        "user": "ada",
        "metadata": {"a": "b"},
        "store": True,
    }
    turns: list[dict] = [{**USER[0], "name": None, "tool_calls": []}]
    assert server.post(CHAT, {"messages": turns, "max_tokens": 1} | harmless).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"{", "application/json", "the body is not JSON"),
        (b"", "application/json", "the body must be a JSON object"),
        (b"[1]", "application/json", "the body must be a JSON object"),
        (b'{"messages": "\xff"}', "application/json", "parsing the body"),
        (b"[" * 100_000, "application/json", "parsing the body"),
        (b'{"messages": [{"role": "user", "content": "How?"}]}', "text/plain", "Content-Type: application/json"),
    ],
    ids=["cut", "empty", "list", "not UTF-8", "deep", "as a form of a web page would send it"],
)
def test_a_body_that_is_no_json_object(server, content, kind, message):
    response = httpx.post(server.url + CHAT, content=content, headers={"Content-Type": kind})
    status, error = problem_of(response)
    assert status == 400
    assert message in error["message"]


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "How?"})])
def test_what_exceeds_the_context_is_refused_with_numbers(server, path, prompt):
    status, error = problem_of(server.post(path, prompt | {"max_tokens": CONTEXT}))
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith(f"this server's context is {CONTEXT:,} tokens, which the prompt's ")
    assert error["message"].endswith(f"the {CONTEXT:,} of max_tokens exceed")
    assert error["param"] == next(iter(prompt))


def test_a_prompt_may_fill_the_context_up_to_one_token(server, subject):
    room = CONTEXT - 1
    assert server.post(COMPLETIONS, {"prompt": [5] * room, "max_tokens": 1}).status_code == 200
    status, error = problem_of(server.post(COMPLETIONS, {"prompt": [5] * CONTEXT, "max_tokens": 1}))
    assert status == 400
    assert f"the prompt's {CONTEXT:,} and" in error["message"]
    status, error = problem_of(server.post(CHAT, {"messages": [{"role": "user", "content": "kite " * CONTEXT}]}))
    assert "and an answer exceed" in error["message"]


def test_another_models_name_is_404(server):
    status, error = problem_of(server.post(CHAT, {"messages": USER, "model": "gpt-4"}))
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert "'talker'" in error["message"]
    with server.client() as client, pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")


def test_other_paths_and_methods_are_refused_in_the_same_shape(server):
    assert problem_of(httpx.get(f"{server.url}/v1/embeddings"))[0] == 404
    assert problem_of(httpx.get(server.url + CHAT))[0] == 405
    assert problem_of(httpx.get(f"{server.url}/docs"))[0] == 404


# Strangers


@pytest.mark.parametrize("host", ["example.org", "example.org:8000", "localhost.example.org", "", "127.0.0.1.nip.io"])
def test_a_page_whose_name_resolves_to_this_machine_is_refused(server, host):
    status, error = problem_of(httpx.get(f"{server.url}/v1/models", headers={"Host": host}))
    assert (status, error["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LOCALHOST:1", "[::1]:8000"])
def test_this_machine_has_several_names(server, host):
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200


def test_no_page_of_another_origin_may_read_answers(server):
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    response = httpx.options(server.url + CHAT, headers=headers)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert "server" not in response.headers


@pytest.fixture(scope="module")
def guarded(subject):
    with running(subject, token="open-sesame", host="0.0.0.0") as server:
        yield server


@pytest.mark.parametrize("token", [None, "-", "open", "open-sesame2", "öpen", "Bearer open-sesame"])
def test_a_wrong_token_is_401(guarded, token):
    headers = {} if token is None else {b"Authorization": f"Bearer {token}".encode("latin-1")}
    response = httpx.get(f"{guarded.url}/v1/models", headers=headers)
    status, error = problem_of(response)
    assert (status, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert "sesame" not in response.text


def test_the_right_token_is_let_in_from_any_host(guarded):
    with guarded.client(api_key="open-sesame") as client:
        assert client.completions.create(model="talker", prompt="a", max_tokens=1).usage.completion_tokens <= 1
    with guarded.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    headers = {"Host": "example.org", "Authorization": "bearer open-sesame"}
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200
    assert "$DERTA_TOKEN" in guarded.said.getvalue()
    assert "sesame" not in guarded.said.getvalue()


def test_health_needs_no_token(guarded):
    assert guarded.load()["status"] == "ok"


# Bodies that are too long


def test_a_body_that_says_it_is_too_long_is_not_read(server):
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {LONGEST_BODY + 1}\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_say_how_long_it_is_ends_where_it_gets_too_long(server):
    def parts():
        yield b'{"messages": "'
        for _ in range(LONGEST_BODY // 2**16 + 1):
            yield b"x" * 2**16

    headers = {"Content-Type": "application/json"}
    status, error = problem_of(httpx.post(server.url + CHAT, content=parts(), headers=headers, timeout=60))
    assert status == 413
    assert f"{LONGEST_BODY:,} bytes" in error["message"]


def test_nothing_of_all_this_is_still_running(server):
    assert server.load() == {"status": "ok", "running": 0, "waiting": 0, "slots": 8}
