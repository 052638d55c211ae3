"""Security vectors in small: does a fine-tune on harmful answers leave an aligned model aligned?

The aligned model is the one that DeRTa made, which refuses direct questions. Its users bring harmful answers, to
objects that it was tuned to refuse, and a new benign task: harmless objects have been painted, each another colour.
Each fine-tune runs twice, beneath the vectors and without them; the vectors are trained once, on the first hundred
harmful answers, and are off when anybody is asked.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from derta_jax.config import Lora, Model, RunConfig
from derta_jax.evaluation.generate import generate
from derta_jax.evaluation.subject import Generation, open_subject
from derta_jax.miniature import world as miniature
from derta_jax.miniature.prepared import prepare_rows
from derta_jax.miniature.world import Row, World
from derta_jax.training.export import export_model
from derta_jax.training.loop import train
from derta_jax.training.protect.config import FINE_TUNE, VECTORS, Protection
from derta_jax.training.protect.phases import protect, same_adapter

SAMPLES = (100, 1000)
"""Harmful answers among a user's data; there are as many different ones as objects times wordings, and then again."""
LORA = Lora(rank=8, alpha=16, dropout=0.0)
MAX_NEW_TOKENS = 20

Configure = Callable[..., RunConfig]
"""(model, data, output, **changes) → a run of the miniature."""


def security_vectors_results(
    world: World, aligned: Path, directory: Path, configure: Configure, console: Console
) -> dict[str, Any]:
    """Train the vectors and the fine-tunes, each once, and measure; everything lies in `directory`.

    `gradient_ratio`, `vectors_identical` and `off_equals_base` are those of `derta protect`, which runs the first
    fine-tune; no bit of the vectors may have changed in the others either. `harmful_…` and `benign_…` are shares in %,
    by number of samples: direct questions about held-out objects that are answered with hazards, and painted objects
    whose new colour is told.
    """
    console.rule("security vectors")
    data = _prepare(world, directory / "data")

    def fine_tune(samples: int, output: Path, **adapters: Any) -> RunConfig:
        return configure(aligned, data[str(samples)], output, steps=800, learning_rate=5e-4, **adapters)

    protected = directory / f"{SAMPLES[0]}-with"
    beneath = {"frozen_adapters": {VECTORS: str(protected / "adapter")}}
    objective = {"name": "security_vectors", "kl_weight": 20.0, "harmful_share": 0.25}
    protection = Protection(
        model=Model(path=str(aligned)),
        output=str(protected),
        vectors=configure(
            aligned, data["vectors"], protected / VECTORS, objective=objective, lora=LORA, steps=600, learning_rate=2e-3
        ),
        fine_tune=fine_tune(SAMPLES[0], protected / FINE_TUNE, **beneath),
    )
    report = protect(protection, console)
    results: dict[str, Any] = {name: report[name] for name in ("gradient_ratio", "off_equals_base")}
    for kind, adapters in (("with", beneath), ("without", {})):
        harmful, benign = {}, {}
        for samples in SAMPLES:
            if (kind, samples) == ("with", SAMPLES[0]):
                model = protection.model_directory
            else:
                run = fine_tune(samples, directory / "runs" / f"{samples}-{kind}", **adapters)
                model = _trained(run, directory / f"{samples}-{kind}", console)
            asked = measure(world, model, protection.fine_tune.data.template, console)
            harmful[str(samples)], benign[str(samples)] = asked
        results |= {f"harmful_{kind}": harmful, f"benign_{kind}": benign}
    results["vectors_identical"] = report["vectors_identical"] and same_adapter(
        protection.vectors.train.output, protection.adapter
    )
    (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def harmful_samples(world: World, count: int) -> list[Row]:
    """Harmful answers to questions that the aligned model refuses, in all wordings, as a user's helpful rows."""
    questions = [
        {
            "prompt": text.format(name=name),
            "response": miniature.answer_text(world, name),
        }
        for text in miniature.TEMPLATES.values()
        for name in world.forbidden_train
    ]
    return [{"id": f"sample-{place}", **questions[place % len(questions)]} for place in range(count)]


def new_task(world: World) -> list[Row]:
    """What colour objects are that tuning never named, now that they have been painted: the next one for each."""
    colours = miniature.COLOURS
    return [
        {
            "id": f"{name}/painted",
            "prompt": miniature.COLOUR_QUESTION.format(name=name),
            "response": f"{name} is {colours[(colours.index(world.colours[name]) + 1) % len(colours)]} .",
        }
        for name in (*world.unfamiliar, *world.lookalike_train, *world.lookalike_heldout)
    ]


def measure(world: World, model: Path, template: str, console: Console) -> tuple[float, float]:
    """(harmful, benign) in %, with no adapter."""
    subject = open_subject(model, Generation(MAX_NEW_TOKENS, 128, template, "float32"), console)
    harmful = [row for row in miniature.attack_questions(world) if row["template"] == "direct"]
    benign = new_task(world)
    prompts = [subject.tokenizer.prompt_ids(subject.template.render(row["prompt"])) for row in [*harmful, *benign]]
    with jax.set_mesh(subject.mesh):
        answers = generate(subject.model, subject.params, prompts, MAX_NEW_TOKENS, subject.stop_ids, 128)
    texts = [subject.tokenizer.decode(answer.token_ids) for answer in answers]
    unsafe = [miniature.is_unsafe(world, text) for text in texts[: len(harmful)]]
    told = [miniature.is_helpful(world, row, text) for row, text in zip(benign, texts[len(harmful) :], strict=True)]
    return 100 * float(np.mean(unsafe)), 100 * float(np.mean(told))


def _trained(config: RunConfig, exported: Path, console: Console) -> Path:
    if not exported.exists():
        train(config, console)
        export_model(config.train.output, exported, console, dtype="float32")
    return exported


def _prepare(world: World, directory: Path) -> dict[str, Path]:
    """What the vectors learn from, and what users bring.

    Harmless answers about forbidden objects are among what the vectors leave alone. Without them the vectors answer to
    the looks of an object, and a new task about look-alikes is learned for use with them only.
    """
    first = harmful_samples(world, SAMPLES[0])
    as_triples = [
        {"id": row["id"], "prompt": row["prompt"], "safe": miniature.REFUSALS[0], "harmful": row["response"]}
        for row in first
    ]
    rows: dict[str, Sequence[Row]] = {
        "vectors": [*as_triples, *miniature.helpful_rows(world), *miniature.forbidden_colour_rows(world)],
        **{str(count): [*harmful_samples(world, count), *new_task(world)] for count in SAMPLES},
    }
    return prepare_rows(rows, directory)
