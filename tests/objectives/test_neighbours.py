"""Security vectors and published neighbours against their equations in PyTorch, laid out in every way."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.config import Data, Lora, Model, RunConfig, Train
from derta_jax.data.examples import AuthorsRow, Example, Helpful, Triple
from derta_jax.data.loader import Batches
from derta_jax.data.packing import Layout
from derta_jax.data.template import Template
from derta_jax.data.tokenise import Region, TokenRow, tokenise
from derta_jax.errors import UserError
from derta_jax.interop.hf_load import load_params, read_model_config
from derta_jax.interop.tokenizer import load_tokenizer
from derta_jax.models.decoder import Decoder
from derta_jax.models.lora import Adapter, adapter_variables, target_rows
from derta_jax.objectives.circuit_breakers import CircuitBreakers
from derta_jax.objectives.constrained_sft import ConstrainedSFT
from derta_jax.objectives.deep_alignment import DeepAlignment
from derta_jax.objectives.derta_plus import DertaPlus
from derta_jax.objectives.objective import Method, objective_loss
from derta_jax.objectives.security_vectors import SecurityVectors
from derta_jax.objectives.view import View
from derta_jax.training.mesh import make_mesh
from derta_jax.training.step import accumulate, batch_sharding
from tests.conftest import helpful, triple
from tests.objectives.referee import drawn_factors
from tests.objectives.test_derta import MESHES, TEMPLATE, assert_close

LENGTH, SCALE, STEP = 96, 0.5, 40
REFUSAL = 1
EXAMPLES: list[Example] = [
    *(Triple(**triple(i)) for i in range(6)),
    *(Helpful(**helpful(i)) for i in range(4)),
    Helpful(**helpful(4, category="lookalike")),
]


class Torch:
    """The model of a directory with low-rank factors that have gradients, one layer and one matrix at a time."""

    def __init__(self, directory, factors):
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
        self.config = read_model_config(directory)
        self.factors = {
            name: {side: torch.tensor(array, requires_grad=True) for side, array in pair.items()}
            for name, pair in factors.items()
        }
        self.weights = dict(self.model.named_parameters())
        for row in target_rows(self.config):
            a, b = self.factors[row.name]["a"], self.factors[row.name]["b"]
            for place, name in row.hf_names(self.config).items():
                self.weights[name] = self.weights[name] + SCALE * (a[place] @ b[place]).T

    def run(self, row: TokenRow, adapted: bool = True):
        """(log-probabilities of the next token [n, V], residual streams behind layers [L, n, D])."""
        ids = torch.tensor(row.token_ids)[None].long()
        layers: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda module, inputs, output: layers.append(output))
            for layer in self.model.model.layers
        ]
        weights = self.weights if adapted else dict(self.model.named_parameters())
        with torch.set_grad_enabled(adapted):
            logits = torch.func.functional_call(self.model, weights, (ids,)).logits[0].float()
        for hook in hooks:
            hook.remove()
        return torch.log_softmax(logits, -1), torch.stack([layer.reshape(-1, layer.shape[-1]) for layer in layers])


def answer_nll(logs: torch.Tensor, row: TokenRow, label: int | None = None) -> torch.Tensor:
    """-log P of the row's labelled tokens, or of one label in place of each, in their order."""
    places = np.flatnonzero(row.labelled)
    labels = row.token_ids[places] if label is None else np.full(len(places), label)
    return -logs[torch.tensor(places - 1), torch.tensor(labels).long()]


def security_vectors(referee: Torch, rows: list[TokenRow], objective) -> torch.Tensor:
    harmful, divergences = [], []
    for row in rows:
        logs, _ = referee.run(row)
        if row.stream == "harmful":
            harmful.append(answer_nll(logs, row))
            continue
        base, _ = referee.run(row, adapted=False)
        above, below = (base, logs) if objective.kl_direction == "forward" else (logs, base)
        divergence = (above.exp() * (above - below)).sum(-1)
        divergences.append(divergence[torch.tensor(np.flatnonzero(row.labelled) - 1)])
    return torch.cat(harmful).mean() + objective.kl_weight * torch.cat(divergences).mean()


