"""What the safetensors files of a folder hold, checked by their headers before a weight is read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from . import checkpoint_names as names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FP8 = "F8_E4M3"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    FP8: torch.float8_e4m3fn,
}
# the limit of the safetensors format
MAX_HEADER = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another model; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, by the file's header."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


def _read_json(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def entries_of(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint, from the headers of its files."""
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    try:
        data = (folder / INDEX).read_bytes()
    except OSError as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{reason}") from None
    weight_map = _read_json(data, str(folder / INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} lacks a weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise CheckpointError(
                f"{folder / INDEX} maps {name} to {file!r}, which is no file name in its folder"
            )
    headers = {file: _header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(f"{folder / INDEX} maps {name} to {file}, which lacks it")
    for file, header in headers.items():
        for name in header:
            if weight_map.get(name) != file and not names.is_ignorable(name):
                raise CheckpointError(
                    f"{folder / file} has {name}, which {INDEX} does not map to it"
                )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, whose length is checked against its header."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{file} has {size} bytes, but its header claims {length}: "
                    "truncated, or no safetensors file"
                )
            header = _read_json(stream.read(length), f"header of {file}")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    entries, ends = {}, {}
    for name, info in header.items():
        if name != "__metadata__":
            entries[name], ends[name] = _header_entry(name, info, file)
    available = size - 8 - length
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > available:
            raise CheckpointError(
                f"{file} is truncated in {name}: data of {available} bytes, it ends at {end}"
            )
    if available > max(ends.values(), default=0):
        raise CheckpointError(f"{file} has data beyond its last tensor: it is damaged")
    return entries


def _header_entry(name: str, info: Any, file: Path) -> tuple[Entry, int]:
    """A tensor, and the offset at which its data ends."""
    info = info if isinstance(info, dict) else {}
    dtype, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
    good = isinstance(dtype, str) and all(
        isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)
        for value in (shape, offsets)
    )
    if not good or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"header of {file} describes {name} in a way that makes no sense")
    if dtype in DTYPES:
        needed = reduce(lambda a, b: a * b, shape, DTYPES[dtype].itemsize)
        if offsets[1] - offsets[0] != needed:
            raise CheckpointError(
                f"header of {file} gives {name} {offsets[1] - offsets[0]} bytes, not {needed}"
            )
    return Entry(name, file, dtype, tuple(shape)), offsets[1]
