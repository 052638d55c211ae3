"""How fast answers are made beside transformers' own `generate`: the same weights, prompts and batch, in turn."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from derta_jax.benchmark.config import Answering, Bench
from derta_jax.benchmark.contest import machine, spread, versions
from derta_jax.benchmark.work import write_model
from derta_jax.errors import UserError
from derta_jax.interop.hf_load import load_pretrained, read_model_config

Answers = list[list[int]]
"""Token ids of each prompt's answer, in the prompts' order, up to the first that stops it."""

LIVELY = 5.0
"""Times the usual spread of random weights: with less, a random model says one token for ever."""
NAMES = {"transformers": "PyTorch, transformers", "derta_jax": "JAX"}


def bench_generation(bench: Bench, console: Console) -> dict[str, Any]:
    """Tokens a second of both, greedily, in float32: medians of `repeats`, after one round each that is not timed.

    A random share of the vocabulary ends an answer, so that answers end at all lengths, as real ones do. Raises
    `UserError` where the model is no Hugging Face directory.
    """
    with tempfile.TemporaryDirectory() as files:
        directory = Path(bench.model.path)
        if bench.synthetic is not None:
            directory = Path(files) / "model"
            write_model(bench.synthetic, directory, bench.train.seed, LIVELY)
        if not (directory / "config.json").is_file():
            raise UserError(f"model.path: {directory} must be a Hugging Face directory, which PyTorch reads too")
        prompts, stop_ids = _questions(bench.answering, read_model_config(directory).vocab_size, bench.train.seed)
        contenders = {"transformers": _transformers(directory, bench.answering)}
        contenders["derta_jax"] = _ours(directory, bench.answering)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        made: dict[str, Answers] = {}
        for round in range(1 + bench.repeats):
            for name, answer in contenders.items():
                with console.status(f"{NAMES[name]}: round {round} of {bench.repeats}"):
                    started = time.perf_counter()
                    made[name] = answer(prompts, stop_ids)
                    seconds[name].append(time.perf_counter() - started)
        return _results(bench, made, {name: each[1:] for name, each in seconds.items()})


def _questions(answering: Answering, vocabulary: int, seed: int) -> tuple[list[list[int]], list[int]]:
    random = np.random.default_rng(seed)
    lengths = random.integers(*answering.prompt_tokens, answering.prompts, endpoint=True)
    prompts = [random.integers(3, vocabulary, length).tolist() for length in lengths]
    stops = max(1, round(vocabulary * answering.stop_share))
    return prompts, sorted(random.choice(vocabulary, stops, replace=False).tolist())


def _transformers(directory: Path, answering: Answering) -> Callable[[Answers, Sequence[int]], Answers]:
    """Batches of prompts of like length, padded on the left, as its documentation advises."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def answer(prompts: Answers, stop_ids: Sequence[int]) -> Answers:
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        answers: Answers = [[]] * len(prompts)
        for start in range(0, len(order), answering.batch_size):
            places = order[start : start + answering.batch_size]
            width = max(len(prompts[place]) for place in places)
            ids, mask = (torch.zeros((len(places), width), dtype=torch.long) for _ in range(2))
            for row, place in enumerate(places):
                ids[row, width - len(prompts[place]) :] = torch.tensor(prompts[place])
                mask[row, width - len(prompts[place]) :] = 1
            with torch.inference_mode():
                made = model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=answering.new_tokens,
                    eos_token_id=list(stop_ids),
                    pad_token_id=0,
                )
            for place, row in zip(places, made[:, width:].tolist(), strict=True):
                stop = next((at for at, token in enumerate(row) if token in set(stop_ids)), len(row))
                answers[place] = row[:stop]
        return answers

    return answer


def _ours(directory: Path, answering: Answering) -> Callable[[Answers, Sequence[int]], Answers]:
    """As `derta generate` does, on one device."""
    import jax

    from derta_jax.evaluation.generate import generate
    from derta_jax.models.decoder import unrolled
    from derta_jax.training.mesh import single_device_mesh

    model, params = unrolled(*load_pretrained(directory))

    def answer(prompts: Answers, stop_ids: Sequence[int]) -> Answers:
        with jax.set_mesh(single_device_mesh()):
            found = generate(model, params, prompts, answering.new_tokens, stop_ids, answering.batch_size)
        return [list(each.token_ids) for each in found]

    return answer


def _results(bench: Bench, made: dict[str, Answers], seconds: dict[str, list[float]]) -> dict[str, Any]:
    tokens = {name: sum(map(len, answers)) for name, answers in made.items()}
    same = [a == b for a, b in zip(*made.values(), strict=True)]
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "machine": machine(),
        "versions": versions(),
        "setting": bench.answering.model_dump(mode="json"),
        "contenders": {
            name: {
                "seconds": spread(each),
                "tokens": tokens[name],
                "tokens_per_second": spread([tokens[name] / one for one in each]),
            }
            for name, each in seconds.items()
        },
        "same_answers": sum(same) / len(same),
        "ratios": {"derta_jax/transformers": medians["transformers"] / medians["derta_jax"]},
    }


def generation_table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    caption = (
        f"JAX is {results['ratios']['derta_jax/transformers']:.2f} × transformers; "
        f"{results['same_answers']:.1%} of the answers are the same, token for token"
    )
    table = Table("", *("tokens/s", "low–high", "seconds"), box=box.SIMPLE_HEAD, caption=caption)
    for name, each in results["contenders"].items():
        speed = each["tokens_per_second"]
        low_high = f"{speed['low']:,.0f}–{speed['high']:,.0f}"
        table.add_row(NAMES[name], f"{speed['median']:,.0f}", low_high, f"{each['seconds']['median']:.1f}")
    return table
