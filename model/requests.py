"""A request to a generation engine: a prompt, how to continue it, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .sampling import Sampling, fixed_seed, noise_key


@dataclass(eq=False)
class Request:
    """A prompt on its way through an engine.

    `finished` is None while it waits or runs, then "stop" (a stop token came; it is the last of
    `token_ids`), "length", "cancelled" or "failed" (`error` says why).
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    stream: int = 0
    on_tokens: Callable[[list[int]], None] | None = None
    token_ids: list[int] = field(default_factory=list)
    finished: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self._seed = fixed_seed(self.sampling)

    def cancel(self) -> None:
        """Let it end before the next step; without effect once it is finished."""
        if self.finished is None:
            self.finished = "cancelled"

    @property
    def remaining(self) -> int:
        return self.max_new_tokens - len(self.token_ids)

    def noise_keys(self, count: int) -> list[int]:
        """What the next `count` tokens are drawn with."""
        first = len(self.token_ids)
        return [noise_key(self._seed, self.stream, first + i) for i in range(count)]

    def append(self, tokens: list[int]) -> list[int]:
        """Take tokens up to a stop token or the limit; returns those, and notes how it ended."""
        tokens = tokens[: self.remaining]
        end = next((i for i, t in enumerate(tokens) if t in self.stop_ids), None)
        if end is not None:
            tokens = tokens[: end + 1]
        self.token_ids += tokens
        if end is not None:
            self.finished = "stop"
        elif not self.remaining:
            self.finished = "length"
        return tokens

    def fail(self, error: str) -> None:
        self.finished, self.error = "failed", error
