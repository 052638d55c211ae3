"""The objective against a PyTorch referee, and against itself laid out in every other way."""

import functools

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.config import Data, MeshShape
from derta_jax.data.examples import Example, Helpful, Triple
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.recipes import first_words, rows_from_examples
from derta_jax.data.template import Template
from derta_jax.data.tokenise import tokenise
from derta_jax.interop.hf_load import load_params, read_model_config
from derta_jax.interop.tokenizer import load_tokenizer, refusal_token_id
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.models.params import leaves_with_rows
from derta_jax.models.sharding import param_shardings
from derta_jax.objectives.derta import Derta
from derta_jax.objectives.objective import objective_loss
from derta_jax.training.mesh import make_mesh
from derta_jax.training.step import accumulate, batch_sharding
from tests.conftest import helpful, triple
from tests.objectives import referee

TEMPLATE = Data.model_fields["template"].default
LENGTH = 96
MESHES = {
    "fsdp 8": MeshShape(fsdp=8),
    "fsdp 4 × tensor 2": MeshShape(fsdp=4, tensor=2),
    "data 2 × fsdp 2 × tensor 2": MeshShape(data=2, fsdp=2, tensor=2),
}


class Case:
    """Six triples and four helpful rows under a recipe, as our batches and as the referee's rows."""

    def __init__(self, directory, recipe: str, objective: Derta | None = None):
        self.directory, self.recipe, self.objective = directory, recipe, objective or Derta()
        self.config = read_model_config(directory)
        self.tokenizer = load_tokenizer(directory)
        self.refusal = refusal_token_id(self.tokenizer, "Sorry")
        self.examples: list[Example] = [
            *(Triple(**triple(i)) for i in range(6)),
            *(Helpful(**helpful(i)) for i in range(4)),
        ]
        rows = list(rows_from_examples(self.examples, recipe, seed=3))
        self.prefix_words = {row.id: row.prefix_words or 0 for row in rows}
        self.rows = list(tokenise(rows, self.tokenizer, Template(TEMPLATE, self.tokenizer), LENGTH))
        self.params = load_params(directory, self.config)

    def batch(self, packed: bool = True, accumulation: int = 1, shards: int = 1):
        layout = Layout(len(self.rows), LENGTH, accumulation, shards, packed)
        return Batches(self.rows, layout, self.objective, seed=0, steps=1)

    def ours(self, batches: Batches, mesh=None, remat: str = "none", mean_of_means: bool = False):
        """Loss and gradients, as the train step computes them."""
        model = Decoder(self.config, remat=remat)
        loss = objective_loss(self.objective, model, self.refusal, batches.label_capacity)

        @jax.jit
        def run(params, batch):
            key = jax.random.key(0)
            shardings = None if mesh is None else {"params": param_shardings(self.config, mesh)}
            grads, metrics = accumulate(loss, {"params": params}, {}, batch, key, mean_of_means, shardings)
            return metrics["loss_sum"] / metrics["weight_sum"], grads["params"]

        if mesh is None:
            mean, grads = run(self.params, batches[0])
        else:
            params = load_params(self.directory, self.config, mesh=mesh)
            with jax.set_mesh(mesh):
                mean, grads = run(params, jax.device_put(batches[0], batch_sharding(mesh)))
        return float(mean), jax.device_get(grads)

    def referee_rows(self) -> list[referee.Row]:
        return [row for example in self.examples for row in self._rows_of(example)]

    def _rows_of(self, example) -> list[referee.Row]:
        prompt = TEMPLATE.replace("{prompt}", example.prompt)
        if isinstance(example, Helpful):
            return [self._mle(prompt, " " + example.response)]
        if self.recipe == "recaug":
            return [self._prefixed(example, prompt, "prefix-0"), self._prefixed(example, prompt, "prefix-1")]
        plain = self._mle(prompt, " " + example.safe)
        if self.recipe == "vanilla":
            return [plain, plain]
        harmful = self._encode(" " + example.harmful)
        rto = referee.rto_row(self._ids(prompt), harmful, self.tokenizer.eos_id, self.refusal)
        return [plain if self.recipe == "rto" else self._prefixed(example, prompt, "prefix-0"), rto]

    def _prefixed(self, example, prompt: str, name: str) -> referee.Row:
        """The safe answer after the k words that our draw took; how k is drawn is the recipes' own test."""
        words = first_words(example.harmful, self.prefix_words[f"{example.id}#{name}"])
        return self._mle(prompt + (f" {words}" if words else ""), " " + example.safe)

    def _mle(self, prompt: str, response: str) -> referee.Row:
        return referee.mle_row(self._ids(prompt), self._encode(response), self.tokenizer.eos_id)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.prompt_ids(text)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


def torch_loss_and_grads(case: Case, loss_of):
    model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float32)
    loss = loss_of(model)
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def assert_grads_equal_torch(config: ModelConfig, grads, reference) -> None:
    for row, grad in leaves_with_rows(config, grads):
        for place, name in row.hf_names(config).items():
            mine = np.asarray(grad[place])
            assert_close(mine.T if row.transposed else mine, reference[name], name)


def assert_grads_equal(mine, reference) -> None:
    jax.tree.map(lambda a, b: assert_close(np.asarray(a), np.asarray(b)), mine, reference)


