"""Names of things in emitted code: indices, expressions, scratch buffers."""

from __future__ import annotations

from dataclasses import dataclass

from .ir import Type


@dataclass(frozen=True)
class Buffer:
    """A tile in the scratch memory of a program, row-major; `transposed`: in its last two dims."""

    name: str
    elem: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def strides(self) -> tuple[int, ...]:
        steps, step = [], 1
        for size in reversed(self.shape):
            steps.append(step)
            step *= size
        steps.reverse()
        if self.transposed:
            steps[-2:] = 1, self.shape[-2]
        return tuple(steps)


@dataclass(frozen=True)
class Ix:
    """Index along one dimension: C++ text, whether it runs over the lanes, its loop level."""

    code: str
    lane: bool = False
    level: int = 0


ZERO = Ix("0")
Index = tuple[Ix, ...]


@dataclass(frozen=True)
class Expr:
    """A named value at a loop level, a vector of `lanes` or a scalar."""

    code: str
    type: Type
    vector: bool
    level: int
