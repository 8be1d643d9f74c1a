"""Which configuration a kernel runs with, and why."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from . import table_files
from .arch import Arch, arch_of
from .sources import hash_of_name
from .table_files import PROVENANCES, Entry, distance, machine_of, plain, release, within

Configs = Callable[[Any, Arch], list[Any]]
REACH = 2.0
"""How far a tuned problem may be to lend its configuration: a factor of four in all its sizes."""

_MOST_DECIDED = 4096
# decisions by what `pick` was asked; `reload` empties it
_decided: dict[tuple[Hashable, ...], Any] = {}
# a scope's override by op; only `use` writes it, and takes back what it wrote
_forced: dict[str, Any] = {}
# the lists of the `recording` scopes that are open
_recorders: list[list[Decision]] = []


@dataclass(frozen=True)
class Decision:
    """The configuration that a kernel's launcher was given, and the reason."""

    op: str
    problem: Hashable
    dtype: str
    arch: Arch
    machine: str
    config: Any
    reason: str
    configs: Configs = field(repr=False)
    entry: Entry | None = field(default=None, repr=False)


@contextmanager
def use(op: str, config: Any) -> Iterator[None]:
    """In this scope, kernel `op` runs with `config`; None: with its own choice.

    Holds for the whole process.
    """
    former, _forced[op] = _forced.get(op), config
    try:
        yield
    finally:
        _forced[op] = former


@contextmanager
def recording() -> Iterator[list[Decision]]:
    """Lists what `pick` decides in this scope, in order. Holds for the whole process."""
    found: list[Decision] = []
    _recorders.append(found)
    try:
        yield found
    finally:
        # by identity: two open scopes may hold equal lists
        _recorders[:] = [r for r in _recorders if r is not found]


def pick(op: str, configs: Configs, problem: Hashable, at: Tensor | torch.device) -> Any:
    """The configuration of `op` for a problem: forced by `use`, tuned, or the first candidate.

    `at` is a tensor where the dtype matters and the problem does not name it, else a device.
    """
    forced = _forced.get(op)
    if forced is not None and not _recorders:
        return forced
    device, dtype = (at.device, at.dtype) if isinstance(at, Tensor) else (at, None)
    # what meta tensors stand for depends on the scope
    key = None if _recorders or device.type == "meta" else (op, configs, problem, dtype, device)
    if key in _decided:
        return _decided[key]
    found = decision_of(op, configs, problem, at)
    for recorder in _recorders:
        recorder.append(found)
    if key is not None and len(_decided) < _MOST_DECIDED:
        _decided[key] = found.config
    return found.config


def decision_of(
    op: str, configs: Configs, problem: Hashable, at: Tensor | torch.device
) -> Decision:
    """`pick` with its reason."""
    forced = _forced.get(op)
    device, dtype = (at.device, _name(at.dtype)) if isinstance(at, Tensor) else (at, "")
    arch = arch_of(device)
    found = decide(op, configs, problem, dtype, arch, machine_of(arch, device))
    if forced is not None:
        return Decision(op, problem, dtype, arch, found.machine, forced, "forced here", configs)
    return found


@functools.lru_cache(maxsize=64)
def _name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


@functools.lru_cache(maxsize=4096)
def decide(
    op: str, configs: Configs, problem: Hashable, dtype: str, arch: Arch, machine: str
) -> Decision:
    """What `pick` decides without an override.

    The nearest tuned problem decides; of equally near ones the one tuned for this Triton, then the
    more trusted, then the one of this machine, then the first by name. So equal tables give equal
    configurations, in every process.
    """
    candidates = configs(problem, arch)
    asked = plain(problem)
    by_values = {tuple(plain(c).items()): c for c in reversed(candidates)}
    best: tuple[tuple[Any, ...], Entry, Any] | None = None
    for entry in table_files.entries(arch.name):
        if entry.op != op or entry.dtype != dtype or (arch.is_cpu and entry.machine != machine):
            continue
        away = distance(asked, entry.problem)
        names = plain(candidates[0])
        config = by_values.get(tuple((name, entry.config.get(name)) for name in names))
        # what only a model has chosen speaks for its own problem
        reach = 0.0 if entry.provenance == "static" else REACH
        if away > reach or config is None or not current(entry):
            continue
        rank = (away, not within(triton_release(), entry.triton),
                PROVENANCES.index(entry.provenance), entry.machine != machine,
                entry.key)  # fmt: skip
        if best is None or rank < best[0]:
            best = rank, entry, config
    if best is None:
        reason = "the first candidate: nothing near it is tuned"
        return Decision(op, problem, dtype, arch, machine, candidates[0], reason, configs)
    return Decision(op, problem, dtype, arch, machine, best[2], _reason(best[1], best[0][0]),
                    configs, best[1])  # fmt: skip


def current(entry: Entry) -> bool:
    """Whether the kernels that an entry is about are still the same."""
    return all(hash_of_name(name) == known for name, known in entry.kernels.items())


def reload() -> None:
    """Forget what was read from tables: the next decision reads them again."""
    table_files.entries.cache_clear()
    decide.cache_clear()
    _decided.clear()


@functools.lru_cache(maxsize=1)
def triton_release() -> str:
    """Major and minor number of the Triton that compiles kernels."""
    try:
        return release(version("triton"))
    except PackageNotFoundError:
        return "0.0"


def _reason(entry: Entry, away: float) -> str:
    where = f" on {entry.machine}" if entry.machine else ""
    text = f"{entry.provenance}{where}"
    if away:
        sizes = ", ".join(f"{n}={v}" if not n.isdigit() else f"{v}"
                          for n, v in entry.problem.items())  # fmt: skip
        text += f" for ({sizes}), {math.exp2(away):.1f} times away"
    chosen, default = (entry.figures.get(name) for name in ("chosen_us", "default_us"))
    if chosen and default:
        text += f": {default / chosen:.2f} times as fast as the first candidate"
    if not within(triton_release(), entry.triton):
        text += f"; tuned under Triton {entry.triton[1]}"
    return text
