"""Rotary position embeddings (Su et al., arXiv 2104.09864) with Llama 3.1's frequency scaling, Hugging Face layout."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from derta_jax.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular speed of each pair of channels, float32 [h/2]."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = (1.0 / config.rope_theta**exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    rotations = scaling.original_max_position_embeddings / wavelengths
    smooth = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequencies / scaling.factor + smooth * frequencies).astype(np.float32)


def rotation(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, 1, T, h], for integer positions [B, T]; both halves of the channels are alike."""
    angles = positions[:, None, :, None].astype(jnp.float32) * np.tile(inverse_frequencies(config), 2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads [B, H, T, h]; channel i is paired with i + h/2, as Hugging Face weights expect.

    x cos + x R sin, where R swaps the halves and turns the sign of one. As a product R costs a TPU's matrix unit
    nothing and is exact; halves of a vector, cut and glued, cost it whole passes over memory. Elsewhere they are part
    of the arithmetic around them.
    """
    swapped = jax.lax.platform_dependent(x, cpu=_swapped, cuda=_swapped, default=_swapped_by_product)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def _swapped(x: jax.Array) -> jax.Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def _swapped_by_product(x: jax.Array) -> jax.Array:
    h = x.shape[-1]
    swap = np.eye(h, k=h // 2, dtype=np.float32) - np.eye(h, k=-h // 2, dtype=np.float32)
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(x, swap.astype(x.dtype), precision=highest, preferred_element_type=jnp.float32)
