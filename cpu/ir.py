"""The typed IR that the backend works on: a reading of TTIR, immutable once parsed.

A `Value` is compared by identity: SSA names in textual TTIR are unique per region only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FLOATS = ("f64", "f32", "f16", "bf16", "f8E4M3FN", "f8E5M2")
BITS = {
    "i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "index": 64, "ptr": 64,
    "f64": 64, "f32": 32, "f16": 16, "bf16": 16, "f8E4M3FN": 8, "f8E5M2": 8,
}  # fmt: skip


class Unsupported(Exception):
    """A kernel uses something this backend does not compile; the message names op and line."""


@dataclass(frozen=True)
class Type:
    """Element type and shape. `shape` is None for a scalar; `pointee` is set when elem is `ptr`."""

    elem: str
    shape: tuple[int, ...] | None = None
    pointee: str | None = None

    @property
    def is_tensor(self) -> bool:
        return self.shape is not None

    @property
    def dims(self) -> tuple[int, ...]:
        return self.shape or ()

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def is_float(self) -> bool:
        return self.elem in FLOATS

    @property
    def is_pointer(self) -> bool:
        return self.elem == "ptr"

    @property
    def is_int(self) -> bool:
        return self.elem not in FLOATS and self.elem != "ptr"

    @property
    def bits(self) -> int:
        return BITS[self.elem]

    @property
    def stored_bytes(self) -> int:
        return max(1, BITS[self.elem] // 8)

    def with_shape(self, shape: tuple[int, ...] | None) -> Type:
        return Type(self.elem, shape, self.pointee)

    def scalar(self) -> Type:
        return self.with_shape(None)

    def loaded(self) -> Type:
        """The type a load through this pointer (or tensor of pointers) yields."""
        assert self.pointee is not None
        return parse_element(self.pointee).with_shape(self.shape)

    def __str__(self) -> str:
        element = f"ptr<{self.pointee}>" if self.is_pointer else self.elem
        return element if self.shape is None else f"{'x'.join(map(str, self.shape))}x{element}"


def parse_element(text: str) -> Type:
    """`f32`, `i1`, `!tt.ptr<bf16>` (any address space) as a scalar type."""
    text = text.strip()
    if text.startswith("!tt.ptr<"):
        inner = text[len("!tt.ptr<") : text.rindex(">")]
        return Type("ptr", None, inner.rsplit(", ", 1)[0] if inner[-1].isdigit() and ", " in inner
                    else inner)  # fmt: skip
    if text not in BITS:
        raise Unsupported(f"element type {text} is not supported")
    return Type(text)


@dataclass(frozen=True)
class Location:
    """Innermost source position of an op, the variable it defines and the calls around it."""

    file: str = "<unknown>"
    line: int = 0
    name: str = ""
    callers: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        via = "".join(f", called from {file}:{line}" for file, line in self.callers)
        return f"{self.file}:{self.line}{via}"


@dataclass(frozen=True, eq=False)
class Value:
    """One SSA value."""

    name: str
    type: Type
    location: Location = Location()

    def __repr__(self) -> str:
        return f"{self.name}: {self.type}"


@dataclass(frozen=True, eq=False)
class Op:
    """One operation. `words` are the bare enum words of the pretty form, in order."""

    name: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    successors: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    location: Location = Location()

    @property
    def result(self) -> Value:
        return self.results[0]

    def refuse(self, why: str) -> Unsupported:
        return Unsupported(f"{self.location}: {self.name}: {why}")


@dataclass(frozen=True, eq=False)
class Block:
    """Straight-line ops; the last one is the terminator."""

    label: str
    arguments: tuple[Value, ...]
    ops: tuple[Op, ...]


@dataclass(frozen=True, eq=False)
class Region:
    """Blocks of one region; only function bodies have more than one."""

    blocks: tuple[Block, ...]

    @property
    def block(self) -> Block:
        return self.blocks[0]


@dataclass(frozen=True, eq=False)
class Function:
    """A `tt.func`."""

    name: str
    arguments: tuple[Value, ...]
    divisibility: tuple[int, ...]
    results: tuple[Type, ...]
    body: Region
    public: bool
    location: Location


@dataclass(frozen=True)
class Module:
    """All functions of one kernel; exactly one of them is public."""

    functions: tuple[Function, ...]

    @property
    def kernel(self) -> Function:
        return next(f for f in self.functions if f.public)


def walk(region: Region) -> Iterator[Op]:
    """Every op of a region and of the regions nested in it, in program order."""
    for block in region.blocks:
        for op in block.ops:
            yield op
            for inner in op.regions:
                yield from walk(inner)
