"""What devices send one another in a compiled program: its collectives, how often each runs, and their bytes."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

__all__: list[str] = []

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "c64": 8, "c128": 16}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of ``KINDS``.
      shapes: of what it gives, per device, such as ``("bf16[4096,512]",)``.
      devices: that take part in one group.
      bytes: of the largest of what goes in and what comes out, on one device, in one call.
      times: calls in one run of the program; a loop's body counts with its length.
      sent: bytes that one device sends in all calls, by the ring algorithm.
    """

    kind: str
    shapes: tuple[str, ...]
    devices: int
    bytes: int
    times: int
    sent: int


def collectives(program: jax.stages.Compiled | str) -> list[Collective]:
    """The collectives of a compiled program, or of its text, the largest sender first.

    With n devices in a group and b the bytes of the whole array (gathered, summed or exchanged), a device of a ring
    sends b (n - 1) / n for an all-gather, a reduce-scatter and an all-to-all, 2 b (n - 1) / n for an all-reduce, and b
    for a permutation.

    Args:
      program: ``jax.jit(f).lower(...).compile()``, or its ``as_text()``.

    Returns:
      One entry for each instruction that is run.

    Raises:
      ValueError: a loop of unknown length that holds a collective.

    Example:
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> rows = NamedSharding(mesh, PartitionSpec("data"))
      >>> compiled = jax.jit(lambda x: x.sum(), in_shardings=rows).lower(jax.numpy.ones(8)).compile()
      >>> collectives(compiled)  # one device has nobody to talk to
      []
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    parts, entry = _computations(text)
    devices = re.search(r"num_partitions=(\d+)", text)
    found = list(_walk(parts, entry, 1, int(devices[1]) if devices else 1))
    return sorted(found, key=lambda one: -one.sent)


def by_kind(found: list[Collective]) -> dict[str, dict[str, Any]]:
    """Calls and bytes sent by one device, for each kind that is there.

    Example:
      >>> by_kind([Collective("all-reduce", ("f32[4]",), 2, 16, 3, 48)])
      {'all-reduce': {'calls': 3, 'sent_bytes': 48}}
    """
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in found)]
    total = lambda kind, field: sum(getattr(one, field) for one in found if one.kind == kind)
    return {kind: {"calls": total(kind, "times"), "sent_bytes": total(kind, "sent")} for kind in kinds}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the one that is run."""
    parts: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            current = parts.setdefault(begins[2], [])
            entry = begins[2] if begins[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return parts, entry


def _walk(parts: dict[str, list[str]], name: str, times: int, devices: int) -> Iterator[Collective]:
    for line in parts.get(name, ()):
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        _, result, opcode, rest = found.groups()
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            yield _collective(kind, result, rest, times, devices, started=opcode != kind)
            continue
        inner = _CALLED.findall(rest)
        for branches in _BRANCHES.findall(rest):
            inner += [branch.strip().lstrip("%") for branch in branches.split(",")]
        repeats = times
        if opcode == "while":
            trips = _TRIPS.search(rest)
            below = [one for called in inner for one in _walk(parts, called, 1, devices)]
            if below and trips is None:
                raise ValueError(f"the loop {found[1]!r} holds {below[0].kind} and its length is not known.")
            repeats = times * int(trips[1]) if trips else times
        for called in inner:
            yield from _walk(parts, called, repeats, devices)


def _collective(kind: str, result: str, rest: str, times: int, devices: int, *, started: bool) -> Collective:
    arrays = _ARRAY.findall(result)
    if started and len(arrays) > 1:  # the operands stand before the results
        arrays = arrays[len(arrays) // 2 :]
    count = _group_size(rest, devices)
    size = sum(_array_bytes(*array) for array in arrays) * (count if kind == "reduce-scatter" else 1)
    share = (count - 1) / count
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    shapes = tuple(f"{dtype}[{shape}]" for dtype, shape in arrays)
    return Collective(kind, shapes, count, size, times, round(size * factor) * times)


def _group_size(rest: str, devices: int) -> int:
    """Devices of one group.

    They are written out, as an iota ``[groups,size]<=[...]``, or as axes of a mesh; where none is named all take part.
    """
    named = re.search(r"replica_groups=\w*mesh\[([^\]]*)\] ?\{([^}]*)\}", rest)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return len(listed[1].split(",")) if listed else devices


def _array_bytes(dtype: str, shape: str) -> int:
    bits = re.search(r"\d+", dtype)
    width = _BYTES.get(dtype) or (max(1, int(bits[0]) // 8) if bits else 0)
    return width * math.prod(int(size) for size in shape.split(",") if size)
