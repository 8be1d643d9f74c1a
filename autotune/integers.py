"""Integer, mask and pointer arithmetic of TTIR on numpy arrays; all else is unknown (None).

A pointer is a 64-bit number. Unknown operands give unknown results, so what depends on data that
is not there is recognised and not guessed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..cpu.ir import Op, Type

Number = Any  # an array, a number, or None: unknown

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul,
    "divui": operator.floordiv, "remui": operator.mod, "floordivsi": operator.floordiv,
    "andi": operator.and_, "ori": operator.or_, "xori": operator.xor,
    "shli": operator.lshift, "shrui": operator.rshift, "shrsi": operator.rshift,
    "maxsi": np.maximum, "minsi": np.minimum, "maxui": np.maximum, "minui": np.minimum,
    "divsi": lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)),
    "remsi": lambda a, b: np.sign(a) * (np.abs(a) % np.abs(b)),
    "ceildivsi": lambda a, b: -(-a // b), "ceildivui": lambda a, b: -(-a // b),
}  # fmt: skip
_ORDER: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
_CASTS = {"extsi", "extui", "index_cast", "index_castui"}
_FOLDS = {
    "addi": np.add, "maxsi": np.maximum, "maxui": np.maximum, "minsi": np.minimum,
    "minui": np.minimum, "ori": np.bitwise_or, "andi": np.bitwise_and, "xori": np.bitwise_xor,
}  # fmt: skip


def constant(value: Any, kind: Type) -> Number:
    """`arith.constant`; floating-point values are not followed."""
    if kind.is_float:
        return None
    dtype = np.bool_ if kind.elem == "i1" else np.int64
    if not kind.is_tensor:
        return dtype(value)
    if isinstance(value, tuple):
        return np.array(value, dtype).reshape(kind.dims)
    return np.full(kind.dims, value, dtype)


def arithmetic(op: Op, values: Sequence[Number]) -> Number:
    """The result of an op without side effects; None where it is unknown."""
    kind = op.result.type
    if kind.is_float or any(v is None for v in values):
        return None
    name = op.name.split(".")[1]
    with np.errstate(all="ignore"):
        if op.name == "arith.select":
            return np.where(*values)
        if op.name == "arith.cmpi":
            return _ORDER[op.words[0].lstrip("su") if len(op.words[0]) == 3 else op.words[0]](
                *values
            )
        if op.name.startswith("arith."):
            return _arithmetic(name, kind, values)
        return _shaped(op, name, kind, values)


def _arithmetic(name: str, kind: Type, values: Sequence[Number]) -> Number:
    if name in _BINARY:
        if kind.elem == "i1" and name in ("addi", "subi"):
            return np.not_equal(*values)
        return _BINARY[name](*values)
    if name in _CASTS:
        signed_bit = name == "extsi" and np.asarray(values[0]).dtype == np.bool_
        return -np.int64(values[0]) if signed_bit else np.asarray(values[0]).astype(np.int64)[()]
    if name == "trunci":
        if kind.elem == "i1":
            return (values[0] & 1).astype(np.bool_)
        half = 1 << (kind.bits - 1)
        return ((values[0] + half) & (2 * half - 1)) - half
    return None


def _shaped(op: Op, name: str, kind: Type, values: Sequence[Number]) -> Number:
    """Ops that move or combine elements."""
    if name == "make_range":
        return np.arange(op.attrs["start"], op.attrs["end"], dtype=np.int64)
    if name == "addptr":
        assert kind.pointee is not None
        size = kind.loaded().stored_bytes
        return values[0] + np.int64(size) * values[1]
    if name in ("splat", "broadcast"):
        return np.broadcast_to(values[0], kind.dims)
    if name in ("expand_dims", "reshape", "unsplat"):
        return np.reshape(values[0], kind.dims)[()]
    if name == "trans":
        return np.transpose(values[0], op.attrs["order"])
    if name == "bitcast" or name in ("ptr_to_int", "int_to_ptr"):
        return values[0]
    if name in ("reduce", "scan") and len(values) == 1:
        return _folded(op, name, values[0])
    return None


def _folded(op: Op, name: str, value: Number) -> Number:
    body = op.regions[0].block.ops
    fold = _FOLDS.get(body[0].name.split(".")[1]) if len(body) == 2 else None
    if fold is None or op.attrs.get("reverse"):
        return None
    value = np.asarray(value).astype(np.int64)
    axis = op.attrs["axis"]
    return fold.reduce(value, axis) if name == "reduce" else fold.accumulate(value, axis)
