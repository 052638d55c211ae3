"""What XLA is told for the programs of a run; docs/planning.md has what those of a TPU were measured to do."""

from jax.sharding import Mesh

Options = dict[str, bool | int | str]
"""XLA's, by name."""

BY_PLATFORM: dict[str, Options] = {
    # products by Eigen: with the rounding of YNNPACK's the miniature fails its tests on one processor
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    "tpu": {
        # no collective matmuls: at the lengths of fine-tuning they are estimated a third slower than plain gathers
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
        # or a second copy of all weights, in bfloat16, is made before the first layer
        "xla_jf_bf16_propagation": False,
        # weights are gathered beside products, as only v5e has it by itself
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        # or many an all-gather becomes an all-reduce of zeros and a part, as large as the whole
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
    },
}

JOINED = 4 * 2**20
"""Bytes up to which reductions are joined to one, those of norms say. A joined one runs beside nothing."""

REDUCTIONS_BESIDE_PRODUCTS: Options = {
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_jf_crs_combiner_threshold_in_bytes": JOINED,
    "xla_enable_async_reduce_scatter_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
    "xla_tpu_ars_combiner_threshold_in_bytes": JOINED,
}


def _tiles(mib: int) -> Options:
    """So much VMEM for the tiles of one operation, twice what the compiler gives it by itself."""
    return {"xla_tpu_scoped_vmem_limit_kib": 1024 * mib}


BY_DEVICE_KIND: dict[str, Options] = {
    "TPU v4": {},
    "TPU v5 lite": _tiles(32),
    "TPU v5": _tiles(32),
    "TPU v6 lite": _tiles(64),
}
"""`TPU v5 lite` is v5e, `TPU v5` v5p, `TPU v6 lite` v6e. On v4 larger tiles change nothing."""

NO_ROOM = ("TPU v4",)
"""Whose VMEM, 16 MiB, does not hold a product and the reduction beside it."""


def compiler_options(mesh: Mesh, whole_gradients: bool = False) -> Options:
    """Of programs for a mesh's devices; `whole_gradients` are those of all weights, not of adapters.

    The gradients of adapters are too small to be worth it, and libtpu 0.0.42 refuses some that do not split evenly.
    """
    device = mesh.devices.flat[0]
    options = BY_PLATFORM.get(device.platform, {}) | BY_DEVICE_KIND.get(device.device_kind, {})
    beside = whole_gradients and device.platform == "tpu" and device.device_kind not in NO_ROOM
    return options | REDUCTIONS_BESIDE_PRODUCTS if beside else options
