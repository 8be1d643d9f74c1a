"""What can be measured: one entry per op, at the shapes of a preset.

An entry builds its inputs once and says what our op does with them, what its peers do, and how many
bytes and operations the task needs at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.config import Config

Function = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """Ways to compute one thing from the same inputs.

    `bytes_forward` counts each input and output element once, in its own dtype; `bytes_backward`
    the same for the gradients (what was saved and the output's gradients are read, the inputs'
    gradients written), 0 where the op has none. `flops` is for the forward pass; the backward pass
    takes twice that. `forward_only` names peers without a gradient here.
    """

    ours: Function
    peers: dict[str, Function]
    inputs: Sequence[Tensor]
    bytes_forward: int
    bytes_backward: int = 0
    flops: int = 0
    forward_only: frozenset[str] = frozenset()


Setup = Callable[[Config, int], Job]
JOBS: dict[str, Setup] = {}


def job(name: str) -> Callable[[Setup], Setup]:
    """Register a set-up function: (architecture, tokens) -> Job."""

    def add(setup: Setup) -> Setup:
        JOBS[name] = setup
        return setup

    return add


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values, the same on every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
