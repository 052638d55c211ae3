"""Real formats from end to end: real tokenizers and rows, models written by transformers, a real kill -9."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from derta_jax import load_pretrained
from derta_jax.interop.tokenizer import load_tokenizer, refusal_token_id
from tests.conftest import triple, write_jsonl, write_tiny_model

ROOT = Path(__file__).parents[1]
STEPS = 50
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.02}


def write_llama3(directory: Path, shared_data: Path) -> Path:
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(254))]
    converter = TikTokenConverter(
        str(shared_data / "tokenizers" / "llama3.tiktoken"), pattern=LLAMA3_PATTERN, extra_special_tokens=special
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token=special[0], eos_token=special[1]
    )
    tokenizer.save_pretrained(directory)
    ids = {"bos_token_id": 128000, "eos_token_id": 128001}
    return write_tiny_model(directory, "llama", vocab_size=128256, **SIZES, **ids)


def write_mistral(directory: Path, shared_data: Path, version: str, vocab_size: int) -> Path:
    directory.mkdir(parents=True)
    shutil.copyfile(shared_data / "tokenizers" / f"mistral-{version}.model", directory / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": False}))
    return write_tiny_model(directory, "mistral", vocab_size=vocab_size, sliding_window=32, **SIZES)


MODELS: dict[str, tuple[Callable[..., Path], tuple, int, int]] = {
    "llama3": (write_llama3, (), 19701, 33386),
    "mistral-v1": (write_mistral, ("v1", 32000), 23166, 19385),
    "mistral-v3": (write_mistral, ("v3", 32768), 23934, 20153),
}


@pytest.fixture(scope="module")
def rows(shared_data, tmp_path_factory) -> Path:
    """The authors' example rows as they are, 24 GSM8K questions as helpful rows, and harmless triples."""
    questions = [json.loads(line) for line in (shared_data / "gsm8k_500.jsonl").read_text().splitlines()[:24]]
    helpful = [
        {"id": f"gsm8k-{i}", "prompt": row["question"], "response": row["answer"]} for i, row in enumerate(questions)
    ]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(file, [*helpful, *(triple(i) for i in range(6))])
    with file.open("a", encoding="utf-8") as out:
        out.write((shared_data / "derta_example_rows.jsonl").read_text(encoding="utf-8"))
    return file


def derta(*arguments, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(_command(arguments), capture_output=True, text=True, check=check, cwd=ROOT)


def _command(arguments) -> list[str]:
    return [sys.executable, "-m", "derta_jax.cli", *map(str, arguments)]


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def kill_after(step: int, run: Path, arguments) -> None:
    """Start a run and kill -9 it once `step` is done."""
    process = subprocess.Popen(_command(arguments), cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "mistral-v1"])
def test_prepare_inspect_train_kill_resume_export(name, rows, shared_data, tmp_path):
    write, arguments, refusal_id, _ = MODELS[name]
    model = write(tmp_path / "model", shared_data, *arguments)

    derta("prepare", rows, "--output", tmp_path / "data")
    common = (
        "configs/tiny.yaml", f"model.path={model}", f"data.path={tmp_path / 'data'}", f"train.steps={STEPS}",
        "train.batch_size=3", "train.sequence_length=128", "train.learning_rate=5e-3", "objective.sorry_keep_rate=0.5",
    )  # fmt: skip

    inspected = [json.loads(line) for line in derta("inspect", *common, "--json").stdout.splitlines()]
    assert {row["recipe"] for row in inspected} == {"helpful", "derta", "authors"}
    rto_labels = {label for row in inspected if row["stream"] == "rto" for label in row["labels"]}
    assert rto_labels == {-100, refusal_id}

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    derta("train", *common, f"train.output={whole}")
    losses = losses_of(whole)
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < np.mean(losses[:5])

    kill_after(step=25, run=killed, arguments=("train", *common, f"train.output={killed}"))
    resumed = derta("train", *common, f"train.output={killed}")
    assert "resumed   at step" in resumed.stdout
    assert losses_of(killed) == losses

    derta("export", killed, tmp_path / "exported")
    token_ids = np.array([row["token_ids"][:24] for row in inspected if len(row["token_ids"]) >= 24][:4])
    ours, params = load_pretrained(tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(token_ids)).logits.numpy()
    np.testing.assert_allclose(ours.apply({"params": params}, token_ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_refusal_token_of_real_tokenizers(name, shared_data, tmp_path):
    write, arguments, bare, spaced = MODELS[name]
    tokenizer = load_tokenizer(write(tmp_path / "model", shared_data, *arguments))
    assert refusal_token_id(tokenizer, "Sorry") == bare
    assert refusal_token_id(tokenizer, " Sorry") == spaced
