"""A mixture of experts, as Mixtral has it (arXiv 2401.04088): a router picks k experts for each token.

Letters: B batch, T sequence, N = B·T tokens, D model, F ffn, E experts, k experts per token, R LoRA rank; M rows, each
one token on its way through one of its experts, sorted by expert, and G the experts that a device computes.

No expert has a capacity: nothing is dropped, however uneven the load.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from derta_jax.models.lora import LowRank
from derta_jax.models.sharding import partition_spec

WEIGHT_AXES = {
    "gate": ("experts", "expert_embed", "ffn"),
    "up": ("experts", "expert_embed", "ffn"),
    "down": ("experts", "ffn", "expert_embed"),
}


class Routing(NamedTuple):
    """What the router says of each token, float32 and int32."""

    probabilities: jax.Array  # [B, T, E], softmax over all experts
    chosen: jax.Array  # [B, T, k]
    weights: jax.Array  # [B, T, k], of the chosen, summing to one


def route(x: jax.Array, router: jax.Array, experts_per_token: int) -> Routing:
    """x [B, T, D] and router [D, E], computed in float32 as `MixtralTopKRouter` of a float32 model does."""
    wide = (x.astype(jnp.float32), router.astype(jnp.float32))
    probabilities = jax.nn.softmax(jnp.matmul(*wide, precision=jax.lax.Precision.HIGHEST), axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, experts_per_token)
    return Routing(probabilities, chosen, weights / weights.sum(-1, keepdims=True))


def router_statistics(routing: Routing, real: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens that are `real` [B, T], float32 [E]: how often each expert was chosen, its probability."""
    chosen = jax.nn.one_hot(routing.chosen, routing.probabilities.shape[-1]).sum(-2)
    mask = real.astype(jnp.float32)[..., None]
    return {
        "chosen": (mask * chosen).sum((0, 1)),
        "probability": (mask * routing.probabilities).sum((0, 1)),
    }


