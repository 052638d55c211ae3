"""The README.md of an exported model: what it was made from, by which recipe, on which data, with which figures."""

import json
import shlex
from pathlib import Path
from typing import Any

from etils import epath

from derta_jax import __version__
from derta_jax.config import RunConfig
from derta_jax.objectives.objective import of_config
from derta_jax.training.checkpoint import directory_of
from derta_jax.training.restore import RUN_CONFIG_IN_EXPORT, ModelSource, run_checkpoints


def model_card(source: ModelSource, name: str, merged: bool = False, base_name: str | None = None) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    adapter = source.base is not None and not merged
    run = source.run if source.step else None
    base = base_name or (run.model.path if run else source.base.path if source.base else source.path)
    lines = ["---", f"library_name: {'peft' if adapter else 'transformers'}"]
    if _is_hub_id(base):
        lines.append(f"base_model: {base}")
    lines += ["pipeline_tag: text-generation", "tags: [derta, safety, refusal, jax]", "---", "", f"# {name}", ""]
    options = [*(["--merged"] if merged else []), *(["--base", base_name] if base_name else [])]
    kind = "A LoRA adapter" if adapter else "A model"
    if run is None:
        lines.append(f"{kind} of {Path(base).name}, converted by derta_jax {__version__}.")
    else:
        lines += [
            f"{kind} tuned from {base if _is_hub_id(base) else Path(base).name} by derta_jax {__version__} with",
            f"{of_config(run).describe(run.data)}.",
            "",
            *_table(_facts(source, run)),
            "",
            f"Made by (`{RUN_CONFIG_IN_EXPORT}` lies beside this file):",
            "",
            "```sh",
            shlex.join(["derta", "train", RUN_CONFIG_IN_EXPORT]),
            shlex.join(["derta", "export", run.train.output, name, "--step", str(source.step), *options]),
            "```",
        ]
    lines += [
        "",
        "Tuning for refusals makes some harmless questions be refused, too: measure attack success and over-refusal",
        "together (`derta evaluate`) before you rely on either.",
        "",
    ]
    return "\n".join(lines)


def _facts(source: ModelSource, run: RunConfig) -> dict[str, Any]:
    train, objective = run.train, of_config(run)
    facts: dict[str, Any] = {"objective": objective.name, "checkpoint": f"step {source.step:,}"}
    facts |= _data_facts(source)
    facts |= {
        "optimizer": f"AdamW, {train.schedule} from {train.learning_rate:g}, warm-up {train.warmup:g}, "
        f"weight decay {train.weight_decay:g}, clip {train.clip}",
        "batch": f"{train.batch_size} rows of up to {train.sequence_length} tokens",
        "template": f"`{run.data.template}`",
        "refusal token": repr(objective.refusal_token),
        **objective.facts(run.data),
        "compute": train.dtype,
        "seed": train.seed,
    }
    if lora := run.lora:
        targets = ", ".join(lora.targets) if lora.targets else "every linear layer"
        facts["LoRA"] = f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {targets}"
    if source.config.experts:
        facts["load-balancing loss"] = f"× {objective.router_aux_weight:g}"
    return facts | _metrics(directory_of(source.path) / "metrics.jsonl", source.step or 0)


def _data_facts(source: ModelSource) -> dict[str, Any]:
    with run_checkpoints(source) as checkpoints:
        content_hash = checkpoints.identity(source.step or 0).get("data.content_hash")
    return {"data": f"content hash `{content_hash}`"} if content_hash else {}


def _metrics(file: epath.Path, step: int) -> dict[str, Any]:
    """The losses before the first update and at the checkpoint."""
    if not file.exists():
        return {}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    by_step = {record["step"]: record for record in records}
    if step not in by_step:
        return {}
    kinds = [name for name, value in by_step[step].items() if name.partition("_")[0] == "loss" and value is not None]
    return {name: f"{records[0][name]:.4f} → {by_step[step][name]:.4f}" for name in kinds if records[0].get(name)}


def _table(facts: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
