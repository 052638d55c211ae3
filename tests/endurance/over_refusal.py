"""What keeps DeRTa's attack success and gives harmless questions back: trials in the miniature, over seeds.

    python -m tests.endurance.over_refusal --output trials --seeds 5

Each trial is DeRTa with something else about it, on the demo's base model. Prints means, and 95% intervals of
these, for docs/over_refusal.md. About six minutes a seed on two cores; what is done is not done again.
"""

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console

from derta_jax.miniature import world as miniature
from derta_jax.miniature.experiment import evaluate_world, run_demo, tune, tuning_config
from derta_jax.miniature.methods import TUNINGS, Tuning
from derta_jax.miniature.prepared import prepare_rows
from derta_jax.miniature.seeds import mean_results, seeds_markdown

DERTA = TUNINGS["derta"]


def derta(label: str, data: str = "tuning", recipe: str = "derta", name: str = "derta", **objective: float) -> Tuning:
    """DeRTa with other keys, or on other rows."""
    return dataclasses.replace(DERTA, label=label, data=data, recipe=recipe, objective={"name": name, **objective})


TRIALS = (
    TUNINGS["vanilla"],
    TUNINGS["recaug"],
    DERTA,
    derta("weight-0.3", rto_weight=0.3),
    derta("keep-0.3", sorry_keep_rate=0.3),
    derta("colours", data="colours"),
    derta("one-hazard", data="one-hazard"),
    derta("lookalikes", data="lookalikes"),
    derta("lookalikes-weight-3", data="lookalikes", rto_weight=3.0),
    derta("lookalikes-delay-2", data="lookalikes", name="derta_plus", delay=2),
    derta("lookalikes-delay-4", data="lookalikes", name="derta_plus", delay=4),
    derta("lookalikes-delay-5", data="lookalikes", name="derta_plus", delay=5),
    derta("recaug-lookalikes", data="lookalikes", recipe="recaug"),
    derta("vanilla-lookalikes", data="lookalikes", recipe="vanilla"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("trials"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    runs = [one_seed(arguments.output / f"seed-{seed}", seed) for seed in range(arguments.seeds)]
    print(seeds_markdown(mean_results(runs)))


def one_seed(directory: Path, seed: int) -> dict:
    """The results of all trials in one world."""
    console = Console()
    run_demo(directory / "demo", seed, console, ["derta"])
    world = miniature.make_world(seed)
    tuning, rows = miniature.tuning_rows(world), miniature.lookalike_rows(world)
    colours = [row for row in rows if row["id"].endswith("/colour")]
    one_hazard = [row for row in rows if not row["id"].endswith("/colour")]
    kinds = {"tuning": [], "colours": colours, "one-hazard": one_hazard, "lookalikes": rows}
    data = prepare_rows({name: [*tuning, *more] for name, more in kinds.items()}, directory / "data")
    base = directory / "demo" / "models" / "base"
    models = {}
    for trial in TRIALS:
        config = tuning_config(base, data[trial.data], directory / "runs" / trial.label, trial, seed)
        models[trial.label] = tune(console, trial.label, config)
    return evaluate_world(world, models, directory, console)[0]


if __name__ == "__main__":
    main()
