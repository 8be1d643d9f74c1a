"""Timing that holds on a noisy machine: alternating runs, medians, and the machine's own limits."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Median and quartiles in milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        quarters = statistics.quantiles(milliseconds, n=4)
        return cls(statistics.median(milliseconds), quarters[0], quarters[2])


def alternate(runs: Mapping[str, Run], *, seconds: float, rounds: int = 7) -> dict[str, Timing]:
    """Time several ways to do one thing, all of them in every round.

    Whatever else the machine does then meets all of them. The order is drawn anew each round: what
    ran before leaves its caches behind. Runs until `seconds` have passed, but at least `rounds`
    rounds; the first one, which compiles, does not count.
    """
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    order, draw = list(runs.items()), random.Random(0)
    begin = time.perf_counter()
    while len(next(iter(spent.values()))) < rounds or time.perf_counter() - begin < seconds:
        draw.shuffle(order)
        for name, run in order:
            spent[name].append(_once(run))
    return {name: Timing.of(times) for name, times in spent.items()}


def _once(run: Run) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def copy_run(bytes_moved: int, device: torch.device) -> Run:
    """A copy that reads and writes `bytes_moved` bytes in all: the limit of memory traffic."""
    source = torch.ones(max(1, bytes_moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matmul_rate(dtype: torch.dtype, device: torch.device, *, size: int = 2048) -> float:
    """FLOP/s of the library's square matrix product: the limit of arithmetic."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    out = torch.empty_like(a)
    timing = alternate({"mm": lambda: torch.mm(a, b, out=out)}, seconds=0.5)["mm"]
    return 2 * size**3 / timing.median * 1e3