def load_balancing_loss(statistics: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Switch Transformer's auxiliary loss (arXiv 2101.03961, equations 4-6) as transformers computes it.

    `statistics` are `router_statistics` of all layers [L, E] over `tokens` real tokens. k when the load is even.
    """
    layers, experts = statistics["chosen"].shape
    share = {name: total.sum(0) / (layers * tokens) for name, total in statistics.items()}
    return experts * jnp.sum(share["chosen"] * share["probability"])


def mix_experts(
    x: jax.Array,
    routing: Routing,
    weights: Mapping[str, jax.Array],
    adapters: Mapping[str, Sequence[LowRank]],
) -> jax.Array:
    """x [B, T, D] through the chosen experts. `weights` are `gate`, `up` [E, D, F] and `down` [E, F, D], of x's dtype.

    On a mesh the batch must split over its `batch` axes. Experts stay where they are: a device gathers the tokens of
    its `expert` group, and the parts of its own experts' weights that lie along `fsdp`.
    """
    operands = (x, routing.chosen, routing.weights, dict(weights), dict(adapters))
    if jax.sharding.get_abstract_mesh().empty:
        return _apply_experts(*operands, first=0)
    rows = partition_spec(("batch", "sequence", "model"))
    specs = (
        rows,
        rows,
        rows,
        {name: partition_spec(WEIGHT_AXES[name]) for name in weights},
        {name: [_adapter_spec(name, adapter) for adapter in adapters[name]] for name in adapters},
    )
    # Pallas kernels do not say along which axes their results vary, so nothing checks that; each device's share of the
    # sum over ffn leaves on an axis of its own, for the gradient of a psum in here would be another psum
    partial_sums = jax.shard_map(
        _apply_local_experts,
        in_specs=specs,
        out_specs=PartitionSpec("tensor", *rows),
        check_vma=False,
    )(*operands)
    return jax.lax.reduce_sum(partial_sums, (0,))


def _adapter_spec(name: str, adapter: LowRank) -> LowRank:
    """What a device needs of an adapter: its experts, and along ffn what it has of the weight; the rest whole."""
    experts, *sides = WEIGHT_AXES[name]
    inner, outer = ("ffn" if side == "ffn" else None for side in sides)
    a, b = partition_spec((experts, inner, "rank")), partition_spec((experts, "rank", outer))
    keep = None if adapter.keep is None else partition_spec(("batch", "sequence", None, inner))
    return LowRank._make((a, b, keep))


def _apply_local_experts(x, chosen, shares, weights, adapters):
    """A device's part of `mix_experts`: [1, B, T, D], to be summed over `tensor`."""
    whole = {name: _gather(w, "fsdp", WEIGHT_AXES[name].index("expert_embed")) for name, w in weights.items()}
    gather_group = functools.partial(_gather, mesh_axis="expert", axis=0)
    x, chosen, shares = map(gather_group, (x, chosen, shares))
    adapters = {
        name: [adapter._replace(keep=jax.tree.map(gather_group, adapter.keep)) for adapter in adapters[name]]
        for name in adapters
    }
    y = _apply_experts(x, chosen, shares, whole, adapters, jax.lax.axis_index("expert") * whole["gate"].shape[0])
    return (y if jax.lax.axis_size("expert") == 1 else jax.lax.psum_scatter(y, "expert", tiled=True))[None]


def _gather(x, mesh_axis, axis):
    """The parts of x along a mesh axis, one behind the other.

    No collective where that is one device: libtpu 0.0.42 aborts on a reduce-scatter, its gradient, of one participant.
    """
    return x if jax.lax.axis_size(mesh_axis) == 1 else jax.lax.all_gather(x, mesh_axis, axis=axis, tiled=True)


def _apply_experts(x, chosen, shares, weights, adapters, first):
    """Σ of the experts `first` … `first` + G - 1 of each token, by `shares` [B, T, k] → [B, T, D]."""
    B, T, k = chosen.shape
    experts = weights["gate"].shape[0]
    order, place, sizes = _sort_by_expert(chosen.reshape(-1) - first, experts, B * T * min(k, experts))

    def project(rows, name):
        y = grouped_product(rows, weights[name], sizes)
        for adapter in adapters[name]:
            if adapter.keep is not None:
                keep = adapter.keep.reshape(B * T * k, -1).at[order].get(mode="fill", fill_value=False)
                adapter = adapter._replace(keep=keep)
            low = grouped_product(adapter.dropped(rows), adapter.a, sizes)
            y = y + grouped_product(low, adapter.b, sizes)
        return checkpoint_name(y, "experts")

    rows = _move_rows(jnp.repeat(x.reshape(B * T, -1), k, axis=0), order, place)
    hidden = gated(project(rows, "gate"), project(rows, "up"))
    y = _move_rows(project(hidden, "down"), place, order).reshape(B, T, k, -1)
    return (y.astype(jnp.float32) * shares[..., None]).sum(2).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate, up):
    """SwiGLU's product silu(gate) up (arXiv 2002.05202), of two arrays of one shape and dtype → that shape and dtype.

    It is computed in float32, and nothing of that is kept for the backward pass.
    """
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _sort_by_expert(expert, experts, most):
    """Where the tokens' choices `expert` [N·k] go: those in 0 … `experts` - 1, at most `most`, become sorted rows.

    → the choice of each row [M = most], the row of each choice [N·k], int32 and out of range where there is none, and
    the number of rows of each expert [G].
    """
    choices = expert.shape[0]
    mine = (expert >= 0) & (expert < experts)
    order = jnp.argsort(jnp.where(mine, expert, experts), stable=True)
    sizes = (expert[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    place = jnp.where(mine, jnp.argsort(order), most)
    order = jnp.where(jnp.arange(most) < sizes.sum(), order[:most], choices)
    return order.astype(jnp.int32), place.astype(jnp.int32), sizes


@jax.custom_vjp
def _move_rows(x, order, place):
    """x[order], zero where `order` is out of range; `place` is its inverse, so that the gradient too is a gather."""
    return x.at[order].get(mode="fill", fill_value=0)


def _move_rows_forward(x, order, place):
    return _move_rows(x, order, place), (order, place)


def _move_rows_backward(indices, grad):
    order, place = indices
    return _move_rows(grad, place, order), None, None


_move_rows.defvjp(_move_rows_forward, _move_rows_backward)


@jax.custom_vjp
def grouped_product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [M, in] in groups of `sizes` [G] consecutive rows, each times its own matrix of w [G, in, out] → [M, out].

    Sums are float32, the result is of x's dtype. Rows behind the last group are undefined, in the gradient of x too,
    and whatever they hold stays out of all other rows and out of the gradient of w.
    """
    return _product(x, w, sizes, transposed=False)


def _grouped_forward(x, w, sizes):
    return grouped_product(x, w, sizes), (x, w, sizes)


def _grouped_backward(operands, grad):
    x, w, sizes = operands
    return _product(grad, w, sizes, transposed=True), _outer(x, grad, sizes, w.dtype), None


grouped_product.defvjp(_grouped_forward, _grouped_backward)


def _product(x, w, sizes, transposed):
    """`grouped_product`, or with each matrix transposed; for the platform compiled for, not that which compiles."""
    return jax.lax.platform_dependent(
        x,
        w,
        sizes,
        tpu=functools.partial(tpu_product, transposed=transposed),
        default=functools.partial(_ragged, PRODUCT_TRANSPOSED if transposed else PRODUCT, x.dtype),
    )


def _outer(x, y, sizes, dtype):
    """Σ over the rows of each group, x [M, in] and y [M, out] → [G, in, out]: the gradient of `grouped_product`'s w."""
    return jax.lax.platform_dependent(
        x,
        y,
        sizes,
        tpu=functools.partial(tpu_outer, dtype=dtype),
        default=functools.partial(_ragged, OUTER, dtype),
    )


PRODUCT = jax.lax.RaggedDotDimensionNumbers((([1], [1]), ([], [])), [0], [0])
PRODUCT_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
OUTER = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])


