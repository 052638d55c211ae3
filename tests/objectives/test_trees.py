"""Rows that share how they begin, computed as trees: fewer tokens, the same loss and the same gradients."""

import functools

import jax
import numpy as np
import pytest

from derta_jax.config import Data
from derta_jax.data.examples import Example, Helpful, Triple
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.template import Template
from derta_jax.data.tokenise import tokenise
from derta_jax.data.trees import grow, shared_length
from derta_jax.interop.hf_load import load_params, read_model_config
from derta_jax.interop.tokenizer import load_tokenizer
from derta_jax.models.decoder import Decoder
from derta_jax.models.lora import Adapter, adapter_variables
from derta_jax.objectives.derta import Derta
from derta_jax.objectives.dpo import DPO
from derta_jax.objectives.objective import objective_loss
from derta_jax.training.mesh import make_mesh
from derta_jax.training.step import accumulate, batch_sharding
from tests.conftest import helpful, triple
from tests.objectives.referee import drawn_factors
from tests.objectives.test_derta import MESHES, TEMPLATE, assert_close

LENGTH = 160
EXAMPLES: list[Example] = [*(Triple(**triple(i)) for i in range(6)), *(Helpful(**helpful(i)) for i in range(3))]
OBJECTIVES = {"derta": (Derta(), "derta"), "recaug": (Derta(), "recaug"), "dpo": (DPO(), "derta")}


class Case:
    """Rows of an objective, and its loss and gradients by an adapter that changes the model."""

    def __init__(self, directory, name):
        self.directory, (self.objective, recipe) = directory, OBJECTIVES[name]
        self.config = read_model_config(directory)
        tokenizer = load_tokenizer(directory)
        rows = self.objective.rows(EXAMPLES, Data(path="", recipe=recipe), seed=0)
        self.rows = list(tokenise(rows, tokenizer, Template(TEMPLATE, tokenizer), LENGTH))
        self.factors = drawn_factors(self.config)

    def batches(self, tree: bool, accumulation: int = 1, shards: int = 1) -> Batches:
        layout = Layout(2 * len(self.rows), LENGTH, accumulation, shards, tree=tree)
        return Batches(self.rows, layout, self.objective, 0, 1)

    def run(self, batches: Batches, attention: str = "xla", mesh=None):
        scales = dict.fromkeys(self.factors, 0.5)
        variables = adapter_variables({"default": Adapter(self.factors, scales)})
        model = Decoder(self.config, attention=attention)
        loss = objective_loss(self.objective, model, 1, batches.label_capacity)

        @jax.jit
        def run(params, lora, scale, batch):
            frozen = {"params": params, "lora_scale": scale}
            grads, metrics = accumulate(loss, {"lora": lora}, frozen, batch, jax.random.key(0))
            return metrics["loss_sum"] / metrics["weight_sum"], grads["lora"]["layers"]["default"]

        arguments = *jax.device_get((variables["lora"], variables["lora_scale"])), batches[0]
        if mesh is None:
            return run(load_params(self.directory, self.config), *arguments)
        with jax.set_mesh(mesh):
            *rest, batch = arguments
            params = load_params(self.directory, self.config, mesh=mesh)
            return run(params, *rest, jax.device_put(batch, batch_sharding(mesh)))

    @functools.cached_property
    def expected(self):
        return self.run(self.batches(tree=False))

    def agrees(self, found) -> None:
        loss, grads = found
        expected, reference = self.expected
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        for name, pair in reference.items():
            for side, grad in pair.items():
                assert_close(grads[name][side], grad, f"{name} {side}")


@functools.cache
def case_of(directory, name) -> Case:
    return Case(directory, name)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral", "tiny_mixtral"])
def test_trees_change_neither_loss_nor_gradients(family, name, request):
    case = case_of(request.getfixturevalue(family), name)
    trees = case.batches(tree=True)
    assert trees.trunks.sum() > 0.1 * sum(map(len, case.rows))
    case.agrees(case.run(trees))


@pytest.mark.parametrize("name", ["derta", "dpo"])
def test_nor_in_micro_batches_and_with_attention_in_blocks(name, tiny_llama):
    case = case_of(tiny_llama, name)
    case.agrees(case.run(case.batches(tree=True, accumulation=2)))
    case.agrees(case.run(case.batches(tree=True), attention="blocks"))


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_nor_on_eight_devices(shape, tiny_llama):
    case, mesh = case_of(tiny_llama, "dpo"), make_mesh(shape)
    case.agrees(case.run(case.batches(tree=True, shards=mesh.shape["data"] * mesh.shape["fsdp"]), mesh=mesh))


def test_all_that_a_derta_triple_shares_is_the_question_and_the_prefix(tiny_llama):
    case = case_of(tiny_llama, "derta")
    units, trunks = grow(case.rows, LENGTH)
    pairs = [unit for unit in units if len(unit) == 2]
    assert len(pairs) == 6
    for first, second in pairs:
        assert (case.rows[first].stream, case.rows[second].stream) == ("rto", "mle")
        prefix = case.rows[second]
        assert trunks[second] == np.flatnonzero(prefix.labelled)[0] - 1 or trunks[second] == shared_length(
            case.rows[first], prefix
        )
        assert trunks[first] == 0
    assert sorted(row for unit in units for row in unit) == list(range(len(case.rows)))


def test_rows_that_do_not_fit_together_stay_apart(tiny_llama):
    case = case_of(tiny_llama, "derta")
    longest = max(map(len, case.rows))
    units, trunks = grow(case.rows, longest)
    assert all(len(unit) == 1 for unit in units)
    assert not trunks.any()


def test_a_steps_rows_are_as_many_as_without_trees(tiny_llama):
    case = case_of(tiny_llama, "derta")
    counts = []
    for tree in (False, True):
        batches = Batches(case.rows, Layout(5, LENGTH, tree=tree), case.objective, 0, 60)
        counts.append(np.mean([len(batches.row_ids(step)) for step in range(60)]))
    assert counts[1] == pytest.approx(counts[0], rel=0.2)


def test_a_trees_tokens_say_what_they_are(tiny_llama):
    case = case_of(tiny_llama, "dpo")
    batch = {name: array[0] for name, array in case.batches(tree=True)[0].items()}
    trunk, branch = batch["trunk"] == 1, batch["trunk"] == 2
    assert trunk.any()
    assert not batch["keep"][trunk].any()  # the question teaches nothing
    for line, ids, positions in zip(branch, batch["segment_ids"], batch["positions"], strict=True):
        for segment in {*ids[line]}:
            mine, before = ids == segment, (ids == segment - 1)
            shared = int((trunk[(batch["segment_ids"] == ids).all(1)][0] & before).sum())
            assert positions[mine].tolist() == list(range(shared, shared + mine.sum()))
