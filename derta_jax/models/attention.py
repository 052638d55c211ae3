"""Who may look at whom (causality, segments, sliding windows), the key-value cache, and the attention product.

XLA's attention is the reference. The kernels are for the platform that a program is compiled for, not for that which
compiles: on any other they are the reference.

Letters: B batch, T sequence, H query heads, K kv heads, h head dim, S cache.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from derta_jax.errors import UserError
from derta_jax.models.block_attention import block_attention, block_gradients
from derta_jax.models.config import ModelConfig
from derta_jax.models.sharding import partition_spec

IMPLEMENTATIONS = ("xla", "splash", "cudnn", "blocks")
LANES = 128
"""Columns that a TPU works on at a time; its kernel wants whole ones."""
QUERIES = ("batch", "sequence", "heads", None)
KEYS = ("batch", "sequence", "kv_heads", None)
SEGMENTS = ("batch", "sequence")
STATISTICS = ("batch", "sequence", "heads")


class KVCache(NamedTuple):
    """Keys [B, K, h, S] and values [B, K, S, h] of each layer, as products read them.

    `positions` [B, S] is -1 where a column is empty.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `length` columns, none of them filled."""
    rows = (batch, config.kv_heads)
    keys, values = (
        tuple(jnp.zeros((*rows, *sides), dtype) for _ in range(config.layers))
        for sides in ((config.head_dim, length), (length, config.head_dim))
    )
    return KVCache(keys, values, jnp.full((batch, length), -1, jnp.int32))


def segment_mask(segment_ids: jax.Array, window: int | None) -> jax.Array:
    """Bool [B, 1, T, T]: causal, within the same segment, fewer than `window` tokens back. Segment 0 is padding."""
    columns = jnp.arange(segment_ids.shape[1])
    distance = columns[:, None] - columns[None, :]
    causal = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (causal & same)[:, None]


TRUNK, BRANCH = 1, 2
"""What `trunk` says of a token: the next segment sees it, too; it sees the trunk before its segment."""


def tree_mask(segment_ids: jax.Array, positions: jax.Array, trunk: jax.Array, window: int | None) -> jax.Array:
    """Bool [B, 1, T, T]: `segment_mask`, and from each branch to the trunk of the segment before it."""
    behind = segment_ids[:, :, None] == segment_ids[:, None, :] + 1
    from_branch = behind & (trunk == BRANCH)[:, :, None] & (trunk == TRUNK)[:, None, :]
    if window is not None:
        from_branch &= positions[:, :, None] - positions[:, None, :] < window
    return segment_mask(segment_ids, window) | from_branch[:, None]


def tree_passes(segment_ids: jax.Array, trunk: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids by which all but branches attend, and by which branches do, to themselves and to their trunks.

    Whatever a pass is not for stands alone in it, so that a kernel that skips what nobody sees does no work twice.
    """
    T = segment_ids.shape[1]
    alone = T + 2 + jnp.arange(T)  # there are at most T segments
    branch = trunk == BRANCH
    joined = jnp.where(branch, segment_ids, jnp.where(trunk == TRUNK, segment_ids + 1, alone))
    return jnp.where(branch, alone, segment_ids), joined


