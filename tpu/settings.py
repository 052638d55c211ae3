"""What a pod is: a file of `KEY=VALUE` lines (`tpu/env.example`), checked before anything is asked of the cloud."""

import dataclasses
import re
from pathlib import Path

from derta_jax.errors import UserError, did_you_mean
from derta_jax.planning.slices import PRICES_AS_OF, Slice, find_slice

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""Software versions of a TPU VM for JAX, by generation (https://cloud.google.com/tpu/docs/runtimes)."""

TIER_FLAGS = {"spot": ("--spot",), "on-demand": (), "reserved": ("--reserved",)}


@dataclasses.dataclass(frozen=True)
class Pod:
    """The keys of an env file, in lower case. `dollars` is a chip's price an hour, None for the list price."""

    name: str
    project: str
    zone: str
    slice: Slice
    tier: str
    bucket: str
    max_hours: float = 24.0
    max_tries: int = 5
    dollars: float | None = None
    runtime: str = ""
    service_account: str = ""
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    extras: str = "tpu,gcs"

    @property
    def accelerator_type(self) -> str:
        """As `gcloud` spells it."""
        return self.slice.name.rpartition("x")[2].replace("v5e-", "v5litepod-")

    @property
    def runtime_version(self) -> str:
        return self.runtime or RUNTIMES[self.slice.family]

    @property
    def nodes(self) -> list[str]:
        """The TPU VMs that the request makes, one a slice."""
        return [self.name] if self.slice.count == 1 else [f"{self.name}-{i}" for i in range(self.slice.count)]

    @property
    def url(self) -> str:
        """Where in the bucket the pod's wheel, jobs and logs lie."""
        return f"{self.bucket}/pods/{self.name}"

    @property
    def dollars_per_hour(self) -> float:
        return self.slice.chips * (self.slice.generation.dollars if self.dollars is None else self.dollars)

    @property
    def price(self) -> str:
        """`$19.20 an hour for 16 chips (…)`."""
        source = "your price" if self.dollars is not None else f"on-demand list price, {PRICES_AS_OF}"
        less = "; spot costs less" if self.dollars is None and self.tier == "spot" else ""
        return f"${self.dollars_per_hour:,.2f} an hour for {self.slice.chips} chips ({source}{less})"


def read_env(path: Path) -> Pod:
    """Raises `UserError`, naming file, line and key, for what is missing, misspelt or not of its kind."""
    if not path.is_file():
        raise UserError(f"{path} is not there: copy tpu/env.example to it and fill it in, or give --env FILE")
    known = {field.name.upper(): field for field in dataclasses.fields(Pod)}
    given: dict[str, object] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.strip().partition("=")
        where = f"{path}:{number}"
        if not equals or key not in known:
            raise UserError(f"{where}: {line.strip()!r} is not KEY=VALUE with a known key{did_you_mean(key, known)}")
        if key.lower() in given:
            raise UserError(f"{where}: {key} is there twice")
        try:
            given[key.lower()] = CHECKS.get(key, _word)(value.strip().strip("\"'"))
        except (ValueError, UserError) as error:
            raise UserError(f"{where}: {key}: {error}") from error
    missing = [key for key, field in known.items() if field.default is dataclasses.MISSING and key.lower() not in given]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} must be given")
    return Pod(**given)  # type: ignore[arg-type]


def _word(text: str) -> str:
    if not re.fullmatch(r"[\w@.,:/-]*", text):
        raise ValueError(f"{text!r} has characters that no such value has")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,46}[a-z0-9])?", text):
        raise ValueError(f"{text!r} is not up to 48 small letters, digits and hyphens, the first of them a letter")
    return text


def _zone(text: str) -> str:
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", text):
        raise ValueError(f"{text!r} is not a zone, as us-west4-a")
    return text


def _tier(text: str) -> str:
    if text not in TIER_FLAGS:
        raise ValueError(f"{text!r} is none of {', '.join(TIER_FLAGS)}{did_you_mean(text, TIER_FLAGS)}")
    return text


def _bucket(text: str) -> str:
    if not re.fullmatch(r"gs://[a-z0-9][\w.-]+(/[\w./-]+)?", text):
        raise ValueError(f"{text!r} is not a bucket, as gs://my-bucket")
    return text.rstrip("/")


def _positive(text: str) -> float:
    if not float(text) > 0:
        raise ValueError(f"{text} is not above 0")
    return float(text)


def _tries(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a number of tries, 0 or more")
    return int(text)


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"{text!r} is neither yes nor no")
    return text == "yes"


CHECKS = {
    "NAME": _name,
    "ZONE": _zone,
    "SLICE": find_slice,
    "TIER": _tier,
    "BUCKET": _bucket,
    "MAX_HOURS": _positive,
    "MAX_TRIES": _tries,
    "DOLLARS": _positive,
    "INTERNAL_IPS": _yes,
}
"""Text to value, by key; raise `ValueError` or `UserError` that says what is expected."""