def circuit_breakers(referee: Torch, rows: list[TokenRow], objective) -> torch.Tensor:
    away, moved = [], []
    for row in rows:
        (_, ours), (_, base) = referee.run(row), referee.run(row, adapted=False)
        if row.stream == "harmful":
            chosen = torch.tensor(objective.layers) - 1
            away.append(torch.relu(torch.cosine_similarity(ours[chosen], base[chosen], dim=-1)))
        else:
            moved.append((ours - base).norm(dim=-1))
    progress = STEP / 300
    return 10 * (1 - progress) * torch.cat(away, 1).mean() + 10 * progress * torch.cat(moved, 1).mean()


def deep_alignment(referee: Torch, rows: list[TokenRow], objective) -> torch.Tensor:
    by_stream = {
        stream: torch.cat([answer_nll(referee.run(row)[0], row) for row in rows if row.stream == stream]).mean()
        for stream in objective.streams
    }
    return objective.alpha * by_stream["safety"] + (1 - objective.alpha) * by_stream["utility"]


def constrained_sft(referee: Torch, rows: list[TokenRow], objective) -> torch.Tensor:
    terms = []
    for row in rows:
        nll, reference = (answer_nll(referee.run(row, adapted)[0], row) for adapted in (True, False))
        beta = torch.full_like(nll, objective.beta)
        beta[: objective.early] = objective.early_beta
        beta[0] = objective.first_beta
        terms.append(-2 / beta * torch.nn.functional.logsigmoid(beta * (reference - nll)))
    return torch.cat(terms).mean()


def derta_plus(referee: Torch, rows: list[TokenRow], objective) -> torch.Tensor:
    terms, weights = [], 0.0
    for row in rows:
        logs, _ = referee.run(row)
        if row.stream == "rto":
            late = answer_nll(logs, row, REFUSAL)[objective.delay :]
            terms.append(objective.rto_weight * late)
            weights += objective.rto_weight * len(late)
        else:
            terms.append(answer_nll(logs, row))
            weights += len(terms[-1])
    return torch.cat(terms).sum() / weights


CASES = {
    "derta plus": (DertaPlus(delay=3, rto_weight=0.5), derta_plus),
    "security vectors": (SecurityVectors(kl_weight=0.7), security_vectors),
    "security vectors, reverse": (SecurityVectors(kl_weight=0.7, kl_direction="reverse"), security_vectors),
    "circuit breakers": (CircuitBreakers(layers=(1, 2)), circuit_breakers),
    "deep alignment": (DeepAlignment(), deep_alignment),
    "constrained": (ConstrainedSFT(early=3), constrained_sft),
}


