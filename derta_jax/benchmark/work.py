"""What all contenders are given: one directory of weights, the same rows in the same steps, and their labels."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from derta_jax.benchmark.config import Bench, Synthetic
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.tokenise import Region, TokenRow
from derta_jax.errors import UserError
from derta_jax.interop.hf_export import export_pretrained
from derta_jax.interop.hf_load import read_model_config
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.objectives.objective import of_config
from derta_jax.training.run import prepare_run
from derta_jax.training.watching.flops import train_flops

NO_LABEL = -100


@dataclasses.dataclass(frozen=True)
class Work:
    """Goes to each contender's process. `model` is a Hugging Face directory with config.json and safetensors."""

    bench: Bench
    model: Path
    rows: list[TokenRow]
    refusal_id: int

    @property
    def config(self) -> ModelConfig:
        return read_model_config(self.model)

    def batches(self, packing: str, shards: int = 1) -> Batches:
        """`packing` as in `data.packing`. But for trees each step has the same rows, for any number of devices."""
        train, packed, tree = self.bench.train, packing != "none", packing == "tree"
        layout = Layout(train.batch_size, train.sequence_length, shards=shards, packed=packed, tree=tree)
        return Batches(self.rows, layout, of_config(self.bench), train.seed, self.bench.steps)

    def examples(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(token ids, labels) of each row of a step, int64 [n]; `NO_LABEL` where nothing is learned."""
        batches = self.batches("none")
        batch = {name: array[0] for name, array in batches[step].items()}
        refusing = [stream in batches.objective.refusing for stream in batches.objective.streams]
        labels = np.where(np.array(refusing)[batch["stream"]], self.refusal_id, batch["token_ids"])
        labels = np.where(batch["keep"], labels, NO_LABEL)
        lengths = (batch["segment_ids"] > 0).sum(1)
        return [
            (ids[:length].astype(np.int64), row[:length].astype(np.int64))
            for ids, row, length in zip(batch["token_ids"], labels, lengths, strict=True)
            if length
        ]

    def amounts(self, step: int) -> "Amounts":
        """What a step is about, however it is computed."""
        examples = self.examples(step)
        lengths = np.array([len(ids) for ids, _ in examples])
        labelled = sum(int((labels != NO_LABEL).sum()) for _, labels in examples)
        window = self.config.sliding_window or lengths.max()
        attended = sum(int(np.minimum(np.arange(1, length + 1), window).sum()) for length in lengths) / lengths.sum()
        useful = int(lengths.sum())
        return Amounts(useful, labelled, train_flops(self.config).of(useful, labelled, attended))


@dataclasses.dataclass(frozen=True)
class Amounts:
    """Of one step: tokens that are no padding, those with a label, and the FLOPs that the model needs for them."""

    useful: int
    labelled: int
    flops: float


def make_work(bench: Bench, directory: Path, console: Console) -> Work:
    """The weights are written to `directory` where they are made up. Raises `UserError` for bad input."""
    if bench.synthetic is None:
        run = prepare_run(bench, console, keep_rows=False)
        if run.source.step is not None or run.source.base is not None:
            raise UserError(f"model.path: {bench.model.path} must be a Hugging Face directory, which PyTorch reads too")
        return Work(bench, run.source.files, run.data.rows, run.refusal_id)
    write_model(bench.synthetic, directory / "model", bench.train.seed)
    rows = synthetic_rows(bench.synthetic, bench.train.seed, bench.train.sequence_length)
    return Work(bench, directory / "model", rows, refusal_id=1)


def write_model(synthetic: Synthetic, directory: Path, seed: int, spread: float = 1.0) -> None:
    """Random weights in float32; `spread` times as far from zero as usual, but for the norms'."""
    model = Decoder(synthetic.model)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda weight: weight * spread if (weight != 1).any() else weight, params)
    with tempfile.TemporaryDirectory() as files:
        (Path(files) / "config.json").write_text(json.dumps(synthetic.model.to_hf()))
        export_pretrained(model, params, directory, source=files)


def synthetic_rows(synthetic: Synthetic, seed: int, sequence_length: int) -> list[TokenRow]:
    """Prompt and answer of random tokens, cut to the sequence length; of the safety rows every other one is RTO's."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(synthetic.rows):
        safety = rng.random() < synthetic.safety_share
        low, high = synthetic.safety_tokens if safety else synthetic.helpful_tokens
        prompt, answer = rng.integers(*synthetic.prompt_tokens, endpoint=True), rng.integers(low, high, endpoint=True)
        ids = rng.integers(2, synthetic.model.vocab_size, prompt + answer, dtype=np.int32)[:sequence_length]
        regions = np.where(np.arange(len(ids)) < prompt, Region.PROMPT, Region.RESPONSE).astype(np.uint8)
        stream = "rto" if safety and number % 2 else "mle"
        rows.append(TokenRow(f"row-{number}", "derta", ids, regions, stream, None, False))
    return rows