def cache_mask(query_positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """Bool [B, 1, T, S]: filled columns at or before each query's position, fewer than `window` back."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = (distance >= 0) & (key_positions >= 0)[:, None, :]
    if window is not None:
        visible &= distance < window
    return visible[:, None]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention: query [B, T, H, h], key and value [B, S, K, h] → [B, T, H, h], softmax in float32."""
    return _named(jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla"))


def attend_to_cache(query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` of one new token a row: query [B, H, 1, h]; keys [B, K, h, S], values [B, K, S, h] → [B, 1, H, h].

    mask [B, 1, 1, S]. Plain products of each head, for which nothing is turned around: the cache is read once.
    """
    B, H, _, h = query.shape
    K = keys.shape[1]
    grouped = query.reshape(B, K, H // K, h)
    scores = jnp.einsum("BKGh,BKhS->BKGS", grouped, keys, preferred_element_type=jnp.float32) * h**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(query.dtype)
    return jnp.einsum("BKGS,BKSh->BKGh", weights, values).reshape(B, 1, H, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def attend_by_kernel(
    implementation: str, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, window: int | None
) -> jax.Array:
    """`attend` under `segment_mask`, without ever holding the weights [B, H, T, T]: `splash`, `cudnn` or `blocks`.

    On a mesh each device has its own rows and heads, so the batch must split over its `batch` axes.
    """
    return _forward(implementation, query, key, value, segment_ids, window)[0]


def _forward(implementation, query, key, value, segment_ids, window):
    kernel, operands = KERNELS[implementation], (query, key, value, segment_ids)
    run = _on_each_device(kernel.platform, kernel.forward, _xla_forward, window)
    attention, statistics = map(_named, run((QUERIES, KEYS, KEYS, SEGMENTS), (QUERIES, STATISTICS))(*operands))
    return attention, (*operands, attention, statistics)


def _backward(implementation, window, kept, grad):
    kernel = KERNELS[implementation]
    run = _on_each_device(kernel.platform, kernel.backward, _xla_backward, window)
    inputs = (QUERIES, KEYS, KEYS, SEGMENTS, QUERIES, STATISTICS, QUERIES)
    return *run(inputs, (QUERIES, KEYS, KEYS))(*kept, grad), None


attend_by_kernel.defvjp(_forward, _backward)


def check_attention(implementation: str, platform: str, dtype: str, sequence_length: int) -> None:
    """Raise `UserError` where `train.attention` has no kernel for devices of `platform` (tpu, gpu or cpu)."""
    home = {"xla": platform, "splash": "tpu", "cudnn": "gpu", "blocks": "cpu"}[implementation]
    if platform != home:
        own = {"tpu": "splash or xla", "gpu": "cudnn or xla", "cpu": "blocks or xla"}.get(platform, "xla")
        raise UserError(
            f"train.attention = {implementation} is for {home.upper()}s, and this is a {platform.upper()}: "
            f"set it to {own}"
        )
    if implementation != "cudnn":
        return
    if dtype != "bfloat16":
        raise UserError(
            f"train.attention = cudnn computes in bfloat16: set train.dtype to bfloat16 (it is {dtype}), "
            "or train.attention to xla"
        )
    if sequence_length % 2:
        raise UserError(
            f"train.attention = cudnn needs an even train.sequence_length (it is {sequence_length:,}): set it to "
            f"{sequence_length + 1:,}, or train.attention to xla"
        )
    row = jax.ShapeDtypeStruct((1, 2, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), row, row, row)
    except (RuntimeError, NotImplementedError) as error:  # JAX's for a cuDNN that is missing or old, and an old GPU
        raise UserError(f"train.attention = cudnn does not work here ({error}): set it to xla") from error


def _named(attention: jax.Array) -> jax.Array:
    """Under the name by which a remat policy keeps it."""
    return checkpoint_name(attention, "attention")


def _on_each_device(platform, own, elsewhere, window):
    """From logical axes of inputs and outputs to a function of such arrays: `own` in a program for `platform`."""
    own, elsewhere = (functools.partial(function, window=window) for function in (own, elsewhere))

    # otherwise what depends on no operand, as the mask [T, T], is computed before all layers and kept, by any branch
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def local(*operands):
        if platform == "cuda" and jax.default_backend() != "gpu":  # cuDNN's cannot even be traced without it
            return elsewhere(*operands)
        return jax.lax.platform_dependent(*operands, **{platform: own}, default=elsewhere)

    def place(inputs, outputs):
        if jax.sharding.get_abstract_mesh().empty:
            return local
        in_specs, out_specs = (tuple(map(partition_spec, axes)) for axes in (inputs, outputs))
        # kernels do not say along which axes their results vary, so nothing checks that
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    return place


# Forward: query, key, value, segments → attention, and of the weights what the backward pass needs, float32 [B, T, H].
# Backward: those, attention, statistics and the gradient of attention → the gradients of query, key and value.


def _xla_forward(query, key, value, segment_ids, window):
    attention = attend(query, key, value, segment_mask(segment_ids, window))
    return attention, jnp.zeros(query.shape[:3], jnp.float32)


def _xla_backward(query, key, value, segment_ids, attention, statistics, grad, window):
    _, vjp = jax.vjp(lambda q, k, v: _xla_forward(q, k, v, segment_ids, window)[0], query, key, value)
    return vjp(grad)


def tpu_attention(query, key, value, segment_ids, window, interpret=False):
    """By Pallas kernels, which skip the blocks that nobody sees."""
    kernel = _splash_kernel(query, window, interpret)

    def row(query, key, value, ids):
        return kernel(query, key, value, segment_ids=ids)

    attention, (statistics,) = jax.vmap(row)(*_splash_operands(query, key, value, segment_ids))
    T = query.shape[1]
    return _rows_first(attention, T), _rows_first(statistics, T)


def tpu_gradients(query, key, value, segment_ids, attention, statistics, grad, window, interpret=False):
    """The kernels' own backward pass, called by hand: its `custom_vjp` keeps what a remat policy cannot name."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    kernel = _splash_kernel(query, window, interpret)

    def row(query, key, value, ids, attention, statistics, grad):
        masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
        kept = (query, key, value, ids, None, attention, statistics, *masks)
        return splash._splash_attention_bwd(**kernel.kwargs, res=kept, do=grad)[3:6]

    results = map(_heads_first, (attention, statistics, grad))
    gradients = jax.vmap(row)(*_splash_operands(query, key, value, segment_ids), *results)
    query_grad, key_grad, value_grad = (_rows_first(gradient, query.shape[1]) for gradient in gradients)
    return query_grad * query.shape[-1] ** -0.5, key_grad, value_grad


def _splash_operands(query, key, value, segment_ids):
    """As the kernel takes them, which does not scale."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    # columns of padding see each other, so that no row of the mask is empty
    ids = jnp.pad(segment_ids, ((0, 0), (0, -segment_ids.shape[1] % LANES)))
    parts = map(_heads_first, (query * query.shape[-1] ** -0.5, key, value))
    return *parts, splash.SegmentIds(ids, ids)


def _splash_kernel(query, window, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = query.shape[1] + -query.shape[1] % LANES
    causal = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    tile = next(tile for tile in (512, 384, 256, LANES) if T % tile == 0)
    return splash.make_splash_mha(
        masks.MultiHeadMask([causal] * query.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
        ),
        save_residuals=True,
        interpret=interpret,
    )


def _heads_first(x):
    """[B, T, H, …] → [B, H, whole lanes of T, …]."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), *[(0, 0)] * (x.ndim - 2))).swapaxes(1, 2)


def _rows_first(x, T):
    return x.swapaxes(1, 2)[:, :T]


def gpu_attention(query, key, value, segment_ids, window):
    """By one of cuDNN's kernels, which reads the mask up to the diagonal."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    operands, setting = _for_cudnn(query, key, value, segment_ids, window)
    attention, statistics = cudnn._dot_product_attention_fwd_p_wrapper.bind(*operands, is_training=True, **setting)
    return attention, statistics.swapaxes(1, 2)


def gpu_gradients(query, key, value, segment_ids, attention, statistics, grad, window):
    """The kernel's own backward pass, called by hand: JAX shows no one else what it needs of the forward pass."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    operands, setting = _for_cudnn(query, key, value, segment_ids, window)
    kept = (statistics.swapaxes(1, 2), attention, grad)
    query_grad, key_grad, value_grad = cudnn._dot_product_attention_bwd_p_wrapper.bind(*operands, *kept, **setting)
    return query_grad, key_grad, value_grad


def _for_cudnn(query, key, value, segment_ids, window):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # what hides other segments is added to the scores; cuDNN cannot take the difference of two numbers near the lowest
    bias = jnp.where(segment_mask(segment_ids, window), 0.0, -(2.0**41)).astype(query.dtype)
    lengths_offsets_and_pages = [jnp.zeros(0, query.dtype)] * 6
    setting = {
        "scale": query.shape[-1] ** -0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (True, False),  # there is a bias, and no gradient by it
        "mask_type": cudnn.MaskType.CAUSAL,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return (query, key, value, bias, *lengths_offsets_and_pages), setting


class Kernel(NamedTuple):
    """Functions of a device's own arrays, for programs of one of JAX's platforms."""

    platform: str
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


KERNELS = {
    "splash": Kernel("tpu", tpu_attention, tpu_gradients),
    "cudnn": Kernel("cuda", gpu_attention, gpu_gradients),
    "blocks": Kernel("cpu", block_attention, block_gradients),
}
