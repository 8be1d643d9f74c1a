"""How many tokens to draft per step: what pays, judged by acceptance and by measured times.

A step with n drafts makes 1 + a1 + a1 a2 + ... tokens, where ai is how often draft i stands once
those before it did (Leviathan et al., arXiv 2211.17192). Drafts never change the text, so the
choice may depend on the clock.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SKIPPED = 2
"""Steps of a shape that come first and say nothing: kernels are compiled, the step recorded."""
TIMED = 5
"""Steps that make a time known."""
REMEMBERED = 0.99
"""Weight of the past per step: acceptance is that of the last hundred steps or so."""
PRIOR = 4.0
"""Drafts that the guess about one counts for."""
ENOUGH = 32
"""First drafts to see before they are judged."""
AGAIN, BURST = 128, 4
"""So often, and for so many steps, one draft more or less is tried again."""


class Drafting:
    """Chooses the number of drafts of each step, at most `most`; always `most` unless adaptive."""

    def __init__(self, most: int, *, adaptive: bool) -> None:
        self.most, self.adaptive = most, adaptive
        self._stood, self._tried = [0.0] * most, [0.0] * most
        self._times: dict[tuple[int, int], deque[float]] = {}
        self._runs: dict[tuple[int, int], int] = {}
        self._steps = 0

    def choose(self, rows: int) -> int:
        """Drafts for a step of so many sequences."""
        if not self.adaptive or not self.most:
            return self.most
        for count in (0, 1):
            if not self._known(rows, count):
                return count
        if self._tried[0] < ENOUGH:
            return 1
        best = max(range(self.most + 1), key=lambda n: self._rate(rows, n))
        if not self._known(rows, best):
            return best
        self._steps += 1
        if self._steps % AGAIN >= BURST:
            return best
        # neighbours in turn: what was measured in a busy moment must not stand for ever
        near = best + (1 if self._steps // AGAIN % 2 else -1)
        return near if 0 <= near <= self.most else abs(best - 1)

    def record(self, rows: int, count: int, seconds: float, stood: list[int]) -> None:
        """Tell what a step took and how many drafts of each of its sequences stood."""
        key = rows, count
        self._runs[key] = self._runs.get(key, 0) + 1
        if self._runs[key] > SKIPPED:
            self._times.setdefault(key, deque(maxlen=TIMED)).append(seconds)
        for i in range(count):
            reached = sum(n >= i for n in stood)
            if reached:
                self._tried[i] = REMEMBERED * self._tried[i] + reached
                self._stood[i] = REMEMBERED * self._stood[i] + sum(n > i for n in stood)

    def tokens(self, count: int) -> float:
        """Tokens that a step with so many drafts is expected to make per sequence."""
        total = product = 1.0
        chance = 0.5
        for stood, tried in list(zip(self._stood, self._tried, strict=True))[:count]:
            # a draft of which little is known stands as often as the one before it
            chance = (stood + PRIOR * chance) / (tried + PRIOR)
            product *= chance
            total += product
        return total

    def seconds(self, rows: int, count: int) -> float:
        """Time of a step: measured, or on the line through its two nearest neighbours below."""
        if self._known(rows, count):
            return median(self._times[rows, count])
        one, two = self.seconds(rows, count - 1), self.seconds(rows, count - 2)
        return one + max(one - two, 0.0)

    def _known(self, rows: int, count: int) -> bool:
        return len(self._times.get((rows, count), ())) >= TIMED

    def _rate(self, rows: int, count: int) -> float:
        return self.tokens(count) / self.seconds(rows, count)
