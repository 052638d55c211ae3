"""What the recipes in `configs/` say of themselves: the slices they fit on, how fast they are, what they cost.

    python -m derta_jax.planning.headers        # compiles all of them: forty minutes on two cores

writes the plans to `docs/plans.json` and into the header of each recipe. Plans that have been made before are taken
from the cache of `derta plan`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from derta_jax.config import load_config
from derta_jax.planning.command import plan_slices
from derta_jax.planning.slices import PRICES_AS_OF, find_slices

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "docs" / "plans.json"

RECIPES = {
    "llama3_8b_full": "v5e-16,v5p-8,v6e-8",
    "llama3_8b_lora": "v5e-8",
    "llama3_8b_instruct_100": "v5e-16",
    "llama3_70b_full": "v5p-128",
    "llama3_70b_lora": "v5e-16,v5e-32,v5e-64",
    "llama3_70b_instruct_100": "v5e-16,v5e-64",
    "mistral_7b_full": "v5e-16",
    "mixtral_8x7b_full": "v5p-64",
    "mixtral_8x7b_lora": "v5p-16",
}
"""The slices that each recipe is planned for."""

BEGIN, END = "# planned:", "# end of plan"


def header(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines between the two marks."""
    lines = [f"#   {'slice':9s}{'HBM, GiB':>14s}{'s/step':>8s}{'tokens/s/chip':>15s}{'hours':>7s}{'$':>8s}"]
    for plan in plans:
        memory = f"{plan['peak_hbm_gib']:.2f}/{plan['hbm_gib']}"
        speed = f"{plan['estimated_step_seconds']:8.2f}{plan['tokens_per_second_per_chip']:15,.0f}"
        lines.append(f"#   {plan['slice']:9s}{memory:>14s}{speed}{plan['hours']:7.1f}{plan['dollars']:8,.0f}")
    return [
        *lines,
        f"# (of full rows, by the compiler's estimate: real steps take 1.0 to 1.6 times; prices {PRICES_AS_OF})",
    ]


def with_header(text: str, plans: Sequence[Mapping[str, Any]]) -> str:
    """A recipe's text with these plans in its header."""
    before, rest = text.split(f"{BEGIN}\n")
    _, after = rest.split(f"{END}\n")
    return "\n".join([f"{before}{BEGIN}", *header(plans), f"{END}\n"]) + after


def main() -> None:
    """Plan every recipe, and write down what came out."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    console, everything = Console(), {}
    for name, slices in RECIPES.items():
        file = ROOT / "configs" / f"{name}.yaml"
        plans = plan_slices(name, load_config(file), find_slices(slices), console)
        for plan in plans:
            console.print(
                f"{name} on {plan['slice']}: {plan['peak_hbm_gib']:.2f} GiB, {plan['estimated_step_seconds']}"
            )
        everything[name] = plans
        file.write_text(with_header(file.read_text(encoding="utf-8"), plans), encoding="utf-8")
        PLANS.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
