"""DPO against its equation in PyTorch, laid out in every way, with either kind of reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.config import Data, MeshShape
from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.template import Template
from derta_jax.data.tokenise import tokenise
from derta_jax.errors import UserError
from derta_jax.interop.hf_load import load_params, read_model_config
from derta_jax.interop.tokenizer import load_tokenizer
from derta_jax.models.decoder import Decoder
from derta_jax.models.lora import Adapter, adapter_variables, factor_shapes, target_rows
from derta_jax.models.sharding import param_shardings
from derta_jax.objectives.dpo import DPO
from derta_jax.objectives.objective import objective_loss
from derta_jax.training.mesh import make_mesh
from derta_jax.training.step import accumulate, batch_sharding
from tests.conftest import helpful, triple
from tests.objectives.test_derta import MESHES, TEMPLATE, assert_close, assert_grads_equal, assert_grads_equal_torch

LENGTH, BETA = 192, 0.3
EXAMPLES: list[Example] = [
    *(Triple(**triple(i)) for i in range(6)),
    *(Helpful(**helpful(i), rejected="I do not know" + ", sorry" * i) for i in range(2)),
    Helpful(**helpful(9)),
]


class Case:
    """Eight pairs, a model, and another that is its reference."""

    def __init__(self, directory):
        self.directory, self.objective = directory, DPO(beta=BETA)
        self.config = read_model_config(directory)
        tokenizer = load_tokenizer(directory)
        rows = self.objective.rows(EXAMPLES, Data(path=""), seed=0)
        self.rows = list(tokenise(rows, tokenizer, Template(TEMPLATE, tokenizer), LENGTH))
        self.params = load_params(directory, self.config)

    @functools.cached_property
    def reference(self) -> list[np.ndarray]:
        """-log P of each row's tokens by a model whose head is another."""
        model = self.torch_model(other=True)
        with torch.no_grad():
            return [nll_of(model, row) for row in self.rows]

    def torch_model(self, other: bool = False):
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        if other:
            with torch.no_grad():
                model.lm_head.weight *= 0.5
        return model

    def batches(self, packed: bool = True, accumulation: int = 1, shards: int = 1, reference: bool = True) -> Batches:
        layout = Layout(len(self.rows) // 2, LENGTH, accumulation, shards, packed)
        return Batches(self.rows, layout, self.objective, 0, 1, reference=self.reference if reference else None)

    def ours(self, batches: Batches, variables, frozen=None, mesh=None):
        loss = objective_loss(self.objective, Decoder(self.config), 1, batches.label_capacity)

        @jax.jit
        def run(variables, frozen, batch):
            shardings = None if mesh is None else {"params": param_shardings(self.config, mesh)}
            grads, metrics = accumulate(loss, variables, frozen, batch, jax.random.key(0), shardings=shardings)
            return metrics, grads

        if mesh is None:
            return jax.device_get(run(variables, frozen or {}, batches[0]))
        with jax.set_mesh(mesh):
            placed = jax.device_put(batches[0], batch_sharding(mesh))
            return jax.device_get(run({"params": load_params(self.directory, self.config, mesh=mesh)}, {}, placed))


def nll_of(model, row) -> np.ndarray:
    ids = torch.tensor(row.token_ids)[None].long()
    logs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    found = -logs[torch.arange(len(row) - 1), ids[0, 1:]]
    return np.concatenate([[0], found.numpy()]).astype(np.float32)


def referee_loss(case: Case, model, reference) -> torch.Tensor:
    """Equation 7, a pair at a time, from the sums of answers' log-probabilities."""

    def log_p(model, row):
        ids = torch.tensor(row.token_ids)[None].long()
        logs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        return (logs[torch.arange(len(row) - 1), ids[0, 1:]] * torch.tensor(row.labelled[1:])).sum()

    total = torch.zeros(())
    for chosen, rejected in zip(case.rows[::2], case.rows[1::2], strict=True):
        with torch.no_grad():
            gain = log_p(reference, chosen) - log_p(reference, rejected)
        margin = log_p(model, chosen) - log_p(model, rejected) - gain
        total = total - torch.nn.functional.logsigmoid(BETA * margin)
    return total / (len(case.rows) // 2)


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_mistral"])
def case(request) -> Case:
    return Case(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def referee(case):
    """The loss, and its gradients by parameter name."""
    model = case.torch_model()
    loss = referee_loss(case, model, case.torch_model(other=True))
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


LAYOUTS = [(packed, accumulation) for packed in (True, False) for accumulation in (1, 2)]


@pytest.mark.parametrize(("packed", "accumulation"), LAYOUTS)
def test_loss_and_every_gradient_agree_with_pytorch(case, referee, packed, accumulation):
    metrics, grads = case.ours(case.batches(packed, accumulation), {"params": case.params})
    assert metrics["loss_sum"] / metrics["weight_sum"] == pytest.approx(referee[0], rel=1e-5)
    assert metrics["weight_sum"] == 8
    assert_grads_equal_torch(case.config, grads["params"], referee[1])


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_eight_devices_agree_with_pytorch(case, referee, shape: MeshShape):
    mesh = make_mesh(shape)
    batches = case.batches(shards=mesh.shape["data"] * mesh.shape["fsdp"])
    metrics, grads = case.ours(batches, {}, mesh=mesh)
    assert metrics["loss_sum"] / metrics["weight_sum"] == pytest.approx(referee[0], rel=1e-5)
    assert_grads_equal_torch(case.config, grads["params"], referee[1])


def adapter_of(case: Case):
    draw = np.random.default_rng(0)
    factors = {
        row.name: {
            name: jnp.float32(draw.normal(size=shape, scale=0.05))
            for name, shape in factor_shapes(case.config, row, 4).items()
        }
        for row in target_rows(case.config)
    }
    return adapter_variables({"default": Adapter(factors, dict.fromkeys(factors, 1.0))})


def test_beneath_an_adapter_lies_the_reference(case):
    """Switched off in the same program, or computed before by torch: the same loss and gradients."""
    variables = adapter_of(case)
    frozen = {"params": case.params, "lora_scale": variables["lora_scale"]}
    base = case.torch_model()
    with torch.no_grad():
        case_of_base = [nll_of(base, row) for row in case.rows]
    cached = Batches(case.rows, case.batches().layout, case.objective, 0, 1, reference=case_of_base)
    found, grads = case.ours(case.batches(reference=False), {"lora": variables["lora"]}, frozen)
    expected, reference = case.ours(cached, {"lora": variables["lora"]}, frozen)
    assert_close(found["loss_sum"], expected["loss_sum"])
    assert_grads_equal(grads, reference)


def test_a_model_that_is_its_own_reference_has_no_margin(case):
    fresh = adapter_of(case)
    switched_off = jax.tree.map(jnp.zeros_like, fresh["lora_scale"])
    frozen = {"params": case.params, "lora_scale": switched_off}
    metrics, _ = case.ours(case.batches(reference=False), {"lora": fresh["lora"]}, frozen)
    assert metrics["margin"].total == 0
    assert metrics["accuracy"] == (0, 8)
    assert metrics["loss_sum"] / 8 == pytest.approx(np.log(2), rel=1e-6)


def test_both_answers_of_a_pair_stand_side_by_side_and_share_its_room(case):
    assert {row.pair for row in case.rows} == {example.id for example in EXAMPLES[:-1]}
    assert max(map(len, case.rows)) <= LENGTH // 2
    batch = case.batches()[0]
    for streams, segments in zip(batch["stream"][0], batch["segment_ids"][0], strict=True):
        by_segment = [int(streams[segments == number][0]) for number in range(1, segments.max() + 1)]
        assert by_segment == [0, 1] * (len(by_segment) // 2)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([Helpful(**helpful(0))], "has no pair; it takes triples"),
        ([AuthorsRow("a-1", "[INST] How? ", "So.", rto=False)], "a-1 is a row of the authors' files"),
    ],
)
def test_data_without_pairs_is_refused(examples, message):
    with pytest.raises(UserError, match=message):
        list(DPO().rows(examples, Data(path=""), 0))


@pytest.mark.parametrize("beta", [0, -1, "much", [[0, 0.1], [5, 0]]])
def test_a_beta_that_cannot_be_is_refused(beta):
    with pytest.raises(ValueError, match="beta"):
        DPO(beta=beta)
