"""What a compiled XLA program costs a chip: the compiler's own cycles, and the bytes that its collectives move.

Read from the text of the optimised program (`compiled.as_text()`), by these rules:

    an instruction     runs as often as the trip counts of the while loops around it multiply to
    a conditional      runs every branch: an upper bound
    cycles             what XLA:TPU writes as `estimated_cycles`; a fusion's are for all that is in it, and what runs
                       beside others, on the SparseCores say, takes none
    a collective       counts once, also where it is split into a start and a done, or goes on inside of fusions;
                       in one piece it is exposed: nothing runs beside it
    the host           what a start sends to its memory, or fetches from there, is all of its arrays that lie elsewhere

Pallas kernels and collectives carry no estimate: their time is not in the cycles. A CPU program has no estimates.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """All collectives of one kind: how many there are, how often they run, and the bytes of all that on one chip.

    An execution counts the larger of what goes in and what comes out: of an all-gather the result, of a reduce-scatter
    the operand. `exposed` are the bytes of those that the chip waits for.
    """

    count: int  # type: ignore[assignment]
    executions: int
    bytes: float
    exposed: float


@dataclass(frozen=True)
class ProgramCost:
    """Of one run of a program, a train step say, on one chip.

    `host_bytes` go to the memory of the host and come from there, both ways together.
    `without_estimate`: how often each custom call or fusion runs whose cycles the compiler did not estimate. A fusion
    goes by its name without the number, a custom call by its target, a Pallas kernel by that and its own name:
    `tpu_custom_call/gmm`.
    """

    estimated_cycles: float
    collectives: dict[str, Collective]
    host_bytes: float
    without_estimate: dict[str, int]

    @property
    def collective_bytes(self) -> dict[str, float]:
        """Bytes by kind."""
        return {kind: collective.bytes for kind, collective in self.collectives.items()}


class _Instruction(NamedTuple):
    """`name = shape opcode(operands), attributes`, as written."""

    name: str
    is_root: bool
    shape: str
    opcode: str
    operands: str
    attributes: str


_Instructions = dict[str, _Instruction]
_Program = dict[str, _Instructions]


class _Run(NamedTuple):
    """An instruction, the computation it is in, how often it runs in all, the fusion it is a part of, and whether that
    computation runs beside others.
    """

    instruction: _Instruction
    computation: str
    times: int
    fusion: str | None
    asynchronous: bool


_NAME = re.compile(r"%([\w.\-]+)")
_START = re.compile(r"^(?:(ENTRY )?%([\w.\-]+) \(.*-> .*\{$|  (ROOT )?%([\w.\-]+) = )", re.MULTILINE)
_INSTRUCTION = re.compile(r"(.*?) ([a-z][a-z0-9\-]*)\((.*?)\)(?=, [\w\-]+=|\s*$)", re.DOTALL | re.MULTILINE)

_CALLS = {
    "while": "body",
    "conditional": "branch_computations|true_computation|false_computation",
    "fusion": "calls",
    "call": "to_apply",
    "async-start": "calls|async_computation",
    "call-start": "to_apply",
    "custom-call": "called_computations|calls|to_apply",
}
"""The attributes in which an opcode names what it runs."""

_KNOWN_TRIP_COUNT = re.compile(r"known_trip_count\D*(\d+)")
_TUPLE_INDEX = re.compile(r"\bindex=(\d+)")

_ESTIMATED_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_KERNEL = re.compile(r'op_name="[^"]*?([\w.\-]+)\)*/pallas_call')

_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([^\]]*)\](?!\{[^}]*S\(2\))")
"""Element type, its bits, dimensions. What lies in memory space 2 are the flags of asynchronous instructions."""

_ON_HOST = re.compile(r"\w+\[[^\]]*\]\{[^}]*S\(5\)\}")
"""An array in memory space 5, which is the host's."""


def program_cost(hlo_text: str) -> ProgramCost:
    """Add up a program, given as `compiled.as_text()`."""
    entry, program = _parse(hlo_text)
    cycles, host_bytes = 0, 0.0
    collectives: dict[str, list[Collective]] = defaultdict(list)
    without_estimate: Counter[str] = Counter()
    for run in _runs(program, entry):
        instruction, times = run.instruction, run.times
        if (kind := _collective_kind(run)) and not _began_earlier(run):
            size = times * _bytes_moved(instruction, program[run.computation])
            hidden = run.asynchronous or _only_starts(instruction)
            collectives[kind].append(Collective(1, times, size, 0.0 if hidden else size))
        if instruction.opcode.endswith("-start") and _ON_HOST.search(instruction.shape):
            host_bytes += times * _size(_ON_HOST.sub("", instruction.shape))
        if run.fusion is None and not run.asynchronous:
            if estimate := _ESTIMATED_CYCLES.search(instruction.attributes):
                cycles += times * int(estimate[1])
            elif instruction.opcode in ("custom-call", "fusion", "convolution"):
                without_estimate[_public_name(instruction)] += times
    totals = {kind: Collective(*map(sum, zip(*parts, strict=True))) for kind, parts in collectives.items()}
    return ProgramCost(float(cycles), totals, host_bytes, dict(without_estimate))


def _parse(text: str) -> tuple[str, _Program]:
    """The entry's name, and all computations. An instruction ends where the next begins: metadata may span lines."""
    entry, program = "", _Program()
    instructions: _Instructions = {}
    starts = [*_START.finditer(text)]
    ends = [*(start.start() for start in starts), len(text)][1:]
    for start, end in zip(starts, ends, strict=True):
        is_entry, computation, is_root, name = start.groups()
        if computation:
            instructions = program[computation] = {}
            entry = computation if is_entry else entry
        elif found := _INSTRUCTION.match(text, start.end(), end):
            shape, opcode, operands = found.groups()
            attributes = text[found.end() : end]
            instructions[name] = _Instruction(name, bool(is_root), shape, opcode, operands, attributes)
    return entry, program


