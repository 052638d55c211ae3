"""The request for a pod: what state it is in, asking for it, waiting for it, deleting it."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from derta_jax.errors import RunFailed
from tpu import command_lines
from tpu.gcloud import Absent, CannotLook, Gcloud, shown
from tpu.settings import Pod

WORKER_SCRIPT = Path(__file__).parent / "worker.sh"

COMING = {"CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"}
"""States of a request that may still become `ACTIVE`."""

NODE_LOST = {"PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING"}
"""States of a slice that does not come back."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A queued resource: its `state`, the number of its `attempt`, and what the cloud says of the state."""

    state: str
    attempt: int
    detail: str = ""

    @property
    def active(self) -> bool:
        return self.state == "ACTIVE"

    @property
    def over(self) -> bool:
        """Whether it will not be active any more."""
        return not self.active and self.state not in COMING


def look(cloud: Gcloud, pod: Pod) -> Request | None:
    """The request as it is now; None where there is none. A lost slice makes it `PREEMPTED`."""
    found = cloud.json(command_lines.describe(pod))
    if found is None:
        return None
    state = found.get("state", {}).get("state", "STATE_UNSPECIFIED")
    if state == "ACTIVE":
        slices = [cloud.json(command_lines.describe_node(pod, node)) for node in pod.nodes]
        if any(node is None or node.get("state") in NODE_LOST for node in slices):
            state = "PREEMPTED"
    metadata = _metadata(found)
    detail = found.get("state", {}).get(f"{state.lower()}Data", {}).get("error", {}).get("message", "")
    return Request(state, int(metadata.get("derta-attempt", 1)), detail)


def _metadata(found: dict[str, Any]) -> dict[str, str]:
    specs = found.get("tpu", {}).get("nodeSpec", [])
    return specs[0].get("node", {}).get("metadata", {}) if specs else {}


def count_workers(cloud: Gcloud, pod: Pod) -> int:
    """Of all slices; 0 in a dry run."""
    slices = [cloud.json(command_lines.describe_node(pod, node)) for node in pod.nodes]
    return sum(len(node.get("networkEndpoints", [])) for node in slices if node)


def ask_for(cloud: Gcloud, pod: Pod, attempt: int = 1) -> None:
    """Send the request. It may wait in the queue for long."""
    cloud.say(f"{pod.name}: {pod.price} while it is there, {pod.max_hours:g} hours at most. Delete it with")
    cloud.say(f"  {shown(command_lines.delete(pod))}")
    cloud(command_lines.create(pod, attempt, WORKER_SCRIPT))


def wait_until_active(cloud: Gcloud, pod: Pod) -> Request | None:
    """Raises `RunFailed` when the request fails or vanishes; None in a dry run."""
    said, since = "", time.monotonic()
    while True:
        request = look(cloud, pod)
        if cloud.dry_run:
            return None
        state = "gone" if request is None else request.state
        if state != said:
            cloud.say(f"{pod.name}: {state} after {_minutes(time.monotonic() - since)}")
            said = state
        if request is not None and request.active:
            return request
        if request is None or request.over:
            why = f": {request.detail}" if request and request.detail else ""
            raise RunFailed(f"the request for {pod.name} is {state}{why}")
        time.sleep(cloud.every)


def _minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def create(cloud: Gcloud, pod: Pod) -> None:
    """Ask for the pod, or go on waiting for it; what is left of a dead one is deleted first."""
    request = look(cloud, pod)
    if request is not None and request.over:
        cloud.say(f"{pod.name}: {request.state}; deleting what is left of it")
        delete(cloud, pod)
        request = None
    if request is None:
        ask_for(cloud, pod)
    else:
        cloud.say(f"{pod.name} is there already; nothing is asked for twice")
    with torn_down(cloud, pod, at_the_end=False):
        wait_until_active(cloud, pod)


def delete(cloud: Gcloud, pod: Pod) -> None:
    """Delete request and slices, and see that they are gone. Raises `RunFailed` where they are not."""
    try:
        cloud(command_lines.delete(pod))
    except Absent:
        cloud.say(f"{pod.name} is not there")
        return
    if cloud.json(command_lines.describe(pod)) is not None:
        raise RunFailed(f"{pod.name} is still there after its deletion; see `tpu/pod status`")
    if not cloud.dry_run:
        cloud.say(f"{pod.name} is deleted; nothing of it is billed any more")


@contextmanager
def torn_down(cloud: Gcloud, pod: Pod, *, keep: bool = False, at_the_end: bool = True) -> Iterator[None]:
    """Delete the pod where what is done with it fails, and at its end as well.

    Ctrl-C leaves it as it is, and so does a cloud that does not answer: what is done may go on.
    """
    try:
        yield
    except CannotLook:
        raise
    except Exception as error:  # whatever it was: an idle pod costs money
        if not keep:
            try:
                delete(cloud, pod)
            except RunFailed as second:
                raise RunFailed(f"{error}\nand then {second}") from error
        raise
    if at_the_end and not keep:
        delete(cloud, pod)
