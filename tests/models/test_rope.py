"""Rotary embeddings: a product with a swap matrix is the halves of Hugging Face's formula, cut and glued."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from derta_jax.models.config import ModelConfig
from derta_jax.models.rope import rotate, rotation

CONFIG = ModelConfig("llama", 100, 64, 64, layers=1, heads=4, kv_heads=2, head_dim=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rotation_is_that_of_both_halves_to_the_last_bit(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 4, 9, 16)).astype(dtype)
    cos, sin = rotation(CONFIG, jnp.arange(9)[None].repeat(2, 0))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    c, s = cos[..., :8], sin[..., :8]
    glued = jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(dtype)
    np.testing.assert_array_equal(rotate(x, cos, sin), glued)


def test_position_zero_is_not_rotated():
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 16))
    np.testing.assert_array_equal(rotate(x, *rotation(CONFIG, jnp.zeros((1, 1), int))), x)
