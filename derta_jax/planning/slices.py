"""TPU slices by the names that `gcloud` gives them: chips, memory, speed, links, price.

The number in a name counts chips for v5e and v6e, and cores, two a chip, for v4 and v5p. Several slices joined by the
data centre's network are written `2xv5e-16`.
"""

import dataclasses
import math
import os
import re
from typing import Any

from derta_jax.errors import UserError, did_you_mean

PRICES_AS_OF = "2026-11"
"""When prices were written down: as last published to our knowledge, not read from the live page that day."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """Of one chip: `hbm_gib` is what a program can use and `hbm_bytes` bytes/s of it, `clock_hz` that of its cores,
    `peak_flops` dense bfloat16 FLOP/s, `link_bytes` bytes/s one way over one of its links.

    `dollars` an hour are list prices, on demand in the United States (`PRICES_AS_OF`).
    """

    hbm_gib: float
    hbm_bytes: float
    clock_hz: float
    peak_flops: float
    link_bytes: float
    dollars: float
    cores_in_name: int
    chip_config: str
    layouts: tuple[str, ...]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

GENERATIONS = {
    "v4": Generation(30.75, 1228e9, 1.05e9, 275e12, 45e9, 3.22, 2, "megacore", CUBES),
    "v5e": Generation(15.75, 819e9, 1.5e9, 197e12, 45e9, 1.20, 1, "default", FLAT),
    "v5p": Generation(95.74, 2765e9, 1.75e9, 459e12, 90e9, 4.20, 2, "megacore", CUBES),
    "v6e": Generation(31.25, 1640e9, 1.75e9, 918e12, 90e9, 2.70, 1, "default", FLAT),
}
"""Google's data sheets; links as in the JAX scaling book."""

NETWORK_BYTES = 6.25e9
"""Bytes/s of a chip, one way, over the data centre's network between slices."""

HOST_BYTES = 16e9
"""Bytes/s between a chip and its host, one way: those of v4, as in the JAX scaling book, which has no other."""


NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
"""What libtpu would look for on a TPU VM, and say at length that it did not find."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """`count` slices of one `layout` of chips, as `4x4` or `2x2x4`."""

    name: str
    family: str
    layout: str
    count: int = 1

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.family]

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(map(int, self.layout.split("x")))

    @property
    def chips(self) -> int:
        return self.count * math.prod(self.sides)

    @property
    def link_bytes(self) -> float:
        """Bytes/s that every chip can send at once, one way, into all directions that the layout has.

        Chips at the end of an open side have one link along it, those on a ring two: a cube whose sides are all
        multiples of 4 is closed, and so is a side of 16 of a flat layout.
        """
        cube = len(self.sides) == 3 and all(side % 4 == 0 for side in self.sides)
        return sum(2 if cube or side == 16 else 1 for side in self.sides if side > 1) * self.generation.link_bytes

    def devices(self) -> list[Any]:
        """The chips as JAX devices to compile for. Raises `UserError` where libtpu is not installed."""
        for name, value in NO_TPU_HERE.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        sides = (*self.sides, 1)[:3]
        try:
            topology = topologies.get_topology_desc(
                f"{self.family}:{self.layout}",
                platform="tpu",
                chip_config_name=self.generation.chip_config,
                chips_per_host_bounds=tuple(min(side, most) for side, most in zip(sides, (2, 2, 1), strict=True)),
                num_slices=self.count,
            )
        except (RuntimeError, ImportError, FileNotFoundError) as error:
            raise UserError(f"planning needs libtpu, on Linux: pip install 'derta-jax[tpu]' ({error})") from error
        return topology.devices


def _named_slices() -> dict[str, Slice]:
    slices = {}
    for family, generation in GENERATIONS.items():
        for layout in generation.layouts:
            place = Slice("", family, layout)
            name = f"{family}-{place.chips * generation.cores_in_name}"
            slices[name] = dataclasses.replace(place, name=name)
    return slices


SLICES = _named_slices()


def find_slice(name: str) -> Slice:
    """`v5e-16` (or `v5litepod-16`), or `2xv5e-16` for two of them. Raises `UserError` with the nearest name."""
    match = re.fullmatch(r"([1-9]\d*)x(.+)", name.lower())
    count, single = (int(match[1]), match[2]) if match else (1, name.lower())
    single = single.replace("v5litepod-", "v5e-")
    if single not in SLICES:
        family, _, number = single.partition("-")
        near = [known for known in SLICES if known.startswith(f"{family}-")]
        if near and number.isdecimal():
            hint = f"; did you mean {min(near, key=lambda known: abs(int(known.split('-')[1]) - int(number)))!r}?"
        else:
            hint = did_you_mean(single, SLICES)
        raise UserError(f"no slice {name!r}{hint} There are {', '.join(near or SLICES)}")
    return dataclasses.replace(SLICES[single], name=f"{count}x{single}" if match else single, count=count)


def find_slices(names: str) -> list[Slice]:
    """Of names with commas between them. Raises `UserError` where there is none."""
    places = [find_slice(name.strip()) for name in names.split(",") if name.strip()]
    if not places:
        raise UserError(f"no slice in {names!r}: name one, as v5e-16")
    return places
