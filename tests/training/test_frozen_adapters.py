"""Training beneath an adapter that is active and stays as it is: the second phase of security vectors."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from derta_jax.errors import StoppedEarly, UserError
from derta_jax.interop.hf_load import load_pretrained
from derta_jax.interop.peft import load_adapter
from derta_jax.models.lora import DEFAULT, adapter_variables, target_rows
from derta_jax.objectives.objective import objective_loss, of_config
from derta_jax.training.checkpoint import Checkpoints
from derta_jax.training.export import export_model
from derta_jax.training.loop import train
from derta_jax.training.run import describe, prepare_run
from derta_jax.training.start import first_state, frozen_variables
from derta_jax.training.step import GO_ON, accumulate, cast_votes, to_devices
from tests.conftest import write_tiny_model
from tests.objectives.test_derta import assert_grads_equal_torch
from tests.training.conftest import losses_of, make_run_config, stop_after

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture(scope="module")
def vectors(tiny_llama, example_rows, tmp_path_factory, console):
    """The run and the PEFT directory of an adapter whose factors are not small."""
    directory = tmp_path_factory.mktemp("vectors")
    train_section = {"learning_rate": 3e-2, "steps": 12}
    objective = {"name": "security_vectors"}
    config = make_run_config(
        tiny_llama, example_rows, directory / "run", lora=LORA, train=train_section, objective=objective
    )
    train(config, console)
    export_model(config.train.output, directory / "peft", console, dtype="float32")
    return directory


@pytest.fixture
def beneath(tiny_llama, example_rows, tmp_path, vectors):
    """A config that trains beneath the vectors."""

    def make(name="run", adapter="peft", **sections):
        sections = {"frozen_adapters": {"vectors": str(vectors / adapter)}} | sections
        return make_run_config(tiny_llama, example_rows, tmp_path / name, **sections)

    return make


def test_the_vectors_lower_the_loss_on_harmful_answers(vectors):
    records = [json.loads(line) for line in (vectors / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss_harmful"] < 0.6 * records[0]["loss_harmful"]
    assert records[0]["loss_kl"] == 0


def test_gradients_beneath_a_frozen_adapter_agree_with_pytorch(beneath, tiny_llama, vectors, console):
    run = prepare_run(beneath(objective={"rto_weight": 1.0}), console)
    model, params = load_pretrained(tiny_llama)
    adapter = load_adapter(vectors / "peft", model.config)
    loss = objective_loss(of_config(run.config), run.program.model, run.refusal_id)
    batch = run.batches[0]
    grads, metrics = jax.jit(functools.partial(accumulate, loss))(
        {"params": params}, adapter_variables({"vectors": adapter}), batch, jax.random.key(0)
    )

    referee = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    weights = dict(referee.named_parameters())
    for row in target_rows(model.config):
        pair = {side: torch.tensor(np.asarray(array)) for side, array in adapter.factors[row.name].items()}
        for place, name in row.hf_names(model.config).items():
            weights[name] = weights[name] + adapter.scales[row.name] * (pair["a"][place] @ pair["b"][place]).T
    total = torch.zeros(())
    refusal = torch.tensor(run.refusal_id)
    for sequence in range(batch["token_ids"].shape[1]):
        arrays = {name: torch.tensor(array[0, sequence].astype(np.int64)) for name, array in batch.items()}
        for segment in range(1, int(arrays["segment_ids"].max()) + 1):
            here = arrays["segment_ids"] == segment
            ids, keep = arrays["token_ids"][here], arrays["keep"][here].bool()
            labels = torch.where(arrays["stream"][here] == 1, refusal, ids)
            logits = torch.func.functional_call(referee, weights, (ids[None],)).logits[0]
            nll = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none")
            total = total + (nll * keep[1:]).sum()
    (total / int(batch["keep"].sum())).backward()
    assert metrics["loss_sum"] / metrics["weight_sum"] == pytest.approx(total.item() / batch["keep"].sum(), rel=1e-5)
    reference = {name: parameter.grad.numpy() for name, parameter in referee.named_parameters()}
    assert_grads_equal_torch(model.config, grads["params"], reference)


@pytest.mark.parametrize("lora", [{}, {"lora": LORA}], ids=["all parameters", "a task adapter"])
def test_steps_change_what_is_trained_and_no_bit_of_the_vectors(beneath, console, lora):
    run = prepare_run(beneath(**lora), console)
    with Checkpoints(run.output / "checkpoints") as checkpoints:
        state = first_state(run, checkpoints, console)
    frozen = frozen_variables(run, console)
    before = jax.device_get((frozen, state.trainable))
    with jax.set_mesh(run.mesh):
        for step in range(3):
            state, _ = run.program.step(
                state, frozen, to_devices(run.batches[step], run.mesh), cast_votes(GO_ON, run.mesh)
            )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before[0])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), jax.device_get(state.trainable), before[1])
    assert all(jax.tree.leaves(changed))
    assert set(frozen["lora"]["layers"]) == {"vectors"}
    assert set(frozen["lora_scale"]["layers"]) == {"vectors", *([DEFAULT] if lora else [])}


@pytest.mark.parametrize("adapter", ["peft", "run"])
def test_they_change_the_course_of_training_and_are_told_of(
    beneath, example_rows, tiny_llama, tmp_path, console, adapter
):
    with_them, without = beneath(adapter=adapter), make_run_config(tiny_llama, example_rows, tmp_path / "without")
    train(with_them, console)
    train(without, console)
    assert losses_of(with_them)[0] != pytest.approx(losses_of(without)[0], rel=1e-3)
    assert "frozen    adapters that are active and not trained: vectors" in describe(prepare_run(with_them, console))


def test_what_is_exported_holds_no_vectors(beneath, tmp_path, console):
    config = beneath()
    train(config, console)
    export_model(config.train.output, tmp_path / "exported", console, dtype="float32")
    _, exported = load_pretrained(tmp_path / "exported")
    run = prepare_run(config, console)
    with Checkpoints(run.output / "checkpoints") as checkpoints:
        state = first_state(run, checkpoints, console)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(exported), jax.device_get(state.trainable["params"]))


def test_a_resumed_run_goes_on_beneath_the_same_vectors_alone(beneath, vectors, tmp_path, console, monkeypatch):
    whole, stopped = beneath("whole"), beneath("stopped")
    train(whole, console)
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(StoppedEarly):
            train(stopped, console)
    nudged = tmp_path / "nudged"
    nudged.mkdir()
    for file in (vectors / "peft").iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            content = content[:-1] + bytes([content[-1] ^ 1])
        (nudged / file.name).write_bytes(content)
    other = stopped.model_copy(update={"frozen_adapters": {"vectors": str(nudged)}})
    with pytest.raises(UserError, match=r"frozen_adapters\.vectors"):
        train(other, console)
    train(stopped, console)
    np.testing.assert_array_equal(losses_of(stopped), losses_of(whole))


def test_held_out_rows_are_looked_at_beneath_them_too(beneath, example_rows, console, tmp_path):
    held_out = {"held_out": {"path": str(example_rows), "every_steps": 6}}
    train(beneath(**held_out, objective={"rto_weight": 1.0, "sorry_keep_rate": 1.0}), console)
    first = json.loads((tmp_path / "run" / "held_out.jsonl").read_text().splitlines()[0])
    assert first["held_out_loss"] > 0


def test_what_is_no_adapter_of_this_model_is_refused(beneath, tiny_llama, vectors, tmp_path, console):
    with pytest.raises(UserError, match="is a model of its own; give a PEFT adapter or a LoRA run"):
        prepare_run(beneath(frozen_adapters={"vectors": str(tiny_llama)}), console)
    other = write_tiny_model(tmp_path / "other", hidden_size=48, intermediate_size=32)
    with pytest.raises(UserError, match="goes on a model of another architecture"):
        prepare_run(beneath(model={"path": str(other)}), console)
    with pytest.raises(ValueError, match="`default` is the adapter that is trained"):
        beneath(frozen_adapters={"default": str(vectors / "peft")})
