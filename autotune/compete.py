"""Finding the fastest of several ways to do one thing on a machine that is not quiet.

All take turns, so that whatever else the machine does meets each of them. What is compared is the
ratio of two times of the same round; its median has a confidence interval that assumes nothing
about the noise (order statistics, the sign test turned round). A way whose interval lies above the
leader's time drops out, and the contest ends when no other is left that could be better by more
than `MARGIN`, or when time is up.

Of those no more than `MARGIN` slower than the best, the first wins: the order of the candidates
decides between equals, not the noise.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MARGIN = 0.02
LEAST_ROUNDS = 6
"""With fewer pairs no interval of the median has a confidence of 95 %."""
_MOST_ROUNDS = 200
Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Verdict:
    """The winner's position, every candidate's median in seconds, and whether it is certain."""

    winner: int
    medians: tuple[float, ...]
    rounds: int
    certain: bool


def seconds_of(run: Callable[[], object]) -> float:
    """The duration of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def clock_of(device: torch.device) -> Clock:
    """What times a call whose kernels run on `device`: on a GPU, events around it."""
    return _event_seconds if device.type == "cuda" else seconds_of


def _event_seconds(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A confidence interval of the median, at least 95 %; infinite for fewer than six values."""
    ordered, n = sorted(values), len(values)
    tail, cut = 0.0, -1
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 0.05:
            break
        cut = k
    return (-math.inf, math.inf) if cut < 0 else (ordered[cut], ordered[n - 1 - cut])


def compete(
    runs: Sequence[Callable[[], object]],
    *,
    seconds: float,
    between: Callable[[], object] = lambda: None,
    clock: Clock = seconds_of,
) -> Verdict:
    """Time `runs` in turns for at most about `seconds`; `between` runs before each, untimed."""
    spent: list[list[float]] = [[] for _ in runs]
    alive, deadline = list(range(len(runs))), time.perf_counter() + seconds
    for run in runs:
        run()
    rounds, certain = 0, len(runs) == 1
    while rounds < _MOST_ROUNDS:
        # each round begins elsewhere: nobody always runs after the same one
        for position in range(len(alive)):
            index = alive[(position + rounds) % len(alive)]
            between()
            spent[index].append(clock(runs[index]))
        rounds += 1
        if rounds >= LEAST_ROUNDS:
            alive, certain = _remaining(spent, alive)
        if certain or (rounds >= LEAST_ROUNDS and time.perf_counter() > deadline):
            break
    medians = tuple(statistics.median(times) for times in spent)
    best = min(medians[i] for i in alive)
    winner = next(i for i in sorted(alive) if medians[i] <= best * (1 + MARGIN))
    return Verdict(winner, medians, rounds, certain)


def _remaining(spent: list[list[float]], alive: list[int]) -> tuple[list[int], bool]:
    """Those that may still win, and whether it no longer matters which of them does."""
    leader = min(alive, key=lambda i: statistics.median(spent[i]))
    kept, certain = [], True
    for index in alive:
        pairs = zip(spent[index], spent[leader], strict=True)
        low, high = interval([math.log(max(a, 1e-9) / max(b, 1e-9)) for a, b in pairs])
        if index == leader or low <= math.log1p(MARGIN):
            kept.append(index)
            certain &= index == leader or high - low <= 2 * MARGIN
    return kept, certain
