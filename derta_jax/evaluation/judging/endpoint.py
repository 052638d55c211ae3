"""Texts to an OpenAI-compatible endpoint and back: several at a time, patient with its failures, blunt about ours."""

import email.utils
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import httpx

from derta_jax.errors import UserError
from derta_jax.evaluation.judging.judge_file import Endpoint

LONGEST_WAIT = 600.0
"""Seconds. An endpoint that asks us to wait longer leaves the answer unjudged."""

OUR_MISTAKES = {
    401: "it does not accept the key",
    403: "it does not accept the key, or the key may not use the model",
    404: "it knows no such address or model",
    405: "it is not an address to send questions to",
}


@dataclass(frozen=True)
class Reply:
    """`text` is what the model said; where it said nothing, `problem` is why."""

    text: str | None = None
    problem: str | None = None


class _TryAgain(Exception):
    """A failure that may pass, and for how many seconds the endpoint asked us to wait."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


def ask_endpoint(
    endpoint: Endpoint,
    prompts: Sequence[str],
    progress: Callable[[int], None] = lambda done: None,
    first_wait: float = 1.0,
) -> list[Reply]:
    """A reply to each prompt, in order; `progress` is told how many are done.

    What times out, is rate-limited, fails or makes no sense is tried again, `endpoint.retries` times, after twice the
    wait each time (`first_wait` seconds, less up to a half by chance) and not before Retry-After. A wrong key, address
    or host raises `UserError` at once.
    """
    headers = _headers(endpoint)
    stop = threading.Event()
    replies: list[Reply] = [Reply()] * len(prompts)
    with (
        httpx.Client(headers=headers, timeout=endpoint.timeout) as client,
        ThreadPoolExecutor(endpoint.concurrency) as pool,
    ):
        asking = {
            pool.submit(_ask_patiently, client, endpoint, prompt, first_wait, stop): index
            for index, prompt in enumerate(prompts)
        }
        try:
            for done, future in enumerate(as_completed(asking), start=1):
                replies[asking[future]] = future.result()
                progress(done)
        except BaseException:
            # nobody waits for the others: those that sleep wake up, those that have not begun never do
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return replies


def _headers(endpoint: Endpoint) -> dict[str, str]:
    if endpoint.api_key_env is None:
        return {}
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise UserError(f"endpoint.api_key_env: the environment variable {endpoint.api_key_env} is not set")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"endpoint.api_key_env: {endpoint.api_key_env} holds something else than a key")
    return {"Authorization": f"Bearer {key}"}


def _ask_patiently(
    client: httpx.Client, endpoint: Endpoint, prompt: str, first_wait: float, stop: threading.Event
) -> Reply:
    """Several tries, between which `stop` wakes it up; a mistake of ours stops all others."""
    problem = "not asked"
    for attempt in range(endpoint.retries + 1):
        if stop.is_set():
            break
        try:
            return _ask_once(client, endpoint, prompt)
        except UserError:
            stop.set()
            raise
        except _TryAgain as failure:
            problem = str(failure)
            if attempt == endpoint.retries or failure.wait > LONGEST_WAIT:
                break
            backoff = first_wait * 2**attempt * random.uniform(0.5, 1.0)
            stop.wait(min(LONGEST_WAIT, max(failure.wait, backoff)))
    return Reply(problem=problem)


def _ask_once(client: httpx.Client, endpoint: Endpoint, prompt: str) -> Reply:
    try:
        response = client.post(endpoint.url, json=_request(endpoint, prompt))
    except httpx.TimeoutException as error:
        raise _TryAgain(f"no reply within {endpoint.timeout:g} s") from error
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise UserError(f"endpoint.url: {endpoint.url}: {error}") from error
    except httpx.HTTPError as error:
        if _is_unknown_host(error):
            raise UserError(f"endpoint.url: no host {httpx.URL(endpoint.url).host} is known ({error})") from error
        raise _TryAgain(f"no reply: {error or type(error).__name__}") from error
    status = response.status_code
    if status in OUR_MISTAKES:
        raise UserError(f"{endpoint.url} answers {status}: {OUR_MISTAKES[status]}{_said(response)}")
    if response.is_redirect:
        raise UserError(f"endpoint.url: {endpoint.url} has moved to {response.headers.get('Location')}: give that")
    if status in (408, 425, 429) or status >= 500:
        raise _TryAgain(f"status {status}{_said(response)}", _retry_after(response))
    if not response.is_success:
        # of this prompt, not of all: too long for the model, or held back by a filter
        return Reply(problem=f"status {status}{_said(response)}")
    return Reply(_content(endpoint, response))


def _request(endpoint: Endpoint, prompt: str) -> dict[str, Any]:
    prompt = prompt.encode("utf-8", "replace").decode()  # an answer may hold half a character
    content = {"messages": [{"role": "user", "content": prompt}]} if endpoint.is_chat else {"prompt": prompt}
    return {"model": endpoint.model, **content, **endpoint.parameters}


def _content(endpoint: Endpoint, response: httpx.Response) -> str:
    try:
        choice = response.json()["choices"][0]
        text = choice["message"]["content"] if endpoint.is_chat else choice["text"]
        if isinstance(text, str):
            return text
    except (ValueError, LookupError, TypeError):
        pass
    raise _TryAgain(f"the reply is no completion{_said(response)}")


def _said(response: httpx.Response) -> str:
    text = " ".join(response.text.split())
    return f": {text[:200]}" if text else ""


def _retry_after(response: httpx.Response) -> float:
    """Seconds, given as such or as a date; 0 where nothing is asked for."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _is_unknown_host(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, socket.gaierror):
            return True
        error = error.__cause__ or error.__context__
    return False
