"""Writing tuning tables: many processes at once, and nothing that was there is lost.

A table is replaced as a whole, under a lock on the file next to it: a process that is killed leaves
the old table or the new one. What is not a table of this format is moved aside under a free name,
never overwritten.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import atomic_write
from ..kernels import tables
from ..kernels.table_files import Entry, Foreign, read, remember, render, user_file, within

LOCK_SECONDS = 60.0


def merge(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """`new` on top of `old`: one entry per question and release of Triton.

    A winner that is found again under another release keeps its entry, whose range grows; one that
    differs stands beside it. The result does not depend on the order of `old`.
    """
    known: dict[str, list[Entry]] = {}
    for entry in sorted(old, key=lambda e: (e.key, e.triton)):
        known.setdefault(entry.key, []).append(entry)
    for entry in new:
        same = known.setdefault(entry.key, [])
        same[:] = _added(same, entry)
    return [entry for same in known.values() for entry in same]


def _added(same: list[Entry], new: Entry) -> list[Entry]:
    """The entries of one question with one more, which decides for the releases it was found under.

    A former winner with a range around them keeps the end that it was found under and `new` not.
    """
    rest = [e for e in same if not _overlap(e, new)]
    for entry in same:
        if _overlap(entry, new) and entry.config == new.config:
            new = _wider(new, entry)
        elif _overlap(entry, new):
            ends = [end for end in dict.fromkeys(entry.triton) if not within(end, new.triton)]
            rest += [replace(entry, triton=(end, end)) for end in ends]
    for entry in rest:
        others = [e for e in rest if e is not entry]
        if entry.config == new.config and not any(_overlap(e, _wider(new, entry)) for e in others):
            return [*others, _wider(new, entry)]
    return [*rest, new]


def _wider(entry: Entry, other: Entry) -> Entry:
    """`entry` with a range that holds both ranges."""
    versions = sorted((*entry.triton, *other.triton), key=_order)
    return replace(entry, triton=(versions[0], versions[-1]))


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _overlap(a: Entry, b: Entry) -> bool:
    return within(a.triton[0], b.triton) or within(b.triton[0], a.triton)


def save(arch: str, found: list[Entry], path: Path | None = None) -> str:
    """Adds entries to a table, the user's by default; why that failed, or nothing.

    In this process they hold in any case.
    """
    if path is None:
        remember(arch, found)
    goal = path or user_file(arch)
    try:
        with locked(goal):
            atomic_write(goal, render(arch, merge(_present(goal), found)))
    except Timeout:
        return f"{goal} was not written: another process has held its lock for {LOCK_SECONDS:.0f} s"
    except OSError as error:
        return f"{goal} was not written: {error.strerror or error}"
    finally:
        tables.reload()
    return ""


@contextmanager
def locked(path: Path, *, seconds: float = LOCK_SECONDS, suffix: str = ".lock") -> Iterator[None]:
    """Holds the lock beside a file, alone among processes. Raises Timeout or OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}{suffix}", timeout=seconds):
        yield


def _present(path: Path) -> list[Entry]:
    """The entries of a file; one that is no such table is moved aside first."""
    try:
        return read(path)
    except Foreign as error:
        number = 1
        while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
            number += 1
        path.rename(aside)
        warnings.warn(f"the tuning table {path} {error}; it is now {aside.name}", stacklevel=2)
        return []