def assert_close(actual, expected, name: str = "") -> None:
    """Within 1e-5 of the tensor's largest entry."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
@pytest.mark.parametrize("recipe", ["vanilla", "recaug", "rto", "derta"])
def test_loss_and_every_gradient_agree_with_pytorch(family, recipe, request):
    case = Case(request.getfixturevalue(family), recipe)
    rows = case.referee_rows()
    loss, grads = case.ours(case.batch())
    expected, reference = torch_loss_and_grads(
        case, lambda model: referee.weighted_mean_loss(model, rows, [1.0] * len(rows))
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_grads_equal_torch(case.config, grads, reference)


def test_the_rto_weight_weighs_rto_tokens_in_sum_and_mean(tiny_llama):
    case = Case(tiny_llama, "derta", Derta(rto_weight=0.3))
    rows = case.referee_rows()
    weights = [0.3 if labels[-1] == case.refusal else 1.0 for _, labels in rows]
    loss, grads = case.ours(case.batch())
    expected, reference = torch_loss_and_grads(case, lambda model: referee.weighted_mean_loss(model, rows, weights))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_grads_equal_torch(case.config, grads, reference)


def test_paper_mode_is_the_mean_of_micro_batch_means(tiny_llama):
    case = Case(tiny_llama, "derta", Derta(paper=True))
    batches = case.batch(packed=False, accumulation=4)
    by_tokens = {tuple(tokens): (tokens, labels) for tokens, labels in case.referee_rows()}
    micro_batches = [
        [by_tokens[tuple(ids[segments > 0].tolist())] for ids, segments in zip(*micro, strict=True) if segments.any()]
        for micro in zip(batches[0]["token_ids"], batches[0]["segment_ids"], strict=True)
    ]
    loss, grads = case.ours(batches, mean_of_means=True)
    expected, reference = torch_loss_and_grads(case, lambda model: referee.mean_of_means_loss(model, micro_batches))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_grads_equal_torch(case.config, grads, reference)


@pytest.fixture(scope="module")
def case(tiny_llama) -> Case:
    return Case(tiny_llama, "derta", Derta(rto_weight=0.7, sorry_keep_rate=0.3))


@pytest.fixture(scope="module")
def reference(case):
    """One row a sequence, one device, no accumulation, no remat, every position's logits at once."""
    return case.ours(case.batch(packed=False))


def test_packing_does_not_change_loss_or_gradients(case, reference):
    packed = case.batch()
    assert packed.sequences < len(case.rows)
    loss, grads = case.ours(packed)
    assert loss == pytest.approx(reference[0], rel=1e-5)
    assert_grads_equal(grads, reference[1])


def test_packing_does_not_change_a_sliding_window(tiny_mistral):
    case = Case(tiny_mistral, "derta")
    loss, grads = case.ours(case.batch())
    alone_loss, alone_grads = case.ours(case.batch(packed=False))
    assert loss == pytest.approx(alone_loss, rel=1e-5)
    assert_grads_equal(grads, alone_grads)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_loss_or_gradients(case, reference, accumulation):
    loss, grads = case.ours(case.batch(accumulation=accumulation))
    assert loss == pytest.approx(reference[0], rel=1e-5)
    assert_grads_equal(grads, reference[1])


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_rematerialisation_does_not_change_loss_or_gradients(case, reference, remat):
    loss, grads = case.ours(case.batch(), remat=remat)
    assert loss == pytest.approx(reference[0], rel=1e-5)
    assert_grads_equal(grads, reference[1])


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_eight_devices_give_the_loss_and_gradients_of_one(case, reference, shape):
    mesh = make_mesh(shape)
    batches = case.batch(accumulation=2, shards=mesh.shape["data"] * mesh.shape["fsdp"])
    loss, grads = case.ours(batches, mesh=mesh, remat="full")
    assert loss == pytest.approx(reference[0], rel=1e-5)
    assert_grads_equal(grads, reference[1])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_loss_does_not_depend_on_the_chunk(tiny_llama, case, reference, chunk):
    chunked = Case(tiny_llama, "derta", case.objective.model_copy(update={"loss_chunk": chunk}))
    loss, grads = chunked.ours(chunked.batch())
    assert loss == pytest.approx(reference[0], rel=1e-5)
    assert_grads_equal(grads, reference[1])


def test_metrics_are_plain_sums_of_both_kinds(case):
    batches = case.batch()
    loss = objective_loss(case.objective, Decoder(case.config), case.refusal)
    micro = {name: array[0] for name, array in batches[0].items()}
    loss_sum, weight_sum, sums = jax.device_get(loss({"params": case.params}, micro, jax.random.key(0)))
    keep, rto = batches[0]["keep"], batches[0]["stream"] == 1
    mle, of_rto = sums["loss_mle"], sums["loss_rto"]
    assert mle.count == (keep & ~rto).sum()
    assert of_rto.count == (keep & rto).sum()
    assert weight_sum == pytest.approx(mle.count + 0.7 * of_rto.count)
    assert loss_sum == pytest.approx(mle.total + 0.7 * of_rto.total, rel=1e-6)


def test_a_scheduled_weight_is_that_of_its_step(case):
    batches = case.batch()
    micro = {name: array[0] for name, array in batches[0].items()}
    scheduled = case.objective.model_copy(update={"rto_weight": ((10, 0.0), (20, 0.7))})
    for step, weight in ((0, 0.0), (10, 0.0), (15, 0.35), (20, 0.7), (1000, 0.7)):
        objective = case.objective.model_copy(update={"rto_weight": weight})
        expected, found = (
            jax.jit(
                functools.partial(objective_loss(each, Decoder(case.config), case.refusal), {"params": case.params})
            )(micro, jax.random.key(0), step)[:2]
            for each in (objective, scheduled)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6)
