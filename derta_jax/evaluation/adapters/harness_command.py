"""`derta-lm-eval`: lm-evaluation-harness's own command, with the model `derta` among its models.

lm-eval finds no models of other packages by itself, so this registers ours first. It also does without torch, which
lm-eval would import where it is installed, to seed it and to name its version.
"""

import os
import sys

from derta_jax.errors import UserError
from derta_jax.evaluation.adapters.without_torch import do_without_torch


def main() -> int:
    """Run lm-eval's command with the arguments of this process; returns the exit code, 2 for a user's mistake."""
    do_without_torch()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from lm_eval.__main__ import cli_evaluate

        import derta_jax.evaluation.adapters.harness  # noqa: F401  registers the model
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        print("derta-lm-eval: lm-eval is not installed: pip install 'derta-jax[eval]'", file=sys.stderr)
        return 2
    try:
        cli_evaluate()
    except UserError as error:
        print(f"derta-lm-eval: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