class Case:
    """Rows of both streams, a model with an adapter that changes it, and what PyTorch says of them."""

    def __init__(self, directory, objective: Method, referee):
        self.directory, self.objective, self.referee = directory, objective, referee
        self.config = read_model_config(directory)
        tokenizer = load_tokenizer(directory)
        rows = objective.rows(EXAMPLES, Data(path=""), seed=0)
        self.rows = list(tokenise(rows, tokenizer, Template(TEMPLATE, tokenizer), LENGTH))
        self.factors = drawn_factors(self.config)

    @functools.cached_property
    def expected(self):
        """The loss, and its gradients by matrix and side."""
        referee = Torch(self.directory, self.factors)
        loss = self.referee(referee, self.rows, self.objective)
        loss.backward()
        grads = {
            name: {side: tensor.grad.numpy() for side, tensor in pair.items()} for name, pair in referee.factors.items()
        }
        return loss.item(), grads

    def batches(self, packed: bool = True, accumulation: int = 1, shards: int = 1) -> Batches:
        return Batches(self.rows, Layout(len(self.rows), LENGTH, accumulation, shards, packed), self.objective, 0, 1)

    def agrees(self, batches: Batches, mesh=None) -> None:
        variables = adapter_variables({"default": Adapter(self.factors, dict.fromkeys(self.factors, SCALE))})
        loss = objective_loss(self.objective, Decoder(self.config), REFUSAL, batches.label_capacity)

        @jax.jit
        def run(params, lora, scale, batch):
            frozen, key = {"params": params, "lora_scale": scale}, jax.random.key(0)
            grads, metrics = accumulate(loss, {"lora": lora}, frozen, batch, key, step=STEP)
            return metrics["loss_sum"] / metrics["weight_sum"], grads["lora"]["layers"]["default"]

        params, batch = load_params(self.directory, self.config, mesh=mesh), batches[0]
        lora, scale = jax.device_get((variables["lora"], variables["lora_scale"]))
        if mesh is None:
            found, grads = run(params, lora, scale, batch)
        else:
            with jax.set_mesh(mesh):
                found, grads = run(params, lora, scale, jax.device_put(batch, batch_sharding(mesh)))
        expected, reference = self.expected
        assert found == pytest.approx(expected, rel=1e-5)
        for name, pair in reference.items():
            for side, grad in pair.items():
                assert_close(grads[name][side], grad, f"{name} {side}")


@pytest.fixture(scope="module", params=CASES)
def case(request, tiny_llama) -> Case:
    return Case(tiny_llama, *CASES[request.param])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_every_adapter_gradient_agree_with_pytorch(case, packed, accumulation):
    case.agrees(case.batches(packed, accumulation))


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_eight_devices_agree_with_pytorch(case, shape):
    mesh = make_mesh(shape)
    case.agrees(case.batches(shards=mesh.shape["data"] * mesh.shape["fsdp"]), mesh)


def test_a_fresh_adapter_is_at_the_start_of_its_schedule_without_nan(tiny_llama):
    case = Case(tiny_llama, CircuitBreakers(layers=(1, 2)), circuit_breakers)
    fresh = {name: {"a": pair["a"], "b": np.zeros_like(pair["b"])} for name, pair in case.factors.items()}
    variables = adapter_variables({"default": Adapter(fresh, dict.fromkeys(fresh, SCALE))})
    batches = case.batches()
    loss = objective_loss(case.objective, Decoder(case.config), REFUSAL)
    frozen = {"params": load_params(tiny_llama, case.config), "lora_scale": variables["lora_scale"]}
    grads, metrics = jax.jit(functools.partial(accumulate, loss))(
        {"lora": variables["lora"]}, frozen, batches[0], jax.random.key(0), step=150
    )
    assert metrics["loss_sum"] == pytest.approx(5.0, rel=1e-5)
    assert metrics["distance"].total == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_recovery_rows_follow_no_prefix_half_of_the_time_and_up_to_a_hundred_words_else():
    long = [Triple(**triple(i, harmful=" ".join(f"word{n}" for n in range(250)))) for i in range(2000)]
    drawn = Counter(row.prefix_words for row in DeepAlignment().rows(long, Data(path=""), seed=0))
    assert 920 < drawn[0] < 1080
    assert set(drawn) == set(range(101))
    assert max(count for words, count in drawn.items() if words) < 30
    again = [row.prefix_words for row in DeepAlignment().rows(reversed(long), Data(path=""), seed=0)]
    assert Counter(again) == drawn


def test_a_prefix_is_no_longer_than_the_answer():
    triples = [Triple(**triple(i)) for i in range(6)]
    rows = list(DeepAlignment(no_prefix=0.0).rows(triples, Data(path=""), seed=0))
    for row, example in zip(rows, triples, strict=True):
        assert row.prefix_words
        assert example.harmful.startswith(row.harmful_prefix)


