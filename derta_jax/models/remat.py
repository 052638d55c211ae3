"""What a layer keeps for its backward pass, and computes again: memory against time.

Names that the policies know: `layer_input`, `qkv` (queries, keys and values, rotated), `attention` (its result, and
what a kernel needs beside that) and `experts` (the grouped products of a mixture, which are no plain matrix products).
"""

import jax

from derta_jax.errors import UserError

_policies = jax.checkpoint_policies

REMAT_POLICIES = {
    "none": None,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("experts", "attention")
    ),
    "attention": _policies.save_only_these_names("qkv", "attention"),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""Everything; its matrix products and attention; q/k/v and attention; its input alone; its input, in the host's memory.

Whatever is kept, the input is kept beside it, but for the last, of which nothing stays on the device."""


def check_remat(policy: str, device: jax.Device) -> None:
    """Raise `UserError` where `train.remat` wants memory that the device does not reach."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if policy == "offload" and "pinned_host" not in kinds:
        raise UserError(
            f"train.remat = offload keeps activations in the host's pinned memory, which {device.device_kind} devices "
            "do not reach: set it to full, which keeps the same on the device"
        )
