"""Gigabytes in and out: memory, bytes read and speed of import and export, in one process and in two."""

import filecmp
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from derta_jax.interop.hf_export import write_model
from derta_jax.models.config import ModelConfig

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("at_size_worker.py")
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=16_000,
    embed_dim=4096,
    ffn_dim=8192,
    layers=7,
    heads=32,
    kv_heads=8,
    head_dim=128,
)
SHARD_BYTES = 500_000_000
MEMORY_BUDGET = 1.35
"""Peak memory without interpreter and libraries, in units of the parameters that a process holds."""
SPEED = 0.6
"""Of a plain sequential read of the same files, none of them in the page cache."""


@pytest.fixture
def big_model(tmp_path):
    """2.3 GB of bfloat16 in five shards, no two tensors alike."""
    block = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)
    made = 0

    def tensor_of(row, index):
        nonlocal made
        made += 1
        tensor = np.resize(np.roll(block, made), row.hf_shape(CONFIG))
        return tensor.T if row.transposed else tensor

    directory = tmp_path / "big"
    write_model(CONFIG, tensor_of, directory, None, "bfloat16", SHARD_BYTES)
    yield directory
    shutil.rmtree(tmp_path)


def run_workers(model, output, processes):
    """Their figures, once all have ended well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    numbers = [[str(n), str(processes), str(port)] for n in range(processes)] if processes > 1 else [[]]
    ours = ("XLA_", "JAX_", "COV")  # what conftest.py and coverage set is for other tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment["PYTHONPATH"] = str(ROOT)
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, model, output, *each],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in numbers
    ]
    try:
        ended = [(*worker.communicate(timeout=300), worker.returncode) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [code for *_, code in ended] == [0] * processes, "\n".join(errors for _, errors, _ in ended)
    return [json.loads(out.splitlines()[-1]) for out, *_ in ended]


def describe(figures):
    held = figures["held"]
    lines = [f"holds {held / 1e9:.2f} of {figures['stored'] / 1e9:.2f} GB"]
    for what in ("load", "export"):
        peak = (figures[f"{what}_peak"] - figures["before"]) / held
        lines.append(
            f"{what}: peak {peak:.3f} × held, {figures[f'{what}_read'] / 1e9:.2f} GB read, "
            f"{held / figures[f'{what}_seconds'] / 1e9:.2f} GB/s"
        )
    lines.append(f"ru_maxrss with interpreter and libraries: {figures['ru_maxrss'] / held:.3f} × held")
    for what in ("cold", "hot"):
        if f"{what}_ratio" in figures:
            plain, ours = (figures["stored"] / figures[f"{what}_{who}"] / 1e9 for who in ("plain", "load"))
            lines.append(f"{what}: {ours:.2f} GB/s, a plain read {plain:.2f} GB/s: {figures[f'{what}_ratio']:.0%}")
    return "\n".join(lines)


def assert_same_files(directory, other):
    names = sorted(file.name for file in directory.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert filecmp.cmpfiles(directory, other, names, shallow=False) == (names, [], [])


@pytest.mark.slow
def test_gigabytes_go_in_and_out_bit_by_bit_within_memory_at_the_speed_of_the_disk(big_model, tmp_path):
    (alone,) = run_workers(big_model, tmp_path / "alone", processes=1)
    print(f"\none process {describe(alone)}")
    assert_same_files(big_model, tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone")
    pair = run_workers(big_model, tmp_path / "pair", processes=2)
    print("\n".join(f"process {number} of two {describe(figures)}" for number, figures in enumerate(pair)))
    assert_same_files(big_model, tmp_path / "pair")

    assert alone["stored"] > 2e9
    for figures, share in ((alone, 1.0), (pair[0], 0.5), (pair[1], 0.5)):
        assert figures["held"] == pytest.approx(share * alone["stored"], rel=0.02)
        assert figures["load_read"] == pytest.approx(share * alone["stored"], rel=0.02)
        for what in ("load", "export"):
            assert figures[f"{what}_peak"] - figures["before"] < MEMORY_BUDGET * figures["held"]
    assert alone["cold_ratio"] >= SPEED
    already = f"{tmp_path / 'pair'} already exists: choose another directory, or remove it first"
    assert [figures["refused"] for figures in pair] == [already, already]
