"""TPU kernels on a CPU: their programs, interpreted."""

import jax


def interpret_tpu_kernels(monkeypatch) -> None:
    """Compile what a TPU would get wherever it has a program of its own; other choices of a platform stay."""
    choose = jax.lax.platform_dependent

    def interpreted(*operands, **programs):
        if "tpu" in programs:
            return programs["tpu"](*operands, interpret=True)
        return choose(*operands, **programs)

    monkeypatch.setattr(jax.lax, "platform_dependent", interpreted)
