"""The attention kernels against XLA's attention: their numbers interpreted, their programs by what is compiled."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from derta_jax.config import MeshShape
from derta_jax.errors import UserError
from derta_jax.models import attention as module
from derta_jax.models.attention import attend, attend_by_kernel, check_attention, segment_mask
from derta_jax.models.block_attention import first_blocks
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder
from derta_jax.training.mesh import make_mesh
from tests.models.interpreted import interpret_tpu_kernels

# (columns, query heads, kv heads, head dimension, window)
SHAPES = {
    "one head for each": (128, 2, 2, 64, None),
    "two heads share one": (256, 4, 2, 64, None),
    "all heads share one": (128, 3, 1, 128, None),
    "a window within a block": (256, 2, 1, 64, 20),
    "a window over blocks": (384, 2, 2, 64, 200),
    "columns that are no whole block": (200, 2, 1, 128, None),
    "fewer columns than a block, and a window": (40, 2, 2, 64, 7),
}


def operands(columns, heads, kv_heads, width, dtype=jnp.float32):
    """Two rows: three segments and padding in one, one segment over all columns in the other."""
    draw = np.random.default_rng(columns)
    query, key, value = (
        jnp.asarray(draw.normal(size=(2, columns, count, width)), dtype) for count in (heads, kv_heads, kv_heads)
    )
    lengths = [columns // 2, columns // 5, columns // 8]
    packed = np.repeat([1, 2, 3, 0], [*lengths, columns - sum(lengths)])
    return query, key, value, jnp.asarray(np.stack([packed, np.ones(columns)]), jnp.int32)


@pytest.fixture
def on_tpu(monkeypatch):
    interpret_tpu_kernels(monkeypatch)


splash = functools.partial(attend_by_kernel, "splash")
blocks = functools.partial(attend_by_kernel, "blocks")


def reference(query, key, value, segment_ids, window):
    return attend(query, key, value, segment_mask(segment_ids, window))


def value_and_gradients(function, inputs, window):
    def loss(query, key, value):
        y = function(query, key, value, inputs[3], window)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs[:3])


def assert_equal(actual, expected, share):
    """Within a share of each tensor's largest entry."""
    for mine, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        mine, theirs = (np.asarray(each, np.float32) for each in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=share * np.abs(theirs).max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_the_tpu_kernel_gives_xlas_attention_and_gradients(on_tpu, shape):
    *sizes, window = shape
    inputs = operands(*sizes)
    actual = value_and_gradients(splash, inputs, window)
    assert_equal(actual, value_and_gradients(reference, inputs, window), 3e-6)


def test_the_tpu_kernel_in_bfloat16_is_as_near_to_float32_as_xla(on_tpu):
    inputs = operands(128, 4, 2, 64, jnp.bfloat16)
    actual = value_and_gradients(splash, inputs, None)
    wide = tuple(part.astype(jnp.float32) for part in inputs[:3])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(actual)} == {"bfloat16"}
    assert_equal(actual, value_and_gradients(reference, (*wide, inputs[3]), None), 2e-2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_cpus_blocks_give_xlas_attention_and_gradients(shape):
    *sizes, window = shape
    inputs = operands(*sizes)
    actual = value_and_gradients(blocks, inputs, window)
    assert_equal(actual, value_and_gradients(reference, inputs, window), 3e-6)


def test_a_cpus_blocks_in_bfloat16_are_as_near_to_float32_as_xla():
    inputs = operands(200, 4, 2, 64, jnp.bfloat16)
    actual = value_and_gradients(blocks, inputs, None)
    wide = tuple(part.astype(jnp.float32) for part in inputs[:3])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(actual)} == {"bfloat16"}
    assert_equal(actual, value_and_gradients(reference, (*wide, inputs[3]), None), 2e-2)


def test_blocks_that_nobody_sees_are_not_computed():
    """A block looks back to where its first token's segment begins, or its window."""
    short = jnp.tile(jnp.repeat(jnp.arange(1, 65), 32), (2, 1))
    assert first_blocks(short, None).tolist() == [*range(32)]
    one = jnp.ones_like(short)
    assert first_blocks(one, None).tolist() == [0] * 16 + [16] * 16
    assert first_blocks(one, 200).tolist() == [0, 0, *range(14), *[16] * 2, *range(16, 30)]


def test_padding_looks_at_its_own_block_only():
    """Nor does it keep the tokens that share its block from looking back."""
    ids = jnp.asarray([np.repeat([1, 2, 0], [200, 184, 640])])
    assert first_blocks(ids, None).tolist() == [0, 0, 1, *range(3, 8)]
    assert first_blocks(jnp.asarray([np.repeat([1, 0], [300, 724])]), None).tolist() == [0, 0, 0, *range(3, 8)]


def test_each_device_has_the_cpus_blocks_attend_in_its_own_rows_and_heads():
    inputs = operands(200, 4, 2, 64)
    with jax.set_mesh(make_mesh(MeshShape(fsdp=2, tensor=2), jax.devices()[:4])):
        actual = value_and_gradients(blocks, inputs, 50)
    assert_equal(actual, value_and_gradients(reference, inputs, 50), 3e-6)


