"""A user's own kernel on the command line: `--arg x=*bf16:16 --arg n=i32:16 --const BLOCK=1024`."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..kernels.arch import Arch
from .audit import Subject
from .capture import Launch, bind
from .compile import import_kernel

_ELEMENTS = 1 << 20
_DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "i1": torch.bool,
    "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
    "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64,
}  # fmt: skip
_TYPE = re.compile(r"(\*?)(\w+?)(?::(\d+))?$")


def parse_argument(text: str) -> tuple[Any, bool]:
    """What stands for an argument, a meta tensor or a number, and whether it is the true value.

    `*bf16:16` is a pointer divisible by 16 (what allocators give, so the default; `:1` is any),
    `i32:16` an integer divisible by 16, `i32` any integer, `6144` or `1e-5` a number itself.

    Raises:
        ValueError: it is none of these.
    """
    try:
        value = ast.literal_eval(text)
        if isinstance(value, int | float):
            return value, True
    except (SyntaxError, ValueError):
        pass
    found = _TYPE.match(text)
    if found is None or found[2] not in _DTYPES or int(found[3] or 1) < 1:
        raise ValueError(
            f"{text!r} is neither a number nor a type such as *bf16, *fp32:16, i32 or i32:16"
        )
    pointer, name, divisibility = found[1], found[2], int(found[3] or (16 if found[1] else 1))
    dtype = _DTYPES[name]
    if pointer:
        tensor = torch.empty(_ELEMENTS + 16, dtype=dtype, device="meta")
        return (tensor if divisibility % 16 == 0 else tensor[1:]), True
    if dtype.is_floating_point:
        return 0.5, False
    if dtype is torch.bool:
        return False, False
    base = 1 << 40 if name in ("i64", "u64") else 0
    return base + (16 if divisibility % 16 == 0 else 17), False


def parse_constant(text: str) -> Any:
    """A Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def parse_pairs(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """`name=value` texts. Raises ValueError for one without `=` or given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"{option} takes NAME=VALUE, got {pair!r}")
        if name in found:
            raise ValueError(f"{option} {name} is given twice")
        found[name] = value
    return found


def user_launch(
    where: str, arguments: Sequence[str], constants: Sequence[str], grid: str, options: dict
) -> Launch:
    """The launch that the command line describes.

    Raises:
        ValueError: the kernel is not found, or the arguments are not its arguments.
    """
    if ":" not in where:
        raise ValueError(f"name a kernel as module:function, got {where!r}")
    kernel = import_kernel(where)
    pairs = {k: parse_argument(v) for k, v in parse_pairs("--arg", arguments).items()}
    given, unknown = (
        {k: v for k, (v, _) in pairs.items()},
        {k for k, (_, sure) in pairs.items() if not sure},
    )
    fixed = {k: parse_constant(v) for k, v in parse_pairs("--const", constants).items()}
    for param in kernel.params:
        pool, other, option = (
            (fixed, given, "--const") if param.is_constexpr else (given, fixed, "--arg")
        )
        if param.name in other or (param.name not in pool and not param.has_default):
            raise ValueError(f"{where}: parameter {param.name} needs {option} {param.name}=...")
    names = [param.name for param in kernel.params]
    if strange := sorted(set(given | fixed).difference(names)):
        raise ValueError(f"{where} has no parameter {strange[0]}; it has {', '.join(names)}")
    try:
        sizes = tuple(int(g) for g in grid.split(","))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"--grid takes one to three positive numbers, got {grid!r}")
    launch = bind(kernel, sizes, (), {**given, **fixed, **options})
    return replace(launch, unknown=frozenset(unknown))


def user_subject(where: str, launch: Launch, arch: Arch, useful_bytes: int) -> Subject:
    """The launch as the audit takes it; the place to find the kernel again is `where`."""
    return Subject(where, "", launch, arch, useful_bytes=useful_bytes)
