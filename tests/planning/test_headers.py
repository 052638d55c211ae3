"""The recipes in `configs/`: their headers say what was planned, and what was planned is what the code makes."""

import json
import re

import pytest

from derta_jax.cli import main
from derta_jax.config import load_config
from derta_jax.planning.compiled import GIB, compile_for
from derta_jax.planning.headers import PLANS, RECIPES, ROOT, with_header
from derta_jax.planning.published import PUBLISHED, architecture
from derta_jax.planning.scaling import table
from derta_jax.planning.slices import find_slice

CONFIGS = ROOT / "configs"
EVERY_RECIPE = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def plans() -> dict:
    return json.loads(PLANS.read_text())


def test_every_config_but_the_tiny_one_and_the_benchmarks_is_a_recipe():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {*RECIPES, "tiny", "bench_cpu", "bench_gpu"}


@EVERY_RECIPE
def test_the_header_says_what_was_planned(name, plans):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert text == with_header(text, plans[name])
    assert [plan["slice"] for plan in plans[name]] == RECIPES[name].split(",")
    assert all(plan["fits"] for plan in plans[name])


@EVERY_RECIPE
def test_the_header_begins_with_commands_that_name_the_file_itself(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert re.findall(r"^#   derta (\w+) configs/(\w+)\.yaml", text, flags=re.MULTILINE) == [
        ("plan", name),
        ("train", name),
    ]


@EVERY_RECIPE
def test_a_recipe_has_the_papers_hyper_parameters(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    train, lora = config.train, config.lora
    assert config.model.path in PUBLISHED
    assert train.batch_size == 128
    assert train.steps == (100 if name.endswith("_100") else 1032)
    if lora is None:
        assert (train.learning_rate, train.schedule, train.warmup, train.weight_decay) == (2e-5, "cosine", 0.03, 2e-5)
        assert (train.sequence_length, config.objective.model_dump()["sorry_keep_rate"]) == (1024, 0.05)
    else:
        assert (train.learning_rate, train.schedule, train.warmup, train.weight_decay) == (1e-4, "linear", 0.0, 0.0)
        assert (train.sequence_length, config.objective.model_dump()["sorry_keep_rate"]) == (512, 1.0)
        assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (96, 16.0, 0.05, None)


@pytest.mark.parametrize("recipe", ["vanilla", "recaug", "rto"])
def test_an_ablation_is_one_override(recipe):
    config = load_config(CONFIGS / "llama3_8b_full.yaml", [f"data.recipe={recipe}"])
    assert config.data.recipe == recipe


def test_the_table_of_docs_planning_is_the_one_that_was_planned():
    guide, planned = (
        (ROOT / "docs" / "planning.md").read_text(),
        json.loads((ROOT / "docs" / "scaling.json").read_text()),
    )
    assert f"<!-- scaling -->\n{table(planned)}\n<!-- end of scaling -->" in guide


MEMORY = {
    ("llama3_8b_full", "v5e-16", ""): 11.39,
    ("llama3_8b_full", "v5e-16", "train.accumulation=8"): 8.69,
    ("mistral_7b_full", "v5e-16", ""): 10.75,
    ("llama3_70b_full", "v5p-128", ""): 21.58,
    ("mixtral_8x7b_full", "v5p-64", ""): 26.69,
    ("llama3_8b_lora", "v5e-8", "lora.dropout=0"): 6.26,
    ("llama3_70b_lora", "v5e-64", "train.sequence_length=1024 train.remat=offload"): 4.70,
}
"""Peak HBM of a chip in GiB, compiled at the least effort, which is within a few percent of a program that runs."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place", "override"), MEMORY, ids=lambda value: value or "as it is")
def test_a_step_takes_the_memory_that_it_took(name, place, override):
    pytest.importorskip("libtpu")
    config = load_config(CONFIGS / f"{name}.yaml", override.split())
    compiled = compile_for(config, architecture(config.model.path), find_slice(place), memory_only=True)
    assert compiled.peak_bytes / GIB == pytest.approx(MEMORY[name, place, override], rel=0.01)
    assert compiled.fits


def test_a_recipe_can_be_asked_about_where_it_does_not_fit(capsys):
    pytest.importorskip("libtpu")
    assert main(["plan", str(CONFIGS / "llama3_8b_full.yaml"), "--slice", "v5e-17"]) == 2
    assert "did you mean 'v5e-16'?" in capsys.readouterr().err