def _runs(
    program: _Program, computation: str, times: int = 1, fusion: str | None = None, asynchronous: bool = False
) -> Iterator[_Run]:
    """All that a computation runs, itself and in what it calls."""
    instructions = program.get(computation, {})
    for instruction in instructions.values():
        yield _Run(instruction, computation, times, fusion, asynchronous)
        if instruction.opcode in _CALLS:
            trips = _trip_count(program, instructions, instruction) if instruction.opcode == "while" else 1
            inside = instruction.name if instruction.opcode == "fusion" else fusion
            beside = asynchronous or _only_starts(instruction)
            for called in _called(instruction, _CALLS[instruction.opcode]):
                yield from _runs(program, called, times * trips, inside, beside)


def _only_starts(instruction: _Instruction) -> bool:
    return instruction.opcode.endswith("-start") or instruction.name.startswith("async-collective-start")


def _called(instruction: _Instruction, attributes: str) -> list[str]:
    """The names in `attribute=%name` and `attribute={%name, %name}`."""
    values = re.findall(rf"\b(?:{attributes})=(%[\w.\-]+|\{{[^}}]*\}})", instruction.attributes)
    return [name for value in values for name in _NAME.findall(value)]


def _trip_count(program: _Program, around: _Instructions, loop: _Instruction) -> int:
    """As the compiler knows it, else (limit − start) / step of its counter: 1, 0 and 1 where nothing tells."""
    if known := _KNOWN_TRIP_COUNT.search(loop.attributes):
        return int(known[1])
    index, limit = _counter_and_limit(program, _called(loop, "condition"))
    start = step = None
    if index is not None:
        start = next((_integer(_element(operand, index, around)) for operand in _operands(loop, around)), None)
        for body in _called(loop, "body"):
            step = _step(program.get(body, {}), index)
    return max(1, math.ceil((limit - (start or 0)) / (step or 1)))


def _counter_and_limit(program: _Program, conditions: list[str]) -> tuple[int | None, int]:
    """Which element of a loop's tuple is compared, and with what: failing that, the largest number there is."""
    index = limit = None
    numbers = []
    for condition in (program.get(name, {}) for name in conditions):
        for test in condition.values():
            numbers.append(_integer(test))
            if test.opcode not in ("compare", "fusion"):
                continue
            for operand in _operands(test, condition):
                if element := _TUPLE_INDEX.search(operand.attributes):
                    index = int(element[1])
                if (number := _integer(operand)) is not None:
                    limit = number
            for fused in _called(test, "calls"):
                numbers += map(_integer, program.get(fused, {}).values())
    return index, max(filter(None, numbers), default=1) if limit is None else limit


def _step(body: _Instructions, index: int) -> int | None:
    """What the body adds to element `index` of its tuple."""
    for root in (instruction for instruction in body.values() if instruction.is_root):
        advanced = _element(root, index, body)
        if advanced and advanced.opcode == "add":
            return next(filter(None, map(_integer, _operands(advanced, body))), None)
    return None


def _operands(instruction: _Instruction, around: _Instructions) -> list[_Instruction]:
    return [around[name] for name in _NAME.findall(instruction.operands) if name in around]


def _element(instruction: _Instruction, index: int, around: _Instructions) -> _Instruction | None:
    """What was put into a tuple at `index`, before it was copied."""
    names = _NAME.findall(instruction.operands) if instruction.opcode == "tuple" else []
    element = around.get(names[index]) if index < len(names) else None
    while element and element.opcode == "copy":
        element = next(iter(_operands(element, around)), None)
    return element


def _integer(instruction: _Instruction | None) -> int | None:
    if instruction and instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands):
        return int(instruction.operands)
    return None


def _collective_kind(run: _Run) -> str | None:
    """A reduce-scatter that XLA:TPU made by itself is the fusion of an all-reduce with a slice."""
    kind = run.instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and "all-reduce-scatter" in run.computation:
        return "reduce-scatter"
    return kind if kind in COLLECTIVES else None


def _began_earlier(run: _Run) -> bool:
    """Of a collective that runs beneath fusions each shows it again: the first, `async-collective-start`, counts."""
    if run.fusion is None:
        return False
    return run.computation.startswith("async_collective_fusion") or run.fusion.startswith("async-collective-done")


def _bytes_moved(instruction: _Instruction, around: _Instructions) -> float:
    """Of one execution. A start's result holds its operands too; a ragged all-to-all's second operand is its result."""
    operands = _operands(instruction, around)
    if instruction.opcode.startswith("ragged-all-to-all"):
        operands = operands[:1]
    given = sum(_size(operand.shape) for operand in operands)
    result = _size(instruction.shape) - (given if instruction.opcode.endswith("-start") else 0)
    return max(given, result)


def _size(shape: str) -> float:
    """Bytes of an array, or of all arrays of a tuple, without the padding of tiles."""
    arrays = _ARRAY.findall(shape)
    return sum(int(bits or 8) / 8 * math.prod(map(int, re.findall(r"\d+", dims))) for _, bits, dims in arrays)


def _public_name(instruction: _Instruction) -> str:
    if instruction.opcode != "custom-call":
        return instruction.name.rstrip("0123456789.")
    names = (pattern.search(instruction.attributes) for pattern in (_TARGET, _KERNEL))
    return "/".join(name[1] for name in names if name) or instruction.opcode