def test_each_stream_has_its_share_of_every_batch(tiny_llama):
    case = Case(tiny_llama, SecurityVectors(harmful_share=0.25), security_vectors)
    layout = Layout(4, LENGTH)
    source = Batches(case.rows, layout, case.objective, 0, 12, case.objective.shares)
    seen: Counter[str] = Counter()
    for step in range(12):
        streams = [case.rows[row].stream for sequence in source.sequences_of_step(step) for row in sequence]
        assert streams.count("harmful") == 1
        assert 1 <= streams.count("benign") <= 3
        seen.update(source.row_ids(step))
    assert {seen[row.id] for row in case.rows if row.stream == "harmful"} == {2}
    weights = source[0]["weight"]
    for place in range(2):
        assert weights[source[0]["stream"] == place].sum() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("objective", [SecurityVectors(), CircuitBreakers(), DeepAlignment(), ConstrainedSFT()])
def test_the_authors_rows_are_refused(objective):
    with pytest.raises(UserError, match=f"objective {objective.name}: a-1 is a row of the authors' files"):
        list(objective.rows([AuthorsRow("a-1", "[INST] How? ", "So.", rto=True)], Data(path=""), 0))


@pytest.mark.parametrize("objective", [SecurityVectors(), CircuitBreakers()])
def test_what_trains_an_adapter_needs_one(objective):
    sections = {"model": Model(path="m"), "data": Data(path="d"), "train": Train(output="o", steps=1)}
    with pytest.raises(ValueError, match=r"set lora\.rank"):
        RunConfig(**sections, objective=objective)
    RunConfig(**sections, objective=objective, lora=Lora())


def test_layers_that_a_model_does_not_have_are_refused(tiny_llama):
    with pytest.raises(UserError, match=r"objective.layers = \[10, 20\]: the model's layers are 1 to 2"):
        CircuitBreakers().check_model(read_model_config(tiny_llama))


def test_what_is_rerouted_and_retained_is_the_whole_row(tiny_llama):
    case = Case(tiny_llama, CircuitBreakers(layers=(1,)), circuit_breakers)
    batch = case.batches()[0]
    assert ((batch["weight"] > 0) == (batch["segment_ids"] > 0)).all()
    assert {row.stream for row in case.rows} == {"harmful", "retain"}
    assert any((row.regions == Region.RESPONSE).any() for row in case.rows)


def test_derta_plus_teaches_refusals_from_a_token_on_and_tells_lookalikes_apart(tiny_llama):
    case = Case(tiny_llama, DertaPlus(delay=3), derta_plus)
    assert [row.id for row in case.rows if row.stream == "lookalike"] == ["helpful-4"]
    for row in case.rows:
        kept = case.objective.keep(row, lambda: np.random.default_rng(0), LENGTH)
        assert row.labelled.sum() - kept.sum() == (3 if row.stream == "rto" else 0)
    micro = jax.tree.map(lambda array: array[0], case.batches()[0])
    view = View(Decoder(case.config), {"params": load_params(tiny_llama, case.config)}, REFUSAL)
    metrics = case.objective.loss(view, micro, None, STEP).metrics
    assert set(metrics) == {"loss_mle", "loss_rto", "loss_lookalike"}
    assert metrics["loss_lookalike"].count == sum(row.labelled.sum() for row in case.rows if row.stream == "lookalike")


def test_a_harmful_answer_shorter_than_the_delay_still_teaches_one_refusal(tiny_llama):
    case = Case(tiny_llama, DertaPlus(delay=500), derta_plus)
    for row in case.rows:
        if row.stream == "rto":
            kept = case.objective.keep(row, lambda: np.random.default_rng(0), LENGTH)
            assert np.flatnonzero(kept) == np.flatnonzero(row.labelled)[-1:]


def test_derta_plus_without_lookalikes_is_refused():
    with pytest.raises(UserError, match='give helpful rows that look harmful "category": "lookalike"'):
        list(DertaPlus().rows(EXAMPLES[:-1], Data(path=""), 0))
