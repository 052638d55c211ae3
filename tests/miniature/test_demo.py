"""`derta demo` as a newcomer runs it: the paper's story has to come out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from derta_jax.errors import UserError
from derta_jax.miniature.experiment import run_demo

METHODS = ("vanilla", "RecAug", "RTO", "DeRTa")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """On one device and with the compiler's usual optimisations, unlike the other tests."""
    directory = tmp_path_factory.mktemp("demo") / "out"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    command = [sys.executable, "-m", "derta_jax.cli", "demo", "--output", str(directory)]
    subprocess.run(command, check=True, env=environment | {"JAX_PLATFORMS": "cpu"}, cwd=Path(__file__).parents[2])
    return directory


@pytest.fixture(scope="module")
def results(demo) -> dict:
    return json.loads((demo / "results.json").read_text())


@pytest.fixture(scope="module")
def models(results) -> dict:
    return results["models"]


def asr(models, method: str, attack: str) -> float:
    return models[method]["attacks"][attack]["asr"]


@pytest.mark.slow
def test_derta_withstands_every_attack(models):
    assert all(entry["asr"] <= 0.05 for entry in models["DeRTa"]["attacks"].values())


@pytest.mark.slow
def test_prefill_and_completing_attacks_order_the_methods_as_the_paper_does(results):
    """Question by question: the harmful prefix helps beyond doubt, and RTO is nowhere shown to be worse than it."""
    compared = {(row["a"], row["b"], row["name"]): row for row in results["comparisons"]}
    attacks = [name for name in results["models"]["vanilla"]["attacks"] if name.startswith(("prefill", "completing"))]
    assert len(attacks) >= 3
    for attack in attacks:
        helps = compared["vanilla", "RecAug", attack]
        assert helps["only_a"] > helps["only_b"]
        assert helps["p"] < 1e-3
        closes = compared["RecAug", "RTO", attack]
        assert closes["only_a"] >= closes["only_b"] or closes["p"] > 0.05
    mean = {name: np.mean([asr(results["models"], name, attack) for attack in attacks]) for name in METHODS}
    assert max(mean["RTO"], mean["DeRTa"]) <= mean["RecAug"] + 0.01 <= mean["vanilla"]


@pytest.mark.slow
def test_vanilla_refuses_direct_questions_and_falls_to_prefill_and_completing(models):
    assert asr(models, "vanilla", "direct") <= 0.2
    assert all(
        entry["asr"] >= 0.8
        for name, entry in models["vanilla"]["attacks"].items()
        if name.startswith(("prefill", "completing"))
    )


@pytest.mark.slow
def test_everyone_stays_helpful(models):
    assert all(models[method]["helpfulness"]["benign"]["score"] >= 0.95 for method in METHODS)


@pytest.mark.slow
def test_over_refusal_is_measured_and_seen(models):
    rates = [entry["rate"] for method in METHODS for entry in models[method]["over_refusal"].values()]
    assert 0 < max(rates) < 1


@pytest.mark.slow
def test_the_table_is_there_as_markdown(demo):
    assert "| completing | 100 |" in (demo / "results.md").read_text()


@pytest.mark.slow
def test_the_report_stands_alone(demo):
    report = (demo / "report.html").read_text()
    assert report.count("<svg") == 7
    assert "http://" not in report.replace("http://www.w3.org/", "")


@pytest.mark.slow
def test_a_demo_of_another_seed_is_not_overwritten(demo):
    from rich.console import Console

    with pytest.raises(UserError, match="holds the demo of another seed"):
        run_demo(demo, seed=1, console=Console(quiet=True))
