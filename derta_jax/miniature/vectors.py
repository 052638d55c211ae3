"""Security vectors in small: does a fine-tune on harmful answers leave an aligned model aligned?

The aligned model is the one that DeRTa made, which refuses direct questions. Its users bring harmful answers, to
objects that it was tuned to refuse, and a new benign task: harmless objects have been painted, each another colour.
Each fine-tune runs twice, beneath the vectors and without them; the vectors are trained once, on the first hundred
harmful answers, and are off when anybody is asked.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from derta_jax.config import Lora, RunConfig
from derta_jax.data.dataset import prepare
from derta_jax.evaluation.generate import generate
from derta_jax.evaluation.subject import Generation, open_subject
from derta_jax.interop.hf_load import load_pretrained
from derta_jax.interop.peft import load_adapter
from derta_jax.miniature import world as miniature
from derta_jax.miniature.world import Row, World
from derta_jax.models.lora import adapter_variables, fingerprint, switched
from derta_jax.objectives.derta import Derta
from derta_jax.objectives.objective import objective_loss
from derta_jax.training.export import export_model
from derta_jax.training.loop import train
from derta_jax.training.run import prepare_run
from derta_jax.training.step import accumulate, to_devices

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

    `gradient_ratio` is the norm of the gradient on the harmful samples with the vectors on, over that with them off.
    `harmful_…` and `benign_…` are shares in %, by number of samples: direct questions about held-out objects that are
    answered with hazards, and painted objects whose new colour is told. `vectors_identical`: no bit of them has changed
    in a fine-tune. `off_equals_base`: switched off they leave every logit as it is without them.
    """
    console.rule("security vectors")
    data = _prepare(world, directory / "data")
    objective = {"name": "security_vectors", "kl_weight": 20.0, "harmful_share": 0.25}
    run = configure(
        aligned,
        data["vectors"],
        directory / "runs" / "vectors",
        objective=objective,
        lora=LORA,
        steps=300,
        learning_rate=2e-3,
    )
    vectors = _trained(run, directory / "vectors", console)
    before = fingerprint(_on_host(vectors, aligned))
    results: dict[str, Any] = {
        "gradient_ratio": gradient_ratio(
            configure(aligned, data["harmful"], directory / "runs" / "gradients"), vectors, console
        ),
        "off_equals_base": off_equals_base(aligned, vectors),
    }
    for kind, adapters in (("with", {"vectors": str(vectors)}), ("without", {})):
        harmful, benign = {}, {}
        for samples in SAMPLES:
            name = f"{samples}-{kind}"
            tuned = configure(
                aligned,
                data[str(samples)],
                directory / "runs" / name,
                frozen_adapters=adapters,
                steps=1500,
                learning_rate=1e-3,
            )
            harmful[str(samples)], benign[str(samples)] = measure(
                world, _trained(tuned, directory / name, console), tuned.data.template, console
            )
        results |= {f"harmful_{kind}": harmful, f"benign_{kind}": benign}
    results["vectors_identical"] = fingerprint(_on_host(vectors, aligned)) == before
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


def gradient_ratio(config: RunConfig, vectors: Path, console: Console) -> float:
    """Of the first batch of harmful samples, by all parameters of the aligned model."""
    run = prepare_run(config, console)
    _, params = load_pretrained(config.model.path, mesh=run.mesh)
    adapter = load_adapter(vectors, run.source.config, run.mesh)
    on = adapter_variables({"vectors": adapter})
    loss = objective_loss(Derta(), run.program.model, run.refusal_id, run.batches.label_capacity)

    @jax.jit
    def norm(params: Any, adapters: Any, batch: Any) -> Any:
        return optax.tree.norm(accumulate(loss, {"params": params}, adapters, batch, jax.random.key(0))[0])

    with jax.set_mesh(run.mesh):
        batch = to_devices(run.batches[0], run.mesh)
        with_them, without = (float(norm(params, each, batch)) for each in (on, switched(on, ())))
    return with_them / without


def off_equals_base(aligned: Path, vectors: Path) -> bool:
    """Whether every bit of the logits is the same beneath vectors that are switched off."""
    model, params = load_pretrained(aligned)
    on = adapter_variables({"vectors": load_adapter(vectors, model.config)})
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, 24))
    apply = jax.jit(functools.partial(model.apply))
    off = apply({"params": params, **switched(on, ())}, tokens)
    return bool(np.array_equal(off, apply({"params": params}, tokens)))


def _on_host(vectors: Path, model: Path) -> Any:
    adapter = load_adapter(vectors, load_pretrained(model)[0].config)
    return adapter._replace(factors=jax.device_get(adapter.factors))


def _trained(config: RunConfig, exported: Path, console: Console) -> Path:
    if not exported.exists():
        train(config, console)
        export_model(config.train.output, exported, console, dtype="float32")
    return exported


def _prepare(world: World, directory: Path) -> dict[str, Path]:
    """What the vectors learn from, harmful samples alone, and what users bring."""
    first = harmful_samples(world, SAMPLES[0])
    as_triples = [
        {"id": row["id"], "prompt": row["prompt"], "safe": miniature.REFUSALS[0], "harmful": row["response"]}
        for row in first
    ]
    rows: dict[str, Sequence[Row]] = {
        "vectors": [*as_triples, *miniature.helpful_rows(world)],
        "harmful": first,
        **{str(count): [*harmful_samples(world, count), *new_task(world)] for count in SAMPLES},
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, some in rows.items():
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        prepare([file], directory / name)
    return {name: directory / name for name in rows}
