"""What a client is told when it gets no answer, in OpenAI's shape."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclasses.dataclass(eq=False)
class Problem(Exception):
    """A status, a message for the client, the parameter it is about, and a code for its program."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status, {})

    def as_json(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def to_json(value: Mapping[str, Any]) -> bytes:
    """UTF-8, where half a surrogate pair that a client sent is escaped as it was."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def first_problem(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Of the errors that pydantic found in a body; those of `protocol` bring their own message."""
    error = errors[0]
    context = error.get("ctx", {})
    if error["type"] == "json_invalid":
        return Problem(400, f"the body is not JSON: {context['error']}")
    steps = [step for step in error["loc"] if step != "body"]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
    if "message" in context:
        return Problem(400, context["message"], path or context["param"], error["type"])
    if not path:
        return Problem(400, "the body must be a JSON object, sent as Content-Type: application/json")
    return Problem(400, f"{path}: {error['msg']}", path, "invalid_value")
