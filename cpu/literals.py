"""Constants and attribute dictionaries of textual MLIR."""

from __future__ import annotations

import re
import struct
from typing import Any

from .ir import Type, Unsupported

_FORMAT = {"f64": ("<d", "<Q"), "f32": ("<f", "<I"), "f16": ("<e", "<H")}


def parse_number(text: str, kind: Type) -> int | float:
    """A decimal or raw-bits literal of the element type."""
    text = text.strip()
    if text in ("true", "false"):
        return int(text == "true")
    if not kind.is_float:
        return int(text, 0)
    if text.startswith("0x"):
        return float_from_bits(int(text, 16), kind.elem)
    return float(text)


def float_from_bits(bits: int, elem: str) -> float:
    """The value whose bit pattern in `elem` is `bits`."""
    if elem == "bf16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    if elem in _FORMAT:
        value, raw = _FORMAT[elem]
        return struct.unpack(value, struct.pack(raw, bits))[0]
    if elem == "f8E5M2":
        return struct.unpack("<e", struct.pack("<H", bits << 8))[0]
    sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    scale = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -scale if sign else scale


def parse_constant(body: str, kind: Type | str) -> tuple[Any, Type]:
    """Value and type of `arith.constant`: a number, or a tuple of numbers for a list."""
    if not isinstance(kind, Type):
        return int(body.strip() == "true"), Type("i1")
    if not kind.is_tensor:
        return parse_number(body, kind), kind
    m = re.match(r"dense<(.*)>$", body.strip(), re.S)
    if m is None:
        raise Unsupported(f"constant {body[:60]!r} is not supported")
    inner = m[1]
    if inner.startswith('"0x'):
        return _from_bytes(bytes.fromhex(inner[3:-1]), kind), kind
    if inner.startswith("["):
        numbers = tuple(parse_number(t, kind) for t in re.findall(r"[^\[\],\s]+", inner))
        return numbers, kind
    return parse_number(inner, kind), kind


def _from_bytes(raw: bytes, kind: Type) -> tuple[int | float, ...]:
    size = kind.stored_bytes
    numbers = [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]
    if kind.is_float:
        return tuple(float_from_bits(n, kind.elem) for n in numbers)
    top = 1 << (8 * size - 1)
    return tuple(n - 2 * top if n >= top else n for n in numbers)


def parse_attributes(text: str) -> dict[str, Any]:
    """`axis = 0 : i32, reverse = false, order = array<i32: 1, 0>` as a dictionary."""
    attrs: dict[str, Any] = {}
    for part in _split(text):
        key, _, value = part.partition(" = ")
        attrs[key.strip()] = _value(value.strip()) if value else True
    return attrs


def _split(text: str) -> list[str]:
    parts, depth, start, quoted = [], 0, 0, False
    for at, char in enumerate(text):
        quoted ^= char == '"'
        depth += 0 if quoted else {"<": 1, "{": 1, "[": 1, ">": -1, "}": -1, "]": -1}.get(char, 0)
        if char == "," and depth == 0 and not quoted:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def _value(text: str) -> Any:
    if m := re.match(r"array<i\d+: (.*)>$", text):
        return tuple(int(t) if t not in ("true", "false") else t == "true"
                     for t in m[1].split(", "))  # fmt: skip
    if m := re.match(r"(-?\d+)(?: : \w+)?$", text):
        return int(m[1])
    if text in ("true", "false"):
        return text == "true"
    if m := re.match(r'"(.*)"$', text, re.S):
        return m[1]
    return text
