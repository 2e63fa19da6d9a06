"""What a compiled program sends between devices, read in its text."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Collective:
    """How many collectives of a kind a device takes part in per step, and their bytes."""

    count: int
    bytes: int


KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class CollectiveOp:
    """One collective of a compiled program.

    Attributes:
        kind: One of `KINDS`.
        arrays: dtype and shape, on one device, of what its bytes are counted from: an all-gather's
            results, and the operands of every other kind.
        bytes: The bytes of these arrays, of one execution.
        times: How often it is executed in a run of the program.
        groups: The devices that take part in it together, by their places in the flattened mesh, or the
            (source, target) pairs of a permute; () stands for all at once, None for a form not known.
        name: The place in the traced program that it comes from.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    times: int
    groups: tuple[tuple[int, ...], ...] | None
    name: str


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of a compiled program by kind: how many are executed, and their bytes.

    Bytes are those of the larger side on one device: what an all-gather gives, and what every other
    kind is given. They are sizes of buffers, not of traffic: of a buffer of n bytes in a group of g
    devices, a ring moves (g - 1) / g n over each link for all-gather and reduce-scatter, and twice that
    for all-reduce. What a loop holds counts once for each of its steps.

    Args:
        text: `compiled.as_text()`.

    Returns:
        {kind: Collective}, the most bytes first; kinds that do not occur are left out.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import AxisType, PartitionSpec as P
    >>> mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(AxisType.Auto,))
    >>> where = jax.sharding.NamedSharding(mesh, P("x"))
    >>> x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=where)
    >>> text = jax.jit(jnp.sum).lower(x).compile().as_text()
    >>> len(jax.devices()) == 1 or collectives(text)["all-reduce"] == Collective(count=1, bytes=4)
    True
    """
    found: dict[str, Collective] = {}
    for op in collective_ops(text):
        old = found.get(op.kind, Collective(0, 0))
        found[op.kind] = Collective(old.count + op.times, old.bytes + op.times * op.bytes)
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def collective_ops(text: str) -> list[CollectiveOp]:
    """The single collectives of a compiled program, in the order of its text.

    An asynchronous one counts at its start. What stands in the body of a loop has the loop's trip count
    as its `times`: the compiler's, else what its integer counters come to, else 1, as where data decide.
    Of a conditional the branch with the most bytes counts. A TPU's fused reduction that keeps only its own
    slice of the sum is a reduce-scatter.

    Args:
        text: `compiled.as_text()`.

    Raises:
        ValueError: the text is not that of a compiled program.
    """
    program, entry = _read_program(text)
    # A TPU spreads an asynchronous collective over several fusions, and each shows it once more.
    started = {
        channel
        for computation in program.values()
        if any(_STARTS in instruction.rest for instruction in computation.values())
        for channel in map(_channel, computation.values())
        if channel
    }

    @functools.cache
    def inside(name: str, fused: bool) -> tuple[CollectiveOp, ...]:
        found: list[CollectiveOp] = []
        computation = program[name]
        is_start = any(_STARTS in instruction.rest for instruction in computation.values())
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            called = [other for other in _called(instruction) if other in program]
            if kind in KINDS:
                if is_start or _channel(instruction) not in started:
                    found.append(_read_collective(kind, instruction, computation, fused))
            elif instruction.opcode == "conditional":
                branches = [inside(other, False) for other in called]
                found += max(branches, key=lambda ops: sum(op.bytes * op.times for op in ops), default=())
            else:
                times = _trips(instruction, computation, program) if instruction.opcode == "while" else 1
                ops = (op for other in called for op in inside(other, instruction.opcode == "fusion"))
                found += [dataclasses.replace(op, times=op.times * times) for op in ops]
        return tuple(found)

    return list(inside(entry, False))


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes
    is_root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest[: _closing(self.rest, 0)])


_Computation = dict[str, _Instruction]
_STARTS = 'custom_call_target="AsyncCollectiveStart"'
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ASSIGNED = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|branch_computations|called_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%?[\w.-]+)"
)
_APPLIED = re.compile(r"\bto_apply=%?([\w.-]+)")


def _read_program(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, each of its instructions by name; and the name of the entry."""
    program: dict[str, _Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = program.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif assigned := _ASSIGNED.match(line):
            rest = line[assigned.end() :]
            # A type has no blank in it, unless it is a tuple's.
            end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
            if opcode := _OPCODE.match(rest, end):
                about = rest[:end], opcode[1], rest[opcode.end() - 1 :], bool(assigned[1])
                current[assigned[2]] = _Instruction(assigned[2], *about)
    if not entry:
        raise ValueError("this is no text of a compiled program; write compiled.as_text().")
    return program, entry


def _closing(text: str, start: int) -> int:
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    return len(text)


def _called(instruction: _Instruction) -> list[str]:
    if instruction.opcode in ("async-update", "async-done"):
        return []  # they name what the start has called
    names = [name for found in _CALLED.findall(instruction.rest) for name in re.findall(r"[\w.-]+", found)]
    if instruction.opcode == "call":
        names += _APPLIED.findall(instruction.rest)
    return names


def _channel(instruction: _Instruction) -> str | None:
    found = re.search(r"\bchannel_id=(\d+)", instruction.rest) if instruction.opcode in KINDS else None
    return found and found[1]


def _trips(loop: _Instruction, computation: _Computation, program: dict[str, _Computation]) -> int:
    """How often a loop's body runs: the compiler's word, else by following its counters; else 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    names = [re.search(rf"\b{part}=%?([\w.-]+)", loop.rest) for part in ("condition", "body")]
    condition, body = (program[found[1]] if found else {} for found in names)
    test, end = (next((x for x in part.values() if x.is_root), None) for part in (condition, body))
    start = computation.get(loop.operands[0])
    if test is None or end is None or start is None or start.opcode != "tuple" or end.opcode != "tuple":
        return 1
    counters = [_integer(name, computation, ()) for name in start.operands]
    for trips in range(_MOST_TRIPS):
        goes_on = _integer(test.name, condition, counters)
        if goes_on is None:
            break
        if not goes_on:
            return trips
        counters = [_integer(name, body, counters) for name in end.operands]
    return 1


_MOST_TRIPS = 100_000
_INTEGER = re.compile(r"(pred|[su]\d+)\[\]")
_ON_INTEGERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("copy", "bitcast", "bitcast-convert", "convert", "reshape"), operator.pos),
    **{"add": operator.add, "subtract": operator.sub, "multiply": operator.mul},
    **{"and": operator.and_, "or": operator.or_, "not": operator.invert},
    **{"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge},
    **{"EQ": operator.eq, "NE": operator.ne},
    "select": lambda which, first, second: first if which else second,
}


def _integer(name: str, computation: _Computation, carried: Sequence[int | None]) -> int | None:
    """What an instruction gives, where that is one integer made of constants and of what a loop carries."""
    instruction = computation.get(name)
    kind = _INTEGER.match(instruction.type) if instruction else None
    if instruction is None or kind is None:
        return None
    if instruction.opcode == "constant":
        found = re.match(r"\((-?\d+)\)", instruction.rest.replace("true", "1").replace("false", "0"))
        return int(found[1]) if found else None
    if instruction.opcode == "get-tuple-element":
        found = re.search(r"\bindex=(\d+)", instruction.rest)
        source = computation.get(instruction.operands[0])
        if not carried or found is None or source is None or source.opcode != "parameter":
            return None
        return carried[int(found[1])]
    direction = re.search(r"\bdirection=(\w+)", instruction.rest)
    operation = _ON_INTEGERS.get(direction[1] if direction else instruction.opcode)
    values = [_integer(operand, computation, carried) for operand in instruction.operands]
    if operation is None or None in values:
        return None
    bits = 1 if kind[1] == "pred" else int(kind[1][1:])
    value = operation(*values) % 2**bits
    return value - 2**bits if kind[1][0] == "s" and value >= 2 ** (bits - 1) else value


def _read_collective(
    kind: str, instruction: _Instruction, computation: _Computation, fused: bool
) -> CollectiveOp:
    operands = instruction.operands
    attributes = instruction.rest[_closing(instruction.rest, 0) :]
    if kind == "all-gather":
        arrays = _ARRAY.findall(instruction.type)
        if instruction.opcode.endswith("-start"):
            arrays = arrays[len(operands) :]  # the operands stand before the results
    else:
        count = 1 if kind in ("collective-permute", "ragged-all-to-all") else len(operands)
        arrays = [array for name in operands[:count] for array in _ARRAY.findall(computation[name].type)]
    if kind == "all-reduce" and fused:
        users = (other for other in computation.values() if instruction.name in other.operands)
        kind = "reduce-scatter" if any(user.opcode == "dynamic-slice" for user in users) else kind
    shapes = tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in arrays)
    name = re.search(r'op_name="([^"]*)"', attributes)
    return CollectiveOp(
        kind=kind,
        arrays=shapes,
        bytes=sum(math.prod(shape) * _bits(dtype) for dtype, shape in shapes) // 8,
        times=1,
        groups=_groups(attributes),
        name=name[1] if name else "",
    )


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8 if dtype == "pred" else 0


_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # 0, 1, 2, ... in this shape, then with its axes in this order
_BY_NUMBER = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_BY_AXES = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{_IOTA}|([\d,]*))\))? \{{([^}}]*)\}}"
)


def _groups(attributes: str) -> tuple[tuple[int, ...], ...] | None:
    if found := _LISTED.search(attributes):
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1]))
    if found := _BY_NUMBER.search(attributes):
        groups = _iota(found[2], found[3]).reshape(_numbers(found[1]))
    elif found := _BY_AXES.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        devices = np.array(_numbers(found[4])) if found[4] else _iota(found[2] or _shape(sizes), found[3])
        groups = _by_axes(sizes, devices, found[5])
    else:
        return None
    return tuple(tuple(int(i) for i in group) for group in groups)


def _shape(sizes: Mapping[str, int]) -> str:
    return ",".join(map(str, sizes.values()))


def _iota(shape: str, order: str | None) -> np.ndarray:
    devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (devices.transpose(_numbers(order)) if order else devices).reshape(-1)


def _by_axes(sizes: Mapping[str, int], devices: np.ndarray, grouped: str) -> np.ndarray:
    """Groups over mesh axes, or over a part of one: 'axis':(what of it stands before the part)size."""
    parts = {name: [(size, False)] for name, size in sizes.items()}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped):
        first, inner = (int(before), int(size)) if size else (1, sizes[name])
        parts[name] = [(first, False), (inner, True), (sizes[name] // first // inner, False)]
    axes = [part for name in sizes for part in parts[name]]
    order = sorted(range(len(axes)), key=lambda i: axes[i][1])  # what is grouped goes last
    together = math.prod(size for size, is_grouped in axes if is_grouped)
    return devices.reshape([size for size, _ in axes]).transpose(order).reshape(-1, together)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
