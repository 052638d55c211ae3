"""The counting rules on a few lines of HLO each, then on programs that XLA compiled for CPUs and for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from derta_jax.planning.hlo_cost import Collective, program_cost


def cycles(number: int) -> str:
    return f'backend_config={{"flag_configs":[],"window_config":{{"estimated_cycles":"{number}"}}}}'


def computation(header: str, *instructions: str) -> str:
    return "\n".join([f"{header} (p: f32[8]) -> f32[8] {{", *(f"  {line}" for line in instructions), "}", "", ""])


def program(*instructions: str, others: str = "") -> str:
    return f"HloModule jit_step, is_scheduled=true\n\n{others}" + computation("ENTRY %main", *instructions)


def loop(name: str, *body: str, limit: int = 1, step: int = 1) -> str:
    """The computations of a while loop that counts element 0 of its tuple up to `limit`."""
    return computation(
        f"%{name}_body",
        *body,
        f"%step = s32[] constant({step})",
        "%counter = s32[]{:T(128)} get-tuple-element(%p), index=0",
        "%next = s32[]{:T(128)} add(%counter, %step), control-predecessors={%x}",
        "ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(8)}) tuple(%next, %x)",
    ) + computation(
        f"%{name}_condition",
        f"%limit = s32[]{{:T(128)}} constant({limit})",
        "%counter = s32[]{:T(128)} get-tuple-element(%p), index=0",
        "ROOT %test = pred[]{:T(512)} compare(%counter, %limit), direction=LT",
    )


def enter(name: str, attributes: str = "") -> str:
    return f"%{name} = (s32[], f32[8]) while(%init), condition=%{name}_condition, body=%{name}_body{attributes}"


FUSION = "%f = f32[8]{0:T(8)} fusion(%p), kind=kLoop, calls=%inner"


def test_cycles_are_those_of_all_instructions():
    text = program(
        f"%a = f32[8]{{0:T(8)}} copy(%p), {cycles(100)}",
        "%b = f32[8]{0:T(8)} bitcast(%a)",
        f"ROOT %c = (f32[8], /*index=1*/f32[8,2]{{1,0:T(8,128)(2,1)S(1)}}) fusion(%a, %b), kind=kLoop, {cycles(23)}",
    )
    cost = program_cost(text)
    assert cost.estimated_cycles == 123
    assert cost.collectives == cost.collective_bytes == cost.without_estimate == {}


def test_cycles_of_a_fusion_are_for_what_is_in_it():
    inner = computation("%inner", f"ROOT %d = f32[8] convolution(%p), {cycles(999)}", "%e = f32[8] fusion(%p)")
    cost = program_cost(program(f"{FUSION}, {cycles(7)}", others=inner))
    assert cost.estimated_cycles == 7
    assert cost.without_estimate == {}


def test_nested_loops_multiply_known_and_derived_trip_counts():
    known = ', backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}'
    work = f"%w = f32[8] fusion(%p), kind=kLoop, {cycles(10)}"
    others = loop("inner", work, limit=5) + loop("outer", work, enter("inner"), limit=99)
    assert program_cost(program(enter("outer", known), others=others)).estimated_cycles == 3 * (10 + 5 * 10)


@pytest.mark.parametrize(("start", "limit", "step", "trips"), [(0, 8, 1, 8), (0, 8, 2, 4), (0, 7, 2, 4), (3, 11, 2, 4)])
def test_trip_count_is_derived_from_start_limit_and_step(start, limit, step, trips):
    text = program(
        f"%zero = s32[]{{:T(128)}} constant({start})",
        "%copy = s32[]{:T(128)} copy(%zero)",
        "%init = (s32[]{:T(128)}, f32[8]{0:T(8)}) tuple(%copy, %p)",
        enter("while"),
        others=loop("while", f"%w = f32[8] copy(%p), {cycles(10)}", limit=limit, step=step),
    )
    assert program_cost(text).estimated_cycles == trips * 10


@pytest.mark.parametrize(
    ("fused", "condition"),
    [
        ("%a = pred[] compare(%p, %q), direction=LT", ["%limit = s32[] constant(6)", "fusion(%counter, %limit)"]),
        ("%a = s32[] constant(6)", ["fusion(%counter)"]),
        ("", ["%limit = s32[] constant(6)", "not(%limit)"]),
    ],
    ids=["comparison fused", "limit fused", "no comparison"],
)
def test_limit_is_found_in_other_conditions(fused, condition):
    counter = "%counter = s32[] get-tuple-element(%p), index=0"
    root = f"ROOT %test = pred[] {condition[-1]}, calls=%fused"
    others = computation("%fused", fused) + computation("%while_condition", *condition[:-1], counter, root)
    others += computation("%while_body", f"ROOT %w = f32[8] copy(%p), {cycles(10)}")
    assert program_cost(program(enter("while"), others=others)).estimated_cycles == 60


def test_loop_of_which_nothing_is_known_runs_once():
    body = computation("%while_body", f"ROOT %w = f32[8] copy(%p), {cycles(10)}")
    condition = computation("%while_condition", "ROOT %test = pred[] get-tuple-element(%p), index=1")
    assert program_cost(program(enter("while"), others=body + condition)).estimated_cycles == 10


@pytest.mark.parametrize("branches", ["branch_computations={%a, %b}", "true_computation=%a, false_computation=%b"])
def test_every_branch_of_a_conditional_counts(branches):
    others = computation("%a", f"ROOT %c = f32[8] copy(%p), {cycles(10)}")
    others += computation("%b", f"ROOT %c = f32[8] copy(%p), {cycles(5)}")
    text = program(f"ROOT %if = f32[8] conditional(%i, %p, %p), {branches}", others=others)
    assert program_cost(text).estimated_cycles == 15


def test_called_computations_count():
    others = computation("%a", f"ROOT %c = f32[8] copy(%p), {cycles(10)}")
    text = program("%x = f32[8] call(%p), to_apply=%a", "%y = f32[8] call(%p), to_apply=%a", others=others)
    assert program_cost(text).estimated_cycles == 20


@pytest.mark.parametrize(
    ("kind", "operand", "result", "size"),
    [
        ("all-gather", "bf16[4,128]{1,0:T(8,128)(2,1)}", "bf16[16,128]{1,0:T(8,128)(2,1)}", 16 * 128 * 2),
        ("reduce-scatter", "f32[16,128]{1,0}", "f32[4,128]{1,0}", 16 * 128 * 4),
        ("all-reduce", "f32[]{:T(128)}", "f32[]{:T(128)}", 4),
        ("all-to-all", "s4[16,3]{1,0}", "s4[16,3]{1,0}", 24),
        ("collective-permute", "f8e4m3fn[16]{0}", "f8e4m3fn[16]{0}", 16),
    ],
)
def test_collective_moves_the_larger_of_operand_and_result(kind, operand, result, size):
    instructions = [f"%x = {operand} copy(%p)", f"%y = {result} {kind}(%x), channel_id=1, replica_groups={{{{0,1}}}}"]
    others = loop("while", *instructions, limit=5)
    cost = program_cost(program(*instructions, enter("while"), others=others))
    assert cost.collectives == {kind: Collective(count=2, executions=6, bytes=6 * size, exposed=6 * size)}
    assert cost.collective_bytes == {kind: 6 * size}


def test_collective_of_several_arrays_moves_all_of_them():
    operands = ["%x = f32[8] copy(%p)", "%z = pred[16] copy(%p)"]
    text = program(*operands, "%y = (f32[8], pred[16]) all-reduce(%x, /*index=1*/%z), to_apply=%sum")
    assert program_cost(text).collectives == {"all-reduce": Collective(1, 1, 48, 48)}


def test_ragged_all_to_all_moves_its_first_operand():
    operands = ["%x = f32[64] copy(%p)", "%into = f32[80] copy(%p)", "%o = s32[4] copy(%p)"]
    text = program(*operands, "%y = f32[80] ragged-all-to-all(%x, %into, %o, %o, %o, %o), channel_id=1")
    assert program_cost(text).collective_bytes == {"ragged-all-to-all": 320}


@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [
        ("all-gather", "(f32[8], f32[32])", 128),
        ("all-gather", "((f32[8], f32[8]), (f32[32], f32[32]))", 256),
        ("all-reduce", "f32[8]", 32),
        ("reduce-scatter", "((f32[8]), f32[2])", 32),
        ("collective-permute", "(f32[8]{0:T(8)}, f32[8]{0:T(8)S(1)}, u32[]{:S(2)}, u32[]{:S(2)})", 32),
    ],
)
def test_start_and_done_are_one_collective(kind, shape, size):
    operands = "%p, %p" if "((f32[8], " in shape else "%p"
    start = f"%s = {shape} {kind}-start({operands}), channel_id=1"
    text = program("%p = f32[8]{0:T(8)} parameter(0)", start, f"%d = f32[8] {kind}-done(%s)")
    assert program_cost(text).collectives == {kind: Collective(1, 1, size, 0)}


def test_collective_in_an_async_computation_counts_once():
    others = computation("%wrapped", "%p = f32[8] parameter(0)", "ROOT %g = f32[32] all-gather(%p), channel_id=1")
    text = program(
        "%s = ((f32[8]), f32[32]) async-start(%p), calls=%wrapped",
        "%u = ((f32[8]), f32[32]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[32] async-done(%u), calls=%wrapped",
        others=others,
    )
    assert program_cost(text).collectives == {"all-gather": Collective(1, 1, 128, 0)}


def test_what_the_sparse_cores_run_takes_no_cycles_and_hides_its_collectives():
    others = computation("%wrapped", "%p = f32[8] parameter(0)", f"ROOT %r = f32[8] all-reduce(%p), {cycles(50)}")
    beside = 'async_execution_thread="sparsecore"'
    text = program(
        f"%s = ((f32[8]), f32[8], u32[]) call-start(%p), {beside}, to_apply=%wrapped",
        f"%f = f32[8] fusion(%p), kind=kLoop, {cycles(7)}",
        "ROOT %d = f32[8] call-done(%s)",
        others=others,
    )
    cost = program_cost(text)
    assert cost.collectives == {"all-reduce": Collective(1, 1, 32, 0)}
    assert cost.estimated_cycles == 7


def test_what_goes_to_the_host_and_comes_back_is_counted_as_often_as_it_does():
    kept, index = "f32[6,8]{1,0:T(8,128)S(5)}", "s32[]{:T(128)}"
    put = f"%put = (({kept}, f32[1,8]{{1,0:T(8,128)}}, {index}), {kept}, u32[]{{:S(2)}}) dynamic-update-slice-start(%p)"
    get = f"%get = (({kept}, {index}), f32[1,8]{{1,0:T(8,128)}}, u32[]{{:S(2)}}) dynamic-slice-start(%p)"
    done = f"%done = {kept} dynamic-update-slice-done(%put)"
    others = loop("forward", put, done, limit=6) + loop("backward", get, limit=6)
    cost = program_cost(program(enter("forward"), enter("backward"), others=others))
    once = 8 * 4 + 4  # and the index
    assert cost.host_bytes == 6 * once + 6 * once
    assert cost.collectives == {}


@pytest.mark.parametrize(("space", "size"), [("S(5)", 32), ("S(1)", 0), ("", 0)])
def test_only_copies_to_and_from_the_memory_of_the_host_are_its_part(space, size):
    text = program(f"%c = (f32[8]{{0:T(8){space}}}, f32[8]{{0:T(8)}}, u32[]{{:S(2)}}) copy-start(%p)")
    assert program_cost(text).host_bytes == size


def test_async_collective_fusions_are_one_collective():
    gather = "%g = f32[32] all-gather(%p), channel_id=172"
    others = computation("%fused_computation.1", gather, 'ROOT %s = f32[8] custom-call(%g), custom_call_target="Start"')
    others += computation("%async_collective_fusion.1", gather, "ROOT %c = f32[8] convolution(%p, %p)")
    others += computation("%async_collective_fusion.2", gather, "ROOT %c = f32[8] convolution(%p, %p)")
    others += computation("%fused_computation.2", gather, 'ROOT %d = f32[8] custom-call(%g), custom_call_target="Done"')
    text = program(
        "%async-collective-start.1 = f32[8] fusion(%p), kind=kCustom, calls=%fused_computation.1",
        f"%fusion.1 = f32[8] fusion(%p), kind=kOutput, calls=%async_collective_fusion.1, {cycles(10)}",
        f"%fusion.2 = f32[8] fusion(%p), kind=kOutput, calls=%async_collective_fusion.2, {cycles(20)}",
        "ROOT %async-collective-done.1 = f32[8] fusion(%p), kind=kCustom, calls=%fused_computation.2",
        others=others,
    )
    cost = program_cost(text)
    assert cost.collectives == {"all-gather": Collective(1, 1, 128, 0)}
    assert cost.estimated_cycles == 30
    assert cost.without_estimate == {"async-collective-start": 1, "async-collective-done": 1}


def test_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
    scatter = computation(
        "%all-reduce-scatter.3.clone.1",
        "%input = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)",
        "%all-reduce.7 = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=42, to_apply=%add",
        "ROOT %slice = bf16[1024,1024]{1,0} dynamic-slice(%all-reduce.7, %i), dynamic_slice_sizes={1024,1024}",
    )
    fusion = "%fusion.5 = bf16[1024,1024] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3.clone.1"
    cost = program_cost(program(fusion, others=scatter))
    size = 4096 * 1024 * 2
    assert cost.collectives == {"reduce-scatter": Collective(1, 1, size, size)}
    assert cost.without_estimate == {"fusion": 1}


def test_what_has_no_estimate_goes_by_its_name():
    custom = "custom-call(%p), custom_call_target="
    text = program(
        f'%a.1 = f32[8] {custom}"AllocateBuffer"',
        f'%k.1 = f32[8] {custom}"tpu_custom_call", metadata={{op_name="jit(step)/while/body/jit(gmm)/pallas_call"}}',
        f'%k.2 = f32[8] {custom}"tpu_custom_call", metadata={{op_name="jit(step)/splash_mha_fwd/pallas_call" id=3}}',
        f'%k.3 = f32[8] {custom}"tpu_custom_call"',
        "%gather_fusion.12.3 = f32[8] fusion(%p), kind=kCustom",
        "%conv.1 = f32[8] convolution(%p, %p), dim_labels=bf_io->bf",
        "%negate.1 = f32[8] negate(%p)",
        enter("while"),
        others=loop("while", f'%a.2 = f32[8] {custom}"AllocateBuffer"', limit=4),
    )
    assert program_cost(text).without_estimate == {
        "AllocateBuffer": 5,
        "tpu_custom_call/gmm": 1,
        "tpu_custom_call/splash_mha_fwd": 1,
        "tpu_custom_call": 1,
        "gather_fusion": 1,
        "conv": 1,
    }


def test_instruction_may_span_lines():
    metadata = 'kernel_metadata={\n  "xprof":"{\\"block\\": 512}"\n}\n}, metadata={op_name="a/b/pallas_call"}'
    text = program(
        f'%k.1 = (f32[8], f32[8]) custom-call(%p), custom_call_target="tpu_custom_call", frontend={{{metadata}',
        f"ROOT %c = f32[8] copy(%p), {cycles(3)}",
    )
    cost = program_cost(text)
    assert cost.without_estimate == {"tpu_custom_call/b": 1}
    assert cost.estimated_cycles == 3


@pytest.mark.parametrize("text", ["", "HloModule jit_step\n", "%a = f32[8] copy(%p)\n  %b = f32[8] copy(%a)\n"])
def test_text_without_a_program_costs_nothing(text):
    cost = program_cost(text)
    assert (cost.estimated_cycles, cost.collectives, cost.without_estimate) == (0, {}, {})


def compile_layers(devices, layers: int, width: int, tokens: int, dtype: str) -> str:
    """A scan over `layers` square matrices, each gathered from all devices before it is multiplied with."""
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())

    def step(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, whole)), None

        return jax.lax.scan(layer, x, weights)[0]

    def array(*shape: int, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    weights = array(layers, width, width, spec=PartitionSpec(None, "fsdp"))
    x = array(tokens, width, spec=PartitionSpec("fsdp"))
    return jax.jit(step).lower(weights, x).compile().as_text() or ""


def test_program_for_eight_cpus_has_collectives_but_no_cycles():
    cost = program_cost(compile_layers(jax.devices(), layers=5, width=64, tokens=16, dtype="float32"))
    assert cost.collectives == {"all-gather": Collective(1, 5, 5 * 64 * 64 * 4, 5 * 64 * 64 * 4)}
    assert cost.estimated_cycles == 0


@pytest.fixture
def tpu_devices(monkeypatch):
    """The chips of a v5e-4 that is not there; what is compiled for them cannot be read back from a cache."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield devices
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def test_program_for_a_tpu_scales_with_its_layers(tpu_devices):
    width, tokens = 512, 1024
    three, six = (program_cost(compile_layers(tpu_devices, layers, width, tokens, "bfloat16")) for layers in (3, 6))
    size = width * width * 2
    assert three.collectives == {"all-gather": Collective(1, 3, 3 * size, 3 * size)}
    assert six.collectives == {"all-gather": Collective(1, 6, 6 * size, 6 * size)}
    assert six.estimated_cycles == pytest.approx(2 * three.estimated_cycles, rel=0.05)

    flops_per_cycle = 197e12 / 1.5e9
    ideal = 6 * 2 * width * width * tokens / 4 / flops_per_cycle
    assert ideal < six.estimated_cycles < 10 * ideal
