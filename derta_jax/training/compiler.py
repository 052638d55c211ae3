"""What XLA is told for the programs of a run; docs/planning.md has what those of a TPU were measured to do."""

import jax

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
    },
}

_ONE_GATHER: Options = {
    # or an all-gather over all three rings of a torus becomes an all-reduce of zeros and a part, as large as the whole
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    # without which that one is not heeded
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_enable_async_all_gather": True,
}


def _tiles(mib: int) -> Options:
    """So much VMEM for the tiles of one operation, twice what the compiler gives it by itself."""
    return {"xla_tpu_scoped_vmem_limit_kib": 1024 * mib}


BY_DEVICE_KIND: dict[str, Options] = {
    "TPU v4": _ONE_GATHER,
    "TPU v5 lite": _tiles(32),
    "TPU v5": _ONE_GATHER | _tiles(32),
    "TPU v6 lite": _tiles(64),
}
"""`TPU v5 lite` is v5e, `TPU v5` v5p, `TPU v6 lite` v6e. On v4 larger tiles change nothing."""


def compiler_options(device: jax.Device) -> Options:
    """Of programs for this device and others like it."""
    return BY_PLATFORM.get(device.platform, {}) | BY_DEVICE_KIND.get(device.device_kind, {})
