"""Our train step, as `derta train` runs it."""

from typing import Any

import jax
import numpy as np

from derta_jax.benchmark.work import Work
from derta_jax.interop.hf_load import load_params
from derta_jax.training.mesh import make_mesh
from derta_jax.training.program import BatchShape, make_program
from derta_jax.training.step import GO_ON, cast_votes, init_state, to_devices


class Ours:
    """A model in training, on rows packed as `data.packing` says."""

    def __init__(self, work: Work, packing: str):
        self.work = work
        device = jax.local_devices()[0]
        self.accelerator = None if device.platform == "cpu" else device.device_kind
        config = work.bench.model_copy(update={"data": work.bench.data.model_copy(update={"packing": packing})})
        mesh = make_mesh(config.mesh)
        self.batches = work.batches(packing, mesh.size // mesh.shape["tensor"])
        shape = BatchShape(self.batches.sequences, self.batches.length, 1, self.batches.label_capacity)
        self.program = make_program(config, work.config, mesh, shape, work.refusal_id, self.batches.steps)
        params = load_params(work.model, work.config, "float32", mesh)
        self.state = init_state({"params": params}, self.program.optimizer, self.program.shardings)
        self.program.lower().compile()
        with jax.set_mesh(mesh):
            self.vote = cast_votes(GO_ON, mesh)

    def padded_tokens(self, number: int) -> int:
        """Places of a step's batch, filled or not."""
        return self.batches.sequences * self.batches.length

    def step(self, number: int) -> float:
        """Train on the rows of a step; its mean loss."""
        with jax.set_mesh(self.program.mesh):
            batch = to_devices(self.batches[number], self.program.mesh)
            self.state, sums = self.program.step(self.state, {}, batch, self.vote)
            sums = jax.device_get(sums)
        return float(sums["loss_sum"] / sums["weight_sum"])

    def product(self, sides: int) -> Any:
        """A product of two square matrices, for the machine's peak: a function that runs it and waits."""
        matrix = jax.numpy.asarray(np.random.default_rng(0).normal(size=(sides, sides)), self.program.model.dtype)
        multiply = jax.jit(lambda a, b: jax.numpy.matmul(a, b, preferred_element_type=jax.numpy.float32))
        return lambda: multiply(matrix, matrix).block_until_ready()

    def device_peak_bytes(self) -> int | None:
        """Of an accelerator's memory."""
        stats = jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else None
