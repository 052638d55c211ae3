"""Fine-tuning on data that nobody vouches for, beneath security vectors (arXiv 2311.02105), in three phases.

    vectors     an adapter learns the harmful answers that are known              vectors/, and as PEFT adapter/
    fine_tune   the model learns the user's data while the adapter is active      fine_tune/
    release     the model without it, and what was and what was not learned       model/, report.json, report.md

Each phase goes on where it was stopped; what is done is not done again.
"""

import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from derta_jax.errors import UserError
from derta_jax.models.lora import Adapter, fingerprint
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.export import export_model
from derta_jax.training.loop import train
from derta_jax.training.mesh import single_device_mesh
from derta_jax.training.pod import processes
from derta_jax.training.protect.absorption import answer_losses, gradient_ratio, off_equals_base
from derta_jax.training.protect.config import Protection
from derta_jax.training.restore import adapter_of, find_model
from derta_jax.training.run import Run, plan_batches, prepare_run
from derta_jax.training.start import fresh_trainable, frozen_variables

Report = dict[str, Any]
"""`gradient_ratio`, `vectors_identical`, `off_equals_base`, and `losses`: before and after, on and off, by stream."""


def protect(config: Protection, console: Console, dry_run: bool = False, **watching: Any) -> Report:
    """Run what is left of the three phases; returns the report. `watching` is told to `train`.

    Raises `UserError` for bad input of either run before the first begins, and what `train` raises.
    """
    if processes.count() > 1:
        raise UserError("a pod takes the phases one by one: derta train, derta export (docs/security_vectors.md)")
    if dry_run or not config.adapter.exists():
        _check_user_run(config)
    console.rule("1  vectors")
    train(config.vectors, console, dry_run, **watching)
    if dry_run:
        return {}
    if not config.adapter.exists():
        export_model(config.vectors.train.output, config.adapter, console, dtype="float32")
    console.rule("2  fine-tune")
    train(config.fine_tune, console, **watching)
    console.rule("3  release")
    report = config.directory / "report.json"
    if not config.model_directory.exists():
        export_model(config.fine_tune.train.output, config.model_directory, console)
    if not report.exists():
        found = measure(config)
        report.with_suffix(".md").write_text(report_markdown(found), encoding="utf-8")
        report.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    found = json.loads(report.read_text(encoding="utf-8"))
    console.print(report_markdown(found), highlight=False, markup=False)
    return found


def _check_user_run(config: Protection) -> None:
    """Whatever is wrong with phase 2 is said before hours of phase 1; the adapter is not there yet."""
    prepare_run(config.fine_tune.model_copy(update={"frozen_adapters": {}}), Console(quiet=True), keep_rows=False)


def measure(config: Protection) -> Report:
    """The report, of phases that are done, by the samples that the vectors learned from."""
    quiet = Console(quiet=True)
    learned, run = prepare_run(config.vectors, quiet), prepare_run(config.fine_tune, quiet)
    samples = plan_batches(config.vectors, learned.data, run.mesh)
    frozen = frozen_variables(run, quiet)
    before = fresh_trainable(run, quiet)
    report: Report = {
        "gradient_ratio": gradient_ratio(run, samples, before, frozen),
        "off_equals_base": off_equals_base(run, samples, before, frozen),
        "losses": {"before": answer_losses(run, samples, before, frozen)},
    }
    del before
    after = _trained(run)
    report["losses"]["after"] = answer_losses(run, samples, after, frozen)
    report["vectors_identical"] = same_adapter(config.vectors.train.output, config.adapter)
    return report


def _trained(run: Run) -> Any:
    """What the run has trained; its checkpoint is refused beneath other adapters than those it was trained beneath."""
    with Checkpoints(run.output / "checkpoints", keep=None) as checkpoints:
        state, _ = checkpoints.restore_newest(run.program.abstract_state, run.identity)
    if state is None:
        raise UserError(f"{run.output} has no checkpoint that can be read")
    return state.trainable


def same_adapter(*paths: str | Path) -> bool:
    """Whether LoRA runs and PEFT directories hold one adapter, to the last bit."""
    adapters = [adapter_of(find_model(path), single_device_mesh()) for path in paths]
    prints = {fingerprint(Adapter(jax.device_get(each.factors), each.scales)) for each in adapters}
    return len(prints) == 1


def report_markdown(report: Report) -> str:
    """A table of losses, and the figures below it."""
    rows = {
        "before the fine-tune": ("before", "off"),
        "before, vectors on": ("before", "on"),
        "after, vectors on": ("after", "on"),
        "after: what is released": ("after", "off"),
    }
    lines = ["| loss of an answer's token | harmful samples | other data |", "| --- | ---: | ---: |"]
    for name, (when, switch) in rows.items():
        losses = report["losses"][when][switch]
        lines.append(f"| {name} | {losses['harmful']:.3f} | {losses['benign']:.3f} |")
    ratio = f"The vectors leave {report['gradient_ratio']:.1%} of the gradient's norm on harmful samples."
    facts = {
        "vectors_identical": ("No bit of them has changed", "THE VECTORS HAVE CHANGED"),
        "off_equals_base": ("off, they leave the model as it is", "OFF, THEY CHANGE THE MODEL"),
    }
    said = "; ".join(yes if report[name] else no for name, (yes, no) in facts.items())
    return "\n".join([*lines, "", f"{ratio} {said}.", ""])
