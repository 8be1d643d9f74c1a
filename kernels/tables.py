"""Which configuration a kernel runs with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .arch import Arch, arch_of

Configs = Callable[[Any, Arch], list[Any]]

# a scope's override by op; only `use` writes it, and takes back what it wrote
_forced: dict[str, Any] = {}


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


def pick(op: str, configs: Configs, problem: Hashable, device: torch.device) -> Any:
    """The configuration of `op` for a problem: forced by `use`, or the first candidate."""
    forced = _forced.get(op)
    return forced if forced is not None else _first(configs, problem, arch_of(device))


@functools.lru_cache(maxsize=4096)
def _first(configs: Configs, problem: Hashable, arch: Arch) -> Any:
    return configs(problem, arch)[0]
