"""Ops that only rename elements: the index of the source from the index of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from .ir import Op

T = TypeVar("T")
VIEWS = {"tt.expand_dims", "tt.broadcast", "tt.trans", "tt.splat", "tt.reshape", "tt.unsplat"}


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for d in shape if d != 1)


def is_simple_view(op: Op) -> bool:
    """A view that permutes, repeats or drops whole dimensions (a reshape need not be one)."""
    if op.name == "tt.reshape":
        return squeezed(op.operands[0].type.dims) == squeezed(op.result.type.dims)
    return op.name in VIEWS


def source_index(op: Op, index: Sequence[T], zero: T) -> tuple[T, ...]:
    """Index into the operand of a simple view for an index into its result."""
    source, target = op.operands[0].type.dims, op.result.type.dims
    if op.name in ("tt.splat", "tt.unsplat"):
        return (zero,) * len(source)
    if op.name == "tt.trans":
        order = op.attrs["order"]
        result: list[T] = [zero] * len(source)
        for at, axis in enumerate(order):
            result[axis] = index[at]
        return tuple(result)
    if op.name == "tt.expand_dims":
        axis = op.attrs["axis"]
        return tuple(i for at, i in enumerate(index) if at != axis)
    if op.name == "tt.broadcast":
        return tuple(
            zero if s == 1 and t != 1 else i for i, s, t in zip(index, source, target, strict=True)
        )
    kept = iter([i for i, d in zip(index, target, strict=True) if d != 1])
    return tuple(zero if d == 1 else next(kept) for d in source)
