"""One finding of `derta doctor`, and what all of its checks need."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from derta_jax.errors import RunFailed

T = TypeVar("T")
Status = Literal["ok", "warn", "fail"]


class Check(NamedTuple):
    """What was looked at, whether it is well, and in words: the finding, and if it is not well, what to do."""

    name: str
    status: Status
    text: str


def readable_size(count: int) -> str:
    """Bytes for people: `64.8 GiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def differences(values: Sequence[dict[str, Any]]) -> Iterator[str]:
    """`jax 0.10.2 on process 0, 0.10.1 on process 1, 2`, for each key that is not the same on all."""
    for key in dict.fromkeys(key for value in values for key in value):
        owners: dict[str, list[str]] = {}
        for process, value in enumerate(values):
            owners.setdefault(str(value.get(key, "missing")), []).append(str(process))
        if len(owners) > 1:
            yield f"{key} " + ", ".join(f"{value} on process {', '.join(who)}" for value, who in owners.items())


def in_time(work: Callable[[], T], seconds: float, otherwise: str) -> T:
    """The result of `work`; raises what it raises, or `RunFailed` when it takes longer: it is left behind then."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="derta-check", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise RunFailed(otherwise)
    return results[0]
