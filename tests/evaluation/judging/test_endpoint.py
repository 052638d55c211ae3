"""An endpoint that fails is asked again; what it never answers has no text, and our own mistakes end it at once."""

import email.utils
import itertools
import threading
import time

import pytest

from derta_jax.errors import UserError
from derta_jax.evaluation.judging.endpoint import ask_endpoint
from derta_jax.evaluation.judging.judge_file import Endpoint
from tests.evaluation.judging.conftest import said

QUICKLY = 0.01


def ask(endpoint, prompts, **keys):
    keys = {"url": endpoint.url, "model": "m", "concurrency": 2, "retries": 2} | keys
    return ask_endpoint(Endpoint(**keys), prompts, first_wait=QUICKLY)


def test_replies_come_in_the_order_of_the_prompts(endpoint):
    def slow_for_the_first(prompt, attempt):
        time.sleep(0.1 if prompt == "0" else 0)
        return said(f"reply to {prompt}")

    endpoint.answer = slow_for_the_first
    seen: list[int] = []
    settings = Endpoint(url=endpoint.url, model="m", concurrency=3)
    replies = ask_endpoint(settings, [str(number) for number in range(7)], progress=seen.append)
    assert [reply.text for reply in replies] == [f"reply to {number}" for number in range(7)]
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_the_prompt_is_a_users_message_with_model_parameters_and_key(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " secret\n")
    ask(endpoint, ["Is it safe?"], api_key_env="JUDGE_KEY", parameters={"max_completion_tokens": 5})
    (request,) = endpoint.requests
    assert request["messages"] == [{"role": "user", "content": "Is it safe?"}]
    assert request["model"] == "m"
    assert request["max_completion_tokens"] == 5
    assert "temperature" not in request
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"


def test_completions_get_the_text_as_it_is(endpoint):
    url = endpoint.url.replace("/chat", "")
    (reply,) = ask(endpoint, ["[INST] Is it safe? [/INST]"], url=url)
    (request,) = endpoint.requests
    assert reply.text == "safe"
    assert request["prompt"] == "[INST] Is it safe? [/INST]"
    assert request["path"] == "/v1/completions"
    assert (request["temperature"], request["max_tokens"]) == (0, 512)


def test_no_more_requests_at_a_time_than_allowed(endpoint):
    now, most, lock = 0, 0, threading.Lock()

    def busy(prompt, attempt):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return said("safe")

    endpoint.answer = busy
    ask(endpoint, [str(number) for number in range(9)], concurrency=3)
    assert most == 3


@pytest.mark.parametrize(
    "failure",
    [
        (500, {}, b"oops"),
        (503, {}, {}),
        (429, {}, {"error": "slow down"}),
        (408, {}, b""),
        (200, {}, b"<html>not JSON</html>"),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"message": {"content": None}}]}),
        (200, {}, ["a list"]),
    ],
)
def test_a_failure_that_may_pass_is_tried_again_and_then_has_no_text(endpoint, failure):
    endpoint.answer = lambda prompt, attempt: failure if prompt == "bad" or attempt < 3 else said("safe")
    first, bad, last = ask(endpoint, ["one", "bad", "three"])
    assert (first.text, last.text) == ("safe", "safe")
    assert bad.text is None
    assert bad.problem
    assert [request["asked"] for request in endpoint.requests].count("bad") == 3


def test_an_endpoint_that_is_too_slow_is_tried_again(endpoint):
    def sluggish(prompt, attempt):
        time.sleep(0.6 if attempt == 1 else 0)
        return said("safe")

    endpoint.answer = sluggish
    assert ask(endpoint, ["one"], timeout=0.3)[0].text == "safe"
    (never,) = ask(endpoint, ["two"], timeout=0.3, retries=0)
    assert never.problem == "no reply within 0.3 s"


def test_nobody_listens(endpoint):
    (reply,) = ask(endpoint, ["one"], url="http://127.0.0.1:1/v1/chat/completions", retries=1)
    assert reply.text is None
    assert (reply.problem or "").startswith("no reply")