def test_rows_of_nothing_but_padding_give_numbers(on_tpu):
    *inputs, _ = operands(128, 2, 2, 64)
    inputs.append(jnp.zeros((2, 128), jnp.int32))
    actual = value_and_gradients(splash, inputs, None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))


@pytest.mark.parametrize("mesh", [None, MeshShape(data=2, fsdp=1, tensor=2)], ids=["no mesh", "mesh"])
@pytest.mark.parametrize("implementation", ["splash", "cudnn"])
def test_elsewhere_a_kernels_program_is_xlas_attention(implementation, mesh):
    inputs = operands(40, 4, 2, 16)
    expected = value_and_gradients(reference, inputs, 9)
    devices = None if mesh is None else make_mesh(mesh, jax.devices()[:4])
    function = functools.partial(attend_by_kernel, implementation)
    with jax.set_mesh(devices) if devices else jax.default_device(jax.devices()[0]):
        assert_equal(value_and_gradients(function, inputs, 9), expected, 1e-6)


def test_each_device_has_the_tpu_kernel_attend_in_its_own_rows_and_heads(on_tpu):
    inputs = operands(128, 4, 2, 64)
    with jax.set_mesh(make_mesh(MeshShape(fsdp=2, tensor=2), jax.devices()[:4])):
        actual = value_and_gradients(splash, inputs, 50)
    assert_equal(actual, value_and_gradients(reference, inputs, 50), 3e-6)


# What is compiled. A program for other machines can be lowered here, and read

COLUMNS = 384
CONFIG = ModelConfig("llama", vocab_size=64, embed_dim=256, ffn_dim=512, layers=3, heads=4, kv_heads=2, head_dim=64)


def lowered(platform: str, attention: str, remat: str = "full", dtype=jnp.float32) -> str:
    """The gradient of a decoder of that kind, as StableHLO."""
    model = Decoder(CONFIG, dtype, remat, attention=attention)
    tokens = jnp.ones((2, COLUMNS), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def loss(params, tokens):
        hidden: Any = model.apply({"params": params}, tokens, method="hidden_states")
        return hidden.sum()

    return jax.jit(jax.grad(loss)).trace(params, tokens).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_compiled_for_decides_and_not_the_one_that_compiles():
    assert "splash_mha" in lowered("tpu", "splash")
    assert "tpu_custom_call" not in lowered("cpu", "splash")


RUNS_OF_A_KERNEL = pytest.mark.parametrize(
    ("remat", "forward"), [("none", 1), ("attention", 1), ("dots", 1), ("full", 2), ("offload", 2)]
)


@RUNS_OF_A_KERNEL
def test_the_kernel_runs_again_only_where_its_result_is_not_kept(remat, forward):
    text = lowered("tpu", "splash", remat)
    kernels = re.findall(r'kernel_name = "(\w+?)_(?:segmented|no_residuals|residuals)', text)
    assert kernels.count("splash_mha_fwd") == forward
    assert kernels.count("splash_mha_dkv") == 1


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_no_program_of_the_kernel_holds_the_weights_of_all_columns(remat):
    weights = rf"x{COLUMNS}x{COLUMNS}xf32"
    assert re.search(weights, lowered("tpu", "xla", remat))
    assert not re.search(weights, lowered("tpu", "splash", remat))


@RUNS_OF_A_KERNEL
def test_where_cudnn_is_its_kernels_attend_on_gpus_alone(remat, forward, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = lowered("cuda", "cudnn", remat, dtype=jnp.bfloat16)
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == forward
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "mask_type\\22: \\22CAUSAL" in text
    assert "cudnn" not in lowered("cpu", "cudnn", remat, dtype=jnp.bfloat16)


# Before a run


@pytest.mark.parametrize(
    ("settings", "platform", "message"),
    [
        (("splash", "bfloat16", 1024), "cpu", r"splash is for TPUs, and this is a CPU: set it to blocks or xla"),
        (("splash", "bfloat16", 1024), "gpu", r"splash is for TPUs, and this is a GPU: set it to cudnn or xla"),
        (("cudnn", "bfloat16", 1024), "tpu", r"cudnn is for GPUs, and this is a TPU: set it to splash or xla"),
        (("cudnn", "float32", 1024), "gpu", r"cudnn computes in bfloat16: set train\.dtype to bfloat16"),
        (
            ("cudnn", "bfloat16", 1023),
            "gpu",
            r"cudnn needs an even train\.sequence_length .* to 1,024",
        ),
        (("cudnn", "bfloat16", 1024), "gpu", r"cudnn does not work here \(cuDNN is not detected\.\): set it to xla"),
    ],
)
def test_a_kernel_that_a_machine_does_not_have_is_an_error_that_says_what_to_set(settings, platform, message):
    implementation, dtype, length = settings
    with pytest.raises(UserError, match=rf"train\.attention = {message}"):
        check_attention(implementation, platform, dtype, length)


@pytest.mark.parametrize(("implementation", "platform"), [("xla", "cpu"), ("xla", "tpu"), ("splash", "tpu")])
def test_what_a_machine_has_is_no_error(implementation, platform):
    check_attention(implementation, platform, "float32", 777)


def test_each_implementation_that_a_config_may_name_is_known():
    from typing import get_args

    from derta_jax.config import Train

    assert get_args(Train.model_fields["attention"].annotation) == module.IMPLEMENTATIONS
