"""What the machine code of a kernel says, in the same terms for every vendor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """One memory instruction: `kind` is load, store, async, bulk or atomic.

    `bytes` are those of one thread; of a bulk copy (TMA), which one thread starts, 0.
    `where` is the innermost source position (file name, line).
    """

    kind: str
    bytes: int
    where: tuple[str, int]


@dataclass(frozen=True)
class Loop:
    """Instructions `first` to `last` are repeated (indices in program order)."""

    first: int
    last: int


@dataclass(frozen=True)
class Product:
    """A matrix instruction at index `at`; `flops` that one warp's execution of it does.

    None where the mnemonic does not tell: a size in a descriptor.
    """

    at: int
    flops: float | None


@dataclass(frozen=True)
class MachineCode:
    """One kernel. `spilled` are bytes per thread written to and read from local memory."""

    registers: int
    stack: int
    spilled: int
    instructions: int
    mma: Counter[str] = field(default_factory=Counter)
    accesses: tuple[Access, ...] = ()
    products: tuple[Product, ...] = ()
    loops: tuple[Loop, ...] = ()
    shared: int = 0
    warps: int = 0

    def count(self, kind: str, size: int | None = None) -> int:
        """Memory instructions of a kind, of all widths or of one."""
        return sum(a.kind == kind and size in (None, a.bytes) for a in self.accesses)

    def widths(self, kind: str) -> dict[int, int]:
        """Number of instructions by bytes per thread."""
        return dict(sorted(Counter(a.bytes for a in self.accesses if a.kind == kind).items()))


def loops_of(jumps: Sequence[tuple[int, int]]) -> tuple[Loop, ...]:
    """Loops from jumps (from, to): each that goes back, except one onto itself (the end trap)."""
    found: dict[int, int] = {}
    for start, target in jumps:
        if target < start:
            found[target] = max(found.get(target, 0), start)
    return tuple(Loop(first, last) for first, last in sorted(found.items()))