@pytest.mark.parametrize("after", ["0.3", "date"])
def test_it_waits_as_long_as_it_is_asked_to(endpoint, after):
    if after == "date":
        # dates have whole seconds
        while time.time() % 1 > 0.6:
            time.sleep(0.05)
        after = email.utils.formatdate(int(time.time()) + 1, usegmt=True)
    endpoint.answer = lambda prompt, attempt: (429, {"Retry-After": after}, {}) if attempt == 1 else said("safe")
    started = time.monotonic()
    assert ask(endpoint, ["one"])[0].text == "safe"
    assert 0.25 < time.monotonic() - started < 10


@pytest.mark.parametrize("after", ["3600", "inf"])
def test_nobody_waits_for_an_hour(endpoint, after):
    endpoint.answer = lambda prompt, attempt: (429, {"Retry-After": after}, {})
    assert (ask(endpoint, ["one"])[0].problem or "").startswith("status 429")
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("after", ["soon", "-5", "nan", "Mon, 99 Nov 2026"])
def test_a_retry_after_that_makes_no_sense_asks_for_nothing(endpoint, after):
    endpoint.answer = lambda prompt, attempt: (429, {"Retry-After": after}, {}) if attempt == 1 else said("safe")
    assert ask(endpoint, ["one"])[0].text == "safe"


def test_the_waits_grow_from_try_to_try(endpoint):
    times: list[float] = []

    def failing(prompt, attempt):
        times.append(time.monotonic())
        return 500, {}, {}

    endpoint.answer = failing
    ask_endpoint(Endpoint(url=endpoint.url, model="m", retries=3), ["one"], first_wait=0.1)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    for attempt, wait in enumerate(waits):
        assert 0.05 * 2**attempt < wait < 0.1 * 2**attempt + 1


def test_a_prompt_that_cannot_be_asked_is_not_tried_again(endpoint):
    endpoint.answer = lambda prompt, attempt: (
        (400, {}, {"error": "context too long"}) if prompt == "long" else said("x")
    )
    long, short = ask(endpoint, ["long", "short"])
    assert long.problem == 'status 400: {"error": "context too long"}'
    assert short.text == "x"
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("status", "message"), [(401, "key"), (403, "key"), (404, "no such address or model"), (405, "not an address")]
)
def test_our_own_mistakes_are_told_at_once(endpoint, status, message):
    endpoint.answer = lambda prompt, attempt: (status, {}, {"error": "no"})
    with pytest.raises(UserError, match=f"answers {status}: .*{message}"):
        ask(endpoint, [str(number) for number in range(50)])
    assert len(endpoint.requests) <= 2


def test_a_mistake_does_not_wait_for_those_that_try_again(endpoint):
    endpoint.answer = lambda prompt, attempt: (401, {}, {}) if prompt == "b" else (429, {"Retry-After": "60"}, {})
    started = time.monotonic()
    with pytest.raises(UserError, match="401"):
        ask(endpoint, ["a", "b"])
    assert time.monotonic() - started < 30


def test_a_moved_endpoint_says_where_to(endpoint):
    endpoint.answer = lambda prompt, attempt: (307, {"Location": "http://elsewhere/v1/completions"}, {})
    with pytest.raises(UserError, match="has moved to http://elsewhere/v1/completions"):
        ask(endpoint, ["one"])


def test_an_unknown_host_is_a_mistake(endpoint):
    with pytest.raises(UserError, match=r"no host judge\.invalid is known"):
        ask(endpoint, ["one"], url="http://judge.invalid/v1/chat/completions")


@pytest.mark.parametrize(
    ("key", "message"), [(None, "JUDGE_KEY is not set"), ("  ", "is not set"), ("a\nb", "else than")]
)
def test_a_key_that_is_none_is_a_mistake_and_is_not_shown(endpoint, monkeypatch, key, message):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(UserError, match=message) as refused:
        ask(endpoint, ["one"], api_key_env="JUDGE_KEY")
    assert "a\nb" not in str(refused.value)
    assert not endpoint.requests


def test_half_a_character_is_asked_as_a_question_mark(endpoint):
    ask(endpoint, ["broken \ud800"])
    assert endpoint.requests[0]["asked"] == "broken ?"


def test_nothing_to_ask(endpoint):
    assert ask(endpoint, []) == []
