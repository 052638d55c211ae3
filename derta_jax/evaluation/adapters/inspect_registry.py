"""What Inspect loads when it looks for models, before anyone has chosen ours: so nothing heavy."""

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="derta")
def derta() -> type[ModelAPI]:
    """The class of models named `derta/DIR`."""
    from derta_jax.evaluation.adapters.inspect_api import DertaAPI

    return DertaAPI
