"""Which implementation of an op runs, and why.

`reference` is plain PyTorch, one line of maths per line of code. `aten` is the fastest way to say
the same with PyTorch's own operators, where an op has one. `triton` is the fused kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import Arch
from .tables import Decision, decision_of, pick

IMPLEMENTATIONS = ("reference", "aten", "triton")
LAUNCH_BOUND = 2**20
"""Multiplications that a processor does in about the time of two kernel launches."""


class _Scope:
    """The override in force. One attribute read, so that torch.compile can guard on it."""

    override: str | None = None


_scope = _Scope()


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason it was taken."""

    name: str
    reason: str


@dataclass(frozen=True)
class Implementation:
    """What the tuner chooses from where an op names itself to `choose`."""

    name: str


def implementations(problem: tuple[int, ...], arch: Arch) -> list[Implementation]:
    """Candidates for inputs of so many elements (a power of two), the default first."""
    return [Implementation("triton"), Implementation("reference")]


@contextmanager
def impl(name: str) -> Iterator[None]:
    """In this scope every op that has implementation `name` uses it.

    An op without it takes the next plainer one. The scope holds for the whole process, as the flags
    of `torch.backends` do: torch.compile can guard on it and recompiles when it changes.

    Raises:
        ValueError: `name` is none of `reference`, `aten`, `triton`.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl takes one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    former, _scope.override = _scope.override, name
    try:
        yield
    finally:
        _scope.override = former


@functools.lru_cache(maxsize=1)
def _triton_missing() -> str:
    """Why Triton kernels cannot run on CPU tensors here; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not any(shutil.which(c) for c in ("g++", "clang++")):
        return "no C++ compiler is installed"
    return ""


_MISSING = _triton_missing()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64)


def choose(x: Tensor, *, aten: bool = False, work: int | None = None, op: str | None = None) -> str:
    """The implementation for an op on `x`; `aten` says whether the op has one of that name.

    `x` is the op's first floating-point tensor, or its integers where it has no other. `work` is
    its multiplications, for an op that runs in plain PyTorch where they are few (see `explain`).
    `op` is its name, for one whose implementation the tuning tables choose.
    """
    override = _scope.override
    if override is not None and override != "triton":
        return "aten" if override == "aten" and aten else "reference"
    if _obstacle(x) or (override is None and _small(x, work)):
        return "reference"
    return "triton" if override is not None or op is None else _tuned(op, x)


def _tuned(op: str, x: Tensor) -> str:
    """What the tables say; a compiled graph takes the kernels, as for `_small`."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return "triton"
    return pick(*_question(op, x)).name


def _question(op: str, x: Tensor) -> tuple:
    size = 1 << max(0, x.numel() - 1).bit_length()
    return f"{op} implementation", implementations, (size,), x


def explain(
    x: Tensor, *, aten: bool = False, work: int | None = None, op: str | None = None
) -> Choice:
    """`choose` with its reason."""
    asked = "asked for by kexaone.impl"
    name = choose(x, aten=aten, work=work, op=op)
    if op is not None and _scope.override is None and not _obstacle(x):
        decision: Decision = decision_of(*_question(op, x))
        if decision.entry is not None:
            return Choice(name, decision.reason)
    if name != "triton" and _scope.override not in (None, "triton"):
        return Choice(name, asked)
    default = "the default for its dtype and device"
    obstacle = _obstacle(x)
    if name != "triton" and not obstacle:
        return Choice(
            name, f"{work} multiplications on a CPU are less than launching kernels costs"
        )
    return Choice(name, obstacle or (asked if _scope.override else default))


def _small(x: Tensor, work: int | None) -> bool:
    """Whether launching kernels would cost more than plain PyTorch.

    A compiled graph takes the kernels for every size: a choice by size would compile it twice.
    """
    if work is None or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return work <= LAUNCH_BOUND


def _obstacle(x: Tensor) -> str:
    """Why no kernel can run on `x`; empty where one can."""
    if x.dtype not in _DTYPES:
        return f"kernels take float32, bfloat16 and float16, not {x.dtype}"
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"no kernels for device {x.device.type}"
    return _MISSING if x.device.type == "cpu" else ""
