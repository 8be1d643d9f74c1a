"""What a kernel asks of memory, found by walking its TTIR with real sizes and no data.

Integers, masks and addresses are evaluated for a sample of programs; floating-point values are
not. Data that steers a kernel (offsets of experts, starts of sequences) is read where the caller
gave it. Where it did not, both the branch and the trip count are guesses and the result says so.

An access moves the 32-byte sectors that its addresses touch, each once per time it is executed:
what the program requests, before any cache between programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..cpu.ir import Block, Op, Region, Unsupported, Value
from ..cpu.parser import parse_module
from .integers import Number, arithmetic, constant

SECTOR = 32
WIDE = 16
PROGRAMS = 9
_TRIPS = 6
_GOLDEN = 0.618033988749895
_TURNS = 64
_SPACE = 44  # each pointer argument owns 2^44 bytes of addresses


@dataclass
class AccessCount:
    """One load or store of the source, summed over the sampled programs.

    `argument` is the kernel's parameter it goes through. `wide` holds while every execution
    covered whole aligned 16-byte pieces; `elements` is the size of its tile.
    """

    kind: str
    argument: str
    where: tuple[str, int]
    elements: int
    size: int
    times: float = 0.0
    moved: float = 0.0
    wanted: float = 0.0
    wide: bool = True


@dataclass
class Traffic:
    """Per launch: bytes `moved`, `flops` of dot products, executions of each loop's body.

    `trips` counts, for each loop in program order, how often its body runs per program. `exact` is
    False where data was missing.
    """

    accesses: dict[Op, AccessCount] = field(default_factory=dict)
    trips: dict[Op, float] = field(default_factory=dict)
    flops: float = 0.0
    exact: bool = True

    @property
    def moved(self) -> float:
        return sum(a.moved for a in self.accesses.values())


def sample_of(total: int, programs: int) -> list[int]:
    """Which of `total` programs stand for all: the first, the last, and one in each equal part.

    Where in its part a program lies follows the golden ratio, so that no period of the grid is hit
    again and again.
    """
    if total <= programs:
        return list(range(total))
    parts = np.arange(1, programs - 1)
    inside = (parts + parts * _GOLDEN % 1) / programs
    return sorted({0, total - 1, *(int(p) for p in inside * total)})


def measure(
    ttir: str,
    arguments: Mapping[str, Any],
    grid: Sequence[int],
    contents: Mapping[str, Any],
    programs: int = PROGRAMS,
) -> Traffic | None:
    """The traffic of a launch; None if the kernel uses what is not understood.

    `arguments` gives the value of each integer parameter and the byte offset of each pointer;
    `contents` the data behind some of the pointers. So many `programs` are walked.
    """
    try:
        kernel = parse_module(ttir).kernel
    except Unsupported:
        return None
    traffic, total = Traffic(), int(np.prod(grid))
    sample = sample_of(total, programs)
    for program in sample:
        walk = _Walk(traffic, grid, program, contents, total / len(sample))
        for at, argument in enumerate(kernel.arguments):
            name = argument.location.name or argument.name.lstrip("%")
            value = arguments.get(name)
            if argument.type.is_pointer:
                walk.names[at + 1] = name
                value = np.int64((at + 1) << _SPACE) + np.int64(value or 0)
            elif value is not None:
                value = np.int64(value) if argument.type.is_int else None
            walk.values[argument] = value
        walk.blocks(kernel.body)
    for op in traffic.trips:
        traffic.trips[op] /= total
    return traffic


class _Walk:
    """One program. `weight` is the number of programs it stands for."""

    def __init__(
        self, traffic: Traffic, grid: Sequence[int], program: int, contents: Any, weight: float
    ) -> None:
        self.traffic, self.contents, self.weight = traffic, contents, weight
        self.grid = dict(zip("xyz", grid, strict=True))
        self.program = dict(
            zip("xyz", (program % grid[0], program // grid[0] % grid[1],
                        program // grid[0] // grid[1]), strict=True)
        )  # fmt: skip
        self.values: dict[Value, Number] = {}
        self.names: dict[int, str] = {}
        self._special: dict[str, Callable[[Op], None]] = {
            "tt.load": self._load, "tt.store": self._store, "tt.atomic_rmw": self._atomic,
            "tt.atomic_cas": self._atomic, "tt.dot": self._dot, "tt.dot_scaled": self._dot,
            "scf.for": self._for, "scf.if": self._if, "scf.while": self._while,
        }  # fmt: skip

    def blocks(self, region: Region) -> None:
        """A function's body; a branch on unknown data goes on, it does not leave."""
        found = {block.label: block for block in region.blocks}
        block: Block | None = region.blocks[0]
        for _ in range(len(found)):
            assert block is not None
            last = self._ops(block)
            if not last.successors:
                return
            choice = 0
            if len(last.successors) == 2:
                condition = self.values[last.operands[0]]
                if condition is None:
                    self.traffic.exact = False
                    ends = found[last.successors[0][0]].ops[-1].name == "tt.return"
                    choice = int(ends)
                else:
                    choice = 0 if condition else 1
            label, passed = last.successors[choice]
            block = found[label]
            for argument, value in zip(block.arguments, passed, strict=True):
                self.values[argument] = self.values[value]

    def _ops(self, block: Block) -> Op:
        for op in block.ops:
            handler = self._special.get(op.name)
            if handler is not None:
                handler(op)
            else:
                self._plain(op)
        return block.ops[-1]

    def _plain(self, op: Op) -> None:
        if op.name == "tt.call":
            self.traffic.exact = False
        if op.name == "arith.constant":
            result = constant(op.attrs["value"], op.result.type)
        elif op.name in ("tt.get_program_id", "tt.get_num_programs"):
            table = self.program if op.name == "tt.get_program_id" else self.grid
            result = np.int64(table[op.words[0]])
        elif len(op.results) == 1:
            result = arithmetic(op, [self.values[o] for o in op.operands])
        else:
            result = None
        for value in op.results:
            self.values[value] = result

    def _dot(self, op: Op) -> None:
        depth = op.operands[0].type.dims[-1]
        packed = 2 if op.name == "tt.dot_scaled" and op.operands[0].type.elem == "i8" else 1
        self.traffic.flops += 2 * op.result.type.size * depth * packed * self.weight
        self.values[op.result] = None

    def _load(self, op: Op) -> None:
        pointer, *masks = op.operands
        mask = self.values[masks[0]] if masks else True
        addresses = self._access(op, "load", pointer, mask)
        self.values[op.result] = None
        if addresses is None or op.result.type.is_float:
            return
        flat: np.ndarray[Any, Any] = np.asarray(addresses)
        data = self.contents.get(self._name(flat))
        if data is not None:
            size = op.result.type.stored_bytes
            at = (flat & ((1 << _SPACE) - 1)) // size
            live = np.broadcast_to(mask, flat.shape) & (at < data.size)
            self.values[op.result] = np.where(live, data.reshape(-1)[np.where(live, at, 0)], 0)[()]

    def _store(self, op: Op) -> None:
        pointer, _, *masks = op.operands
        self._access(op, "store", pointer, self.values[masks[0]] if masks else True)

    def _atomic(self, op: Op) -> None:
        self._access(op, "atomic", op.operands[0], True)
        self.values[op.result] = None

    def _name(self, addresses: np.ndarray) -> str:
        return self.names.get(int(addresses.flat[0]) >> _SPACE, "") if addresses.size else ""

    def _access(self, op: Op, kind: str, pointer: Value, mask: Number) -> Number:
        """Counts an access; its addresses where they are known."""
        addresses, size = self.values[pointer], pointer.type.loaded().stored_bytes
        known = addresses is not None and mask is not None
        self.traffic.exact &= known
        flat: np.ndarray[Any, Any] = np.asarray(addresses if addresses is not None else 0, np.int64)
        record = self.traffic.accesses.setdefault(
            op,
            AccessCount(kind, self._name(flat) if addresses is not None else "",
                        (op.location.file.rsplit("/", 1)[-1], op.location.line),
                        pointer.type.size if pointer.type.is_tensor else 1, size),
        )  # fmt: skip
        record.times += self.weight
        if addresses is None:
            moved = wanted = record.elements * size
            record.wide = False
        else:
            live = flat if mask is None else flat[np.broadcast_to(mask, flat.shape)]
            unique = np.unique(live)
            moved = np.unique(unique // SECTOR).size * SECTOR
            wanted = unique.size * size
            # whole aligned pieces; one tail that begins a piece and does not fill it is let off
            pieces, first = np.unique(unique // WIDE, return_index=True)
            starts = bool((unique[first] % WIDE == 0).all())
            record.wide &= starts and pieces.size * WIDE <= wanted + WIDE
        record.moved += float(moved) * self.weight
        record.wanted += float(wanted) * self.weight
        return addresses

    def _body(self, op: Op, region: Region, weight: float, passed: list[Number]) -> list[Number]:
        """Runs a body once as if `weight` times; what it yields."""
        for argument, value in zip(region.block.arguments, passed, strict=True):
            self.values[argument] = value
        outer, self.weight = self.weight, self.weight * weight
        if op.name != "scf.if":
            self.traffic.trips[op] = self.traffic.trips.get(op, 0.0) + self.weight
        last = self._ops(region.block)
        self.weight = outer
        return [self.values[v] for v in last.operands]

    def _for(self, op: Op) -> None:
        low, high, step = (self.values[o] for o in op.operands[:3])
        carried = [self.values[o] for o in op.operands[3:]]
        self.traffic.trips.setdefault(op, 0.0)
        if low is None or high is None or step is None:
            self.traffic.exact = False
            low, high, step = np.int64(0), np.int64(1), np.int64(1)
        trips = max(0, int(-(-(high - low) // step)))
        walked = min(trips, _TRIPS)
        for trip in range(walked):
            # the last one walked stands for all that are not
            weight = 1.0 if trip < walked - 1 else float(trips - walked + 1)
            before = carried
            carried = self._body(op, op.regions[0], weight, [low + trip * step, *carried])
            if weight > 1:
                pairs = zip(before, carried, strict=True)
                carried = [_ahead(a, b, trips - walked) for a, b in pairs]
        for value, result in zip(op.results, carried, strict=True):
            self.values[value] = result

    def _if(self, op: Op) -> None:
        condition = self.values[op.operands[0]]
        if condition is None:
            self.traffic.exact = False
        taken = 0 if condition is None or condition else 1
        results: list[Number] = [None] * len(op.results)
        if taken < len(op.regions):
            results = self._body(op, op.regions[taken], 1.0, [])
        for value, result in zip(op.results, results, strict=True):
            self.values[value] = None if condition is None else result

    def _while(self, op: Op) -> None:
        """Turn by turn while data says so; where it is not there, one turn."""
        passed = [self.values[o] for o in op.operands]
        self.traffic.trips.setdefault(op, 0.0)
        for _ in range(_TURNS):
            turns = self.traffic.trips[op]
            going, *passed = self._body(op, op.regions[0], 1.0, passed)
            self.traffic.trips[op] = turns  # a turn is a test and a body
            if going is not None and not going:
                break
            passed = self._body(op, op.regions[1], 1.0, passed)
            if going is None:
                self.traffic.exact = False
                passed = [None] * len(op.results)
                break
        else:
            self.traffic.exact = False
        for value, result in zip(op.results, passed, strict=True):
            self.values[value] = result


def _ahead(before: Number, after: Number, trips: int) -> Number:
    """A carried number after `trips` more equal steps; unknown if it is no number."""
    if before is None or after is None or np.asarray(after).dtype == np.bool_:
        return None
    return after + (after - before) * trips
