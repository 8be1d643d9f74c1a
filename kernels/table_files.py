"""Tuning tables on disk: what an entry says, where the files lie, and reading them.

One JSON file per architecture is shipped with the package and one lies in the user's cache
directory (`KEXAONE_CACHE_DIR`, or the platform's). Reading never changes a file: one that is
damaged, of another program or of a newer format is ignored, with one warning.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .arch import Arch

MAGIC = "kexaone tuning table"
FORMAT = 1
PROVENANCES = ("measured", "calibrated", "static")
"""From the most to the least trusted."""
Values = Mapping[str, Any]
_PLAIN = (bool, int, float, str, type(None))
# found in this process and perhaps not on disk; `remember` adds to it
_remembered: dict[str, list[Entry]] = {}


class Foreign(ValueError):
    """A file is no tuning table of this format; the message says what it is."""


@dataclass(frozen=True)
class Entry:
    """A configuration and what it was found for.

    `kernels` maps the names of the kernels that it configures to the hashes of their sources,
    `triton` is the first and the last release under which it was the winner. `figures` are times in
    microseconds (`chosen_us`, `default_us`, `predicted_us`, ...), for people.
    """

    op: str
    arch: str
    machine: str
    dtype: str
    problem: Values
    kernels: Mapping[str, str]
    triton: tuple[str, str]
    config: Values
    provenance: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Entries of one key answer the same question; only one of them is kept."""
        parts = (self.op, self.dtype, dict(self.problem), self.arch, self.machine,
                 self.provenance == "static", dict(self.kernels))  # fmt: skip
        return json.dumps(parts, sort_keys=True)


def release(version: str) -> str:
    """Major and minor number of a version: `3.9`."""
    return ".".join(version.split("+")[0].split(".")[:2])


def within(version: str, limits: tuple[str, str]) -> bool:
    """Whether a release lies in a range of releases."""
    return _numbers(limits[0]) <= _numbers(version) <= _numbers(limits[1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def plain(value: Any) -> dict[str, Any]:
    """A problem or a configuration as names and plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    return {str(position): v for position, v in enumerate(values)}


def distance(a: Values, b: Values) -> float:
    """How far apart two problems are: numbers by their ratio in powers of two, all else not at all.

    Infinite where something that is no number differs.
    """
    if a.keys() != b.keys():
        return math.inf
    total = 0.0
    for name, left in a.items():
        right = b[name]
        if left == right and type(left) is type(right):
            continue
        numbers = [v for v in (left, right) if type(v) in (int, float) and v >= 0]
        if len(numbers) < 2:
            return math.inf
        total += abs(math.log2((left + 1) / (right + 1)))
    return total


def cache_directory() -> Path:
    """Where the user's tables lie."""
    chosen = os.environ.get("KEXAONE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    from platformdirs import user_cache_path

    return user_cache_path("kexaone", appauthor=False)


def user_file(arch: str) -> Path:
    return cache_directory() / "tuned" / f"{arch}.json"


def shipped_file(arch: str) -> Path:
    return Path(__file__).parent / "tuned" / f"{arch}.json"


def parse(text: str) -> list[Entry]:
    """The entries of a table. Raises Foreign."""
    try:
        data = json.loads(text)
    except ValueError:
        raise Foreign("is damaged") from None
    if not isinstance(data, dict) or data.get("kind") != MAGIC:
        raise Foreign("is no tuning table of kexaone")
    if data.get("format") != FORMAT:
        raise Foreign(f"has format {data.get('format')!r}, this version of kexaone has {FORMAT}")
    try:
        return [_entry(item) for item in data["entries"]]
    except (KeyError, TypeError, ValueError):
        raise Foreign("is damaged") from None


def _entry(item: dict[str, Any]) -> Entry:
    entry = Entry(**{**item, "triton": tuple(item["triton"])})
    first, last = entry.triton
    texts = (entry.op, entry.arch, entry.machine, entry.dtype, first, last)
    maps = (entry.problem, entry.kernels, entry.config, entry.figures)
    right = (
        all(isinstance(t, str) for t in texts)
        and all(isinstance(m, dict) for m in maps)
        and all(isinstance(v, _PLAIN) for m in maps for v in m.values())
        and entry.provenance in PROVENANCES
    )
    if not right or not within(first, (first, last)):
        raise ValueError
    return entry


def render(arch: str, entries: list[Entry]) -> str:
    """The file of some entries: sorted, one a line, so that two branches merge as text."""
    lines = [json.dumps(dataclasses.asdict(e), sort_keys=True)
             for e in sorted(entries, key=lambda e: (e.key, e.triton))]  # fmt: skip
    head = json.dumps({"kind": MAGIC, "format": FORMAT, "arch": arch})[:-1]
    body = ",\n".join(f"  {line}" for line in lines)
    return f'{head}, "entries": [\n{body}\n]}}\n'


def read(path: Path) -> list[Entry]:
    """The entries of a file, none if it does not exist. Raises Foreign."""
    try:
        return parse(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except UnicodeDecodeError:
        raise Foreign("is damaged") from None
    except OSError as error:
        raise Foreign(f"cannot be read: {error.strerror}") from None


@functools.lru_cache(maxsize=32)
def entries(arch: str) -> tuple[Entry, ...]:
    """What is known of an architecture: the user's entries and the shipped ones; read once."""
    found = list(_remembered.get(arch, ()))
    for path in (user_file(arch), shipped_file(arch)):
        try:
            found += read(path)
        except Foreign as error:
            warnings.warn(f"the tuning table {path} {error}; it is not used", stacklevel=2)
    return tuple(found)


def remember(arch: str, found: list[Entry]) -> None:
    """Makes entries known to this process, whether or not they can be written."""
    _remembered.setdefault(arch, []).extend(found)
    entries.cache_clear()


@functools.lru_cache(maxsize=16)
def machine_of(arch: Arch, device: torch.device) -> str:
    """What tells machines of one architecture apart: a GPU's name, a CPU's vectors and cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if not arch.is_cpu:
        return ""
    from ..cpu.target import host_isa

    return f"{host_isa().name}, {arch.processors} cores"
