"""`derta serve`, where the packages that it needs may be missing."""

from rich.console import Console

from derta_jax.errors import UserError
from derta_jax.evaluation.serving.settings import Serving
from derta_jax.evaluation.subject import Generation


def serve(model: str, generation: Generation, serving: Serving, console: Console) -> None:
    """Answer requests until Ctrl-C or SIGTERM; `generation` says how the model lies, and how many have a slot."""
    try:
        from derta_jax.evaluation.serving.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise UserError("derta serve needs fastapi and uvicorn: pip install 'derta-jax[serve]'") from error
    run(model, generation, serving, console)
