"""P(refusal token) by place in the answer, against every row run alone and its full softmax."""

import math

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.data.tokenise import Region, TokenRow
from derta_jax.interop.hf_load import load_params
from derta_jax.models.decoder import Decoder
from derta_jax.objectives.derta import Derta
from derta_jax.objectives.objective import Mean
from derta_jax.objectives.refusal_curve import (
    BUCKET_ENDS,
    KINDS,
    bucket_count,
    mean_by_bucket,
    place_weights,
    refusal_sums,
)
from derta_jax.objectives.view import View
from derta_jax.training.mesh import make_mesh
from derta_jax.training.step import batch_sharding
from tests.objectives.test_derta import LENGTH, MESHES, Case

OBJECTIVE = Derta(loss_chunk=64)


@pytest.fixture(scope="module")
def case(tiny_llama) -> Case:
    return Case(tiny_llama, "derta", OBJECTIVE)


def probabilities_of(model, row: TokenRow, refusal_id: int) -> np.ndarray:
    """P(refusal token) at each place of the row's answer, eos's place included: the full softmax of the row alone."""
    softmax = torch.softmax(model(torch.tensor(row.token_ids)[None].long()).logits[0].double(), -1)
    start = int(np.argmax(row.regions >= Region.RESPONSE))
    return softmax[start - 1 : len(row) - 1, refusal_id].numpy()


def bucket_of(place: int) -> int:
    return 0 if place == 0 else 1 + math.ceil(math.log2(place))


@pytest.fixture(scope="module")
def reference(case) -> dict[str, dict[int, list[float]]]:
    """Kind → bucket → the probabilities that fall into it."""
    model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float32)
    found: dict[str, dict[int, list[float]]] = {kind: {} for kind in KINDS}
    with torch.no_grad():
        for row in case.rows:
            if row.stream == "mle" and (row.regions == Region.HARMFUL_PREFIX).any():
                continue
            for place, p in enumerate(probabilities_of(model, row, case.refusal)):
                found["harmful" if row.stream == "rto" else "helpful"].setdefault(bucket_of(place), []).append(p)
    return found


def sums_of(case: Case, batches, mesh=None) -> Mean:
    @jax.jit
    def run(params, batch):
        view = View(
            Decoder(case.config), {"params": params}, case.refusal, batches.label_capacity, OBJECTIVE.loss_chunk
        )
        return jax.lax.map(lambda micro: refusal_sums(view, micro, micro["stream"] == 1), batch)

    if mesh is None:
        by_micro_batch = run(case.params, batches[0])
    else:
        with jax.set_mesh(mesh):
            params = load_params(case.directory, case.config, mesh=mesh)
            by_micro_batch = run(params, jax.device_put(batches[0], batch_sharding(mesh)))
    return Mean(*(sums.sum(0) for sums in jax.device_get(by_micro_batch)))


def assert_curves_equal(sums: Mean, reference) -> None:
    for kind, totals, counts in zip(KINDS, *sums, strict=True):
        curve = mean_by_bucket(totals, counts)
        assert [bucket["n"] for bucket in curve] == [len(values) for _, values in sorted(reference[kind].items())]
        expected = [np.mean(values) for _, values in sorted(reference[kind].items())]
        np.testing.assert_allclose([bucket["p"] for bucket in curve], expected, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_curves_are_the_full_softmax_of_every_row_alone(case, reference, packed, accumulation):
    assert all(len(buckets) > 4 for buckets in reference.values())
    assert_curves_equal(sums_of(case, case.batch(packed, accumulation)), reference)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_eight_devices_give_the_curves_of_one(case, reference, shape):
    mesh = make_mesh(shape)
    batches = case.batch(shards=mesh.shape["data"] * mesh.shape["fsdp"])
    assert_curves_equal(sums_of(case, batches, mesh), reference)


P, H, R, E = Region.PROMPT, Region.HARMFUL_PREFIX, Region.RESPONSE, Region.EOS


def places(regions: list[int], segments: list[int], rto: list[int], keep: list[bool] | None = None):
    """One sequence → for each token its (kind, bucket), None where it counts for nothing."""
    arrays = {
        "regions": np.array([regions], np.uint8),
        "segment_ids": np.array([segments], np.int32),
        "keep": np.array([keep or [region >= R for region in regions]]),
    }
    batch = {name: jax.numpy.asarray(array) for name, array in arrays.items()}
    (weights,) = np.asarray(place_weights(batch, jax.numpy.array([rto], bool)))
    assert set(np.unique(weights)) <= {0.0, 1.0}
    return [tuple(map(int, np.argwhere(token)[0])) if token.any() else None for token in weights]


def test_places_count_from_the_start_of_the_answer_in_each_packed_row():
    regions = [P, P, R, R, R, R, R, E, P, R, E, 0]
    segments = [1] * 8 + [2] * 3 + [0]
    buckets = [None, None, 0, 1, 2, 3, 3, 4, None, 0, 1, None]
    for rto, kind in ((1, 0), (0, 1)):
        found = places(regions, segments, [rto] * 12)
        assert found == [None if bucket is None else (kind, bucket) for bucket in buckets]


def test_an_answer_after_a_harmful_prefix_is_neither_harmful_nor_helpful():
    found = places([P, H, R, E, P, R, E], [1] * 4 + [2] * 3, [0] * 7)
    assert found == [None] * 5 + [(1, 0), (1, 1)]


def test_a_place_without_a_label_is_left_out_but_counted_on():
    found = places([R, R, R, E], [1] * 4, [1] * 4, keep=[False, True, False, True])
    assert found == [None, (0, 1), None, (0, 3)]


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 17, 18, LENGTH, 1024])
def test_there_are_just_enough_buckets_for_the_sequence_length(length):
    count = bucket_count(length)
    assert BUCKET_ENDS[count - 1] >= length - 1
    assert count == 1 or BUCKET_ENDS[count - 2] < length - 1


def test_buckets_say_which_places_they_hold_and_empty_ones_are_left_out():
    assert mean_by_bucket([1.0, 0.0, 1.5, 4.0, 0.0], [2, 4, 2, 4, 0]) == [
        {"from": 0, "to": 0, "p": 0.5, "n": 2},
        {"from": 1, "to": 1, "p": 0.0, "n": 4},
        {"from": 2, "to": 2, "p": 0.75, "n": 2},
        {"from": 3, "to": 4, "p": 1.0, "n": 4},
    ]
    assert mean_by_bucket([0.0], [0]) == []
