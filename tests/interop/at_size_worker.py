"""One process of `test_at_size.py`: loads a model and exports it, and prints what that took as JSON.

    python at_size_worker.py MODEL OUTPUT [PROCESS PROCESSES PORT]

A single process has one device and measures reading too; one of several has four.
"""

import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAIRS = 6
ENOUGH = 0.6


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def bytes_read() -> int:
    """What read calls have returned so far, from the cache or from the disk."""
    return int(Path("/proc/self/io").read_text().split()[1])


@contextlib.contextmanager
def watch(figures: dict[str, Any], name: str) -> Iterator[None]:
    """Add seconds, bytes read and peak memory of the block."""
    done = threading.Event()
    peak = 0

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, memory())

    thread = threading.Thread(target=sample)
    thread.start()
    before, started = bytes_read(), time.monotonic()
    try:
        yield
    finally:
        figures[f"{name}_seconds"] = time.monotonic() - started
        done.set()
        thread.join()

        figures[f"{name}_read"] = bytes_read() - before
        figures[f"{name}_peak"] = max(peak, memory())


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(files: list[Path]) -> float:
    """Seconds of a sequential read."""
    buffer = bytearray(8 << 20)
    started = time.monotonic()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.monotonic() - started


def main(model: str, output: str, process: int = 0, processes: int = 1, port: int = 0) -> None:
    """Load and export; with one process measure reading against a plain read, both with and without the cache."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    devices = 4 if processes > 1 else 1
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process, heartbeat_timeout_seconds=60)

    from derta_jax.config import MeshShape
    from derta_jax.errors import UserError
    from derta_jax.interop.hf_export import export_pretrained
    from derta_jax.interop.hf_load import load_params, read_model_config
    from derta_jax.models.decoder import Decoder
    from derta_jax.training.mesh import make_mesh

    mesh = make_mesh(MeshShape()) if processes > 1 else None
    config = read_model_config(model)
    jax.block_until_ready(jax.numpy.ones(1) + 1)
    files = sorted(Path(model).glob("*.safetensors"))
    figures: dict[str, Any] = {"before": memory(), "stored": sum(file.stat().st_size for file in files)}

    with watch(figures, "load"):
        params = load_params(model, config, "bfloat16", mesh)
    leaves = jax.tree.leaves(params)
    figures["held"] = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    with watch(figures, "export"):
        export_pretrained(Decoder(config), params, output, source=model, max_shard_size="500MB")
    if processes > 1:
        try:
            export_pretrained(Decoder(config), params, output)
        except UserError as error:
            figures["refused"] = str(error)
    figures["ru_maxrss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    if processes == 1:
        leaves, params = [], {}

        def load() -> float:
            started = time.monotonic()
            load_params(model, config, "bfloat16")
            return time.monotonic() - started

        for name, prepare in (("cold", forget), ("hot", read_plainly)):
            for _ in range(PAIRS):
                prepare(files)
                plain = read_plainly(files)
                prepare(files)
                ours = load()
                ratio = plain / ours
                if ratio > figures.get(f"{name}_ratio", 0):
                    figures |= {f"{name}_ratio": ratio, f"{name}_plain": plain, f"{name}_load": ours}
                if ratio >= ENOUGH or name == "hot":
                    break
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    model, output, *numbers = sys.argv[1:]
    main(model, output, *[int(number) for number in numbers])
