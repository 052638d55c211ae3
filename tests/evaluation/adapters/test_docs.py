"""docs/benchmarks_elsewhere.md explains every option that there is."""

import re

import pytest

from derta_jax.evaluation.adapters import harness, inspect_api
from tests.evaluation.adapters.conftest import ROOT

TEXT = (ROOT / "docs" / "benchmarks_elsewhere.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("heading", "options"), [("--model_args", harness.OPTIONS), ("-M", inspect_api.OPTIONS)])
def test_the_tables_of_options_are_complete(heading, options):
    table = TEXT.partition(f"| `{heading}` | meaning |\n")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(options)
