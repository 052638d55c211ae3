"""The `gcloud` command lines, as words. Nothing is run here."""

from pathlib import Path

from tpu.settings import TIER_FLAGS, Pod

QUEUED = ("compute", "tpus", "queued-resources")
VM = ("compute", "tpus", "tpu-vm")
CLOUD_PLATFORM = "https://www.googleapis.com/auth/cloud-platform"

Words = tuple[str, ...]


def create(pod: Pod, attempt: int, worker_script: Path) -> Words:
    """Asks for the pod's slices. What its workers must know lies in their metadata."""
    shape = ("--node-id", pod.name) if pod.slice.count == 1 else _several_nodes(pod)
    metadata = {
        "derta-attempt": str(attempt),
        "derta-extras": pod.extras.replace(",", "+"),
        "derta-name": pod.name,
        "derta-project": pod.project,
        "derta-seconds": str(round(pod.max_hours * 3600)),
        "derta-slices": str(pod.slice.count),
        "derta-url": pod.url,
        "derta-zone": pod.zone,
    }
    optional = {
        "--service-account": pod.service_account,
        "--network": pod.network,
        "--subnetwork": pod.subnetwork,
    }
    return (
        *(*QUEUED, "create", pod.name, *_place(pod), *shape),
        *("--accelerator-type", pod.accelerator_type, "--runtime-version", pod.runtime_version),
        *TIER_FLAGS[pod.tier],
        *("--scopes", CLOUD_PLATFORM),
        *("--labels", "app=derta-jax"),
        *("--metadata", ",".join(f"{key}={value}" for key, value in metadata.items())),
        *("--metadata-from-file", f"startup-script={worker_script}"),
        *(word for flag, value in optional.items() if value for word in (flag, value)),
        *(("--internal-ips",) if pod.internal_ips else ()),
        "--quiet",
    )


def _several_nodes(pod: Pod) -> Words:
    return ("--node-count", str(pod.slice.count), "--node-prefix", pod.name)


def _place(pod: Pod) -> Words:
    return ("--project", pod.project, "--zone", pod.zone)


def describe(pod: Pod) -> Words:
    """The request: its state and the metadata it was made with."""
    return (*QUEUED, "describe", pod.name, *_place(pod), "--format", "json")


def describe_node(pod: Pod, node: str) -> Words:
    """One slice: its state and its workers."""
    return (*VM, "describe", node, *_place(pod), "--format", "json")


def delete(pod: Pod) -> Words:
    """Deletes the request and its nodes; done when it returns."""
    return (*QUEUED, "delete", pod.name, *_place(pod), "--force", "--quiet")


def ssh(pod: Pod, node: str, worker: str, command: str | None = None) -> Words:
    """A connection that notices within two minutes when it is dead; `worker` is a number or `all`."""
    return (
        *(*VM, "ssh", node, *_place(pod), "--worker", worker),
        *("--strict-host-key-checking", "no"),
        *("--ssh-flag=-o ServerAliveInterval=30", "--ssh-flag=-o ServerAliveCountMax=4"),
        *(("--internal-ip",) if pod.internal_ips else ()),
        *(("--command", command) if command is not None else ()),
    )


def upload(source: Path | str, url: str) -> Words:
    """`source` is a file, or `-` for what is given on stdin."""
    return ("storage", "cp", str(source), url)


def read(*urls: str) -> Words:
    """What these objects hold, one after the other; `*` stands for any of them."""
    return ("storage", "cat", *urls)


def read_from(url: str, start: int) -> Words:
    """What an object holds from a byte on, or, of a negative number, its last so many bytes."""
    return ("storage", "cat", f"--range={start}" if start < 0 else f"--range={start}-", url)


def listing(url: str) -> Words:
    """The objects beneath a URL that may hold `*`."""
    return ("storage", "ls", url)


def remove(url: str) -> Words:
    """Deletes one object."""
    return ("storage", "rm", url)
