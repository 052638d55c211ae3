"""How memory and traffic of a chip change with the number of chips, at the same number of rows a chip: table and plot.

    python -m derta_jax.planning.scaling        # five compilations for memory alone: three minutes on two cores

writes `docs/scaling.json`, the table in `docs/planning.md` and `docs/images/scaling.svg`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from derta_jax.config import load_config
from derta_jax.planning.compiled import compile_for
from derta_jax.planning.headers import ROOT
from derta_jax.planning.plan import Question, describe
from derta_jax.planning.published import architecture
from derta_jax.planning.slices import find_slice

RECIPE, ROWS = "llama3_8b_full", 8
SLICES = ("v5e-16", "v5e-32", "v5e-64", "v5e-128", "v5e-256")
BEGIN, END = "<!-- scaling -->", "<!-- end of scaling -->"


def table(plans: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| slice | rows | peak HBM, GiB | of that state and gradients | all-gather, GB | all-reduce, GB | other, GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for plan in plans:
        moved = {kind: size / 1e9 for kind, size in plan["collective_bytes"].items()}
        gathered, reduced = moved.pop("all-gather", 0.0), moved.pop("all-reduce", 0.0)
        state = sum(plan["breakdown_gib"][name] for name in ("parameters", "optimizer", "gradients"))
        figures = [f"{size:.1f}" for size in (gathered, reduced, sum(moved.values()))]
        memory = [f"{ROWS * plan['chips']:,}", f"{plan['peak_hbm_gib']:.2f}", f"{state:.2f}"]
        lines.append(f"| {' | '.join([plan['slice'], *memory, *figures])} |")
    return "\n".join(lines)


def draw(plans: Sequence[Mapping[str, Any]], file: Any) -> None:
    """Peak HBM, and bytes moved, of a chip by the number of chips, as SVG."""
    from matplotlib.figure import Figure

    chips = [plan["chips"] for plan in plans]
    figure = Figure(figsize=(7, 3), layout="constrained")
    memory, traffic = figure.subplots(1, 2)
    memory.plot(chips, [plan["peak_hbm_gib"] for plan in plans], "o-", label="peak")
    for name, label in (("optimizer", "optimizer"), ("parameters", "parameters, and gradients"), ("activations",) * 2):
        memory.plot(chips, [plan["breakdown_gib"][name] for plan in plans], "--", label=label)
    memory.set(ylabel="GiB of HBM a chip", ylim=0)
    memory.legend(fontsize=7)
    for kind in ("all-gather", "all-reduce", "reduce-scatter"):
        traffic.plot(chips, [plan["collective_bytes"].get(kind, 0) / 1e9 for plan in plans], "o-", label=kind)
    traffic.set(ylabel="GB moved, a chip a step", ylim=0)
    traffic.legend(fontsize=7)
    for axes in (memory, traffic):
        axes.set_xscale("log", base=2)
        axes.set_xticks(chips, [str(count) for count in chips])
        axes.set(xlabel=f"chips (v5e), {ROWS} rows of 1,024 tokens each")
    figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    """Plan every slice, and write down what came out."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    console, plans = Console(), []
    for name in SLICES:
        place = find_slice(name)
        config = load_config(ROOT / "configs" / f"{RECIPE}.yaml", [f"train.batch_size={ROWS * place.chips}"])
        model = architecture(config.model.path)
        compiled = compile_for(config, model, place, memory_only=True)
        plans.append(describe(Question(RECIPE, config, model, place), compiled))
        console.print(f"{name}: {plans[-1]['peak_hbm_gib']:.2f} GiB", highlight=False)
    (ROOT / "docs" / "scaling.json").write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")
    draw(plans, ROOT / "docs" / "images" / "scaling.svg")
    guide = ROOT / "docs" / "planning.md"
    before, rest = guide.read_text(encoding="utf-8").split(f"{BEGIN}\n")
    after = rest.split(f"{END}\n")[1]
    guide.write_text(f"{before}{BEGIN}\n{table(plans)}\n{END}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
