"""AdamW as the config says, and its moments in bfloat16, which must not cost what they would if rounded plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from derta_jax.config import MeshShape, Train
from derta_jax.training import optimizer as module
from derta_jax.training.mesh import make_mesh
from derta_jax.training.optimizer import learning_rate_schedule, make_optimizer, round_at_random
from derta_jax.training.step import init_state, state_shardings

WIDTHS = (32, 64)


def train_section(**changes) -> Train:
    return Train.model_validate({"output": "run", "steps": 100, "learning_rate": 1e-2, "clip": None} | changes)


def adam_state(opt_state) -> optax.ScaleByAdamState:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))
    (state,) = (node for node in nodes if isinstance(node, optax.ScaleByAdamState))
    return state


def params_and_grads(steps: int):
    draw = np.random.default_rng(0)
    params = {"w": jnp.asarray(draw.normal(size=WIDTHS), jnp.float32), "b": jnp.zeros(WIDTHS[1], jnp.float32)}
    grads = [jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), params)] * steps
    return params, grads


def run(optimizer, params, grads):
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("clip", [None, 0.5])
def test_in_float32_it_is_optax_adamw(clip):
    train = train_section(clip=clip, weight_decay=0.1)
    adamw = optax.adamw(learning_rate_schedule(train, 100), train.b1, train.b2, train.eps, weight_decay=0.1)
    theirs = adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)
    expected, actual = (run(optimizer, *params_and_grads(4)) for optimizer in (theirs, make_optimizer(train, 100)))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_in_bfloat16_both_moments_are_and_nothing_else():
    params, grads = params_and_grads(2)
    updated, opt_state = run(make_optimizer(train_section(optimizer_dtype="bfloat16"), 100), params, grads)
    state = adam_state(opt_state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.mu, state.nu))} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updated)} == {"float32"}
    assert state.count == 2


def test_moments_lie_where_their_parameters_lie():
    mesh = make_mesh(MeshShape(fsdp=8))
    params, _ = params_and_grads(0)
    where = {"w": jax.NamedSharding(mesh, jax.P("fsdp")), "b": jax.NamedSharding(mesh, jax.P())}
    optimizer = make_optimizer(train_section(optimizer_dtype="bfloat16"), 100)
    shardings = state_shardings(where, optimizer, mesh)
    state = adam_state(init_state(jax.device_put(params, where), optimizer, shardings).opt_state)
    for moment in (state.mu, state.nu):
        assert {name: leaf.sharding for name, leaf in moment.items()} == where


def test_another_mesh_rounds_alike():
    params, grads = params_and_grads(3)
    optimizer = make_optimizer(train_section(optimizer_dtype="bfloat16"), 100)
    expected = run(optimizer, params, grads)
    split = jax.NamedSharding(make_mesh(MeshShape(fsdp=8)), jax.P("fsdp"))
    actual = run(optimizer, *jax.device_put((params, grads), split))
    jax.tree.map(np.testing.assert_array_equal, adam_state(actual[1]), adam_state(expected[1]))


def test_rounding_at_random_takes_a_neighbour_and_is_right_in_the_mean():
    below, above = np.float32(1), np.float32(1 + 2**-7)
    x = jnp.full((1 << 16,), below + 0.3 * (above - below))
    rounded = np.asarray(round_at_random(x, jax.random.key(1)), np.float32)
    assert set(rounded) == {below, above}
    assert np.mean(rounded == above) == pytest.approx(0.3, abs=0.01)
    exact = jnp.array([0.0, 1.0, 2.0**-100, 3.0])
    np.testing.assert_array_equal(round_at_random(exact, jax.random.key(1)).astype(jnp.float32), exact)


def second_moment(steps: int, before: float, gradient: float) -> float:
    """The mean second moment of 4,096 parameters after so many steps of one gradient, by Adam in bfloat16."""
    adam = module.in_bfloat16(optax.scale_by_adam(0.9, 0.999))
    params = jnp.zeros(4096)
    state = adam.init(params)._replace(nu=jnp.full(4096, before, jnp.bfloat16))
    state = jax.lax.fori_loop(0, steps, lambda _, state: adam.update(params + gradient, state)[1], state)
    return float(state.nu.astype(jnp.float32).mean())


@pytest.mark.parametrize("gradient", [0.0, 0.5, 1.0, 1.5])
def test_the_second_moment_follows_gradients_that_change_it_by_less_than_a_bfloat16_can_tell(gradient):
    expected = gradient**2 + (1 - gradient**2) * 0.999**500
    assert second_moment(500, 1.0, gradient) == pytest.approx(expected, rel=0.01)


def test_a_noisy_problem_is_learned_as_in_float32_and_worse_with_plain_rounding(monkeypatch):
    reference = noisy_loss("float32")
    assert noisy_loss("bfloat16") == pytest.approx(reference, rel=0.02)
    monkeypatch.setattr(module, "round_at_random", lambda x, key: x.astype(jnp.bfloat16))
    assert noisy_loss("bfloat16") > 1.04 * reference


def noisy_loss(dtype: str, steps: int = 2000, width: int = 16) -> float:
    """The loss at the end of learning one random network by another, on new inputs in each step."""
    train = train_section(steps=steps, learning_rate=3e-3, optimizer_dtype=dtype)
    optimizer = make_optimizer(train, steps)
    keys = jax.random.split(jax.random.key(0), 5)
    student, teacher = (
        {"a": jax.random.normal(one, (width, 32)) / 8, "b": jax.random.normal(other, (32, 1)) / scale}
        for one, other, scale in ((keys[0], keys[1], 12), (keys[2], keys[3], 4))
    )

    def loss(params, x):
        answers = [jnp.tanh(x @ net["a"]) @ net["b"] for net in (params, teacher)]
        return jnp.mean((answers[0] - answers[1]) ** 2)

    def step(carry, number):
        params, state = carry
        x = jax.random.normal(jax.random.fold_in(keys[4], number), (32, width))
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = (student, optimizer.init(student))
    losses = jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(steps))[1])(start)
    return float(losses[-200:].mean())
