"""What the adapters import, where everything is installed."""

import subprocess
import sys

import pytest

from tests.evaluation.adapters.conftest import ROOT


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("harness", {"torch", "transformers"}),
        ("inspect_api", {"torch", "transformers"}),
        ("inspect_registry", {"torch", "transformers", "jax"}),  # Inspect loads it whichever model is asked for
    ],
)
def test_an_adapter_imports_no_more_than_it_needs(module, absent):
    code = f"import sys, derta_jax.evaluation.adapters.{module}; print(*{absent!r} & sys.modules.keys())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert printed.split() == []