def _ragged(dimensions, dtype, x, w, sizes):
    return jax.lax.ragged_dot_general(x, w, sizes, dimensions, preferred_element_type=jnp.float32).astype(dtype)


def tpu_product(x, w, sizes, transposed, interpret=False):
    """The product as a Pallas kernel. XLA's own for `ragged_dot` computes the gradient of w G times over."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    tiles = _tiles(x, w.shape[1 if transposed else 2], len(sizes))
    return gmm(_padded(x, tiles), w, sizes, x.dtype, tiles, transpose_rhs=transposed, interpret=interpret)[: len(x)]


def tpu_outer(x, y, sizes, dtype, interpret=False):
    """The sums of outer products as a Pallas kernel."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = _tiles(x, y.shape[1], len(sizes))
    return tgmm(_padded(x, tiles).T, _padded(y, tiles), sizes, dtype, tiles, interpret=interpret)


def _tiles(x, outer, groups):
    """Tile sizes (rows, in, out) for x [M, in]: together they must fit the 16 MiB of vector memory that a kernel gets.

    Tall ones read the matrices less often, those taller than a group mostly compute what is then masked.
    """
    rows, inner = x.shape
    tall = min(512, max(128, 2 ** (rows // groups).bit_length() // 2))
    most = 2048 // x.dtype.itemsize
    sides = (
        side if side <= most else next((tile for tile in range(most, most // 2, -128) if side % tile == 0), most)
        for side in (inner, outer)
    )
    return min(tall, -(-rows // 16) * 16), *sides


def _padded(x, tiles):
    """Kernels want whole tiles of rows."""
    return jnp.pad(x, ((0, -len(x) % tiles[0]), (0, 0)))
