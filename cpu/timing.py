"""Events of the shape that Triton's benchmarker asks of a device."""

from __future__ import annotations

import time


def synchronize() -> None:
    """Launches are synchronous."""


class Event:
    """A point in time. Times are in milliseconds."""

    def __init__(self, enable_timing: bool = True) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Already past."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds to `end`; never 0, which the benchmarker would divide by."""
        return max((end._seconds - self._seconds) * 1e3, 1e-6)
