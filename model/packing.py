"""Ragged batches: sequences of different lengths laid end to end, and back to a rectangle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class once(Generic[T]):
    """`functools.cached_property` without its lock, which torch.compile cannot enter."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, holder: Any, owner: type) -> T:
        if holder is None:
            return self  # pyright: ignore[reportReturnType]
        found = self.compute(holder)
        # where Python looks before it comes here again; the holder may be frozen
        object.__setattr__(holder, self.name, found)
        return found


@dataclass(frozen=True)
class Packing:
    """Where each of N packed tokens belongs.

    `lengths[b]` is the number of tokens of sequence `b` in this pack (zero is allowed),
    `starts[b]` the position of the first of them: the number of tokens already in the cache.
    Lengths live on the host, so slicing by them never waits for the device.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    device: torch.device

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.starts):
            raise ValueError(f"got {len(self.lengths)} lengths but {len(self.starts)} starts")
        if min((*self.lengths, *self.starts), default=0) < 0:
            raise ValueError(f"lengths and starts must be >= 0: {self.lengths}, {self.starts}")

    @classmethod
    def of(
        cls, lengths: list[int] | tuple[int, ...], *, starts: list[int] | None, device: torch.device
    ) -> Packing:
        return cls(tuple(lengths), tuple(starts or [0] * len(lengths)), device)

    @classmethod
    def rectangle(cls, batch: int, length: int, *, device: torch.device) -> Packing:
        """`batch` sequences of `length` tokens, all of them new."""
        return Rectangle(batch, length, device)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def ends(self) -> tuple[int, ...]:
        """Position after the last token of each sequence."""
        return tuple(s + n for s, n in zip(self.starts, self.lengths, strict=True))

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @classmethod
    def fixed(
        cls, lengths: tuple[int, ...], *, capacity: int, device: torch.device, **buffers: Any
    ) -> Packing:
        """One whose tensors are buffers, to be filled anew for any pack of as many tokens.

        Its sequences may reach `capacity` positions, and stand on the host as if they had.
        """
        fixed = cls(lengths, tuple(capacity - n for n in lengths), device)
        # where `once` puts what it computed
        vars(fixed).update(buffers)
        return fixed

    @once
    def turns(self) -> tuple[Tensor, Tensor] | None:
        """Rotary cos and sin of the tokens, [N, 1, D/2] each, where they are at hand."""
        return None

    @once
    def cu_seqlens(self) -> Tensor:
        """Where each sequence starts in the pack, and the end of the last, int32 [B + 1]."""
        return torch.tensor((0, *accumulate(self.lengths)), dtype=torch.int32, device=self.device)

    @once
    def held(self) -> Tensor:
        """`ends` on the device, int32 [B]."""
        return torch.tensor(self.ends, dtype=torch.int32, device=self.device)

    @once
    def rows(self) -> Tensor:
        """Sequence index of each packed token, int64 [N]."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.arange(len(self.lengths), device=self.device).repeat_interleave(
            lengths, output_size=self.total
        )

    @once
    def columns(self) -> Tensor:
        """Index of each packed token within its sequence in this pack, int64 [N]."""
        firsts = torch.tensor((0, *self.lengths), device=self.device).cumsum(0)[:-1]
        return torch.arange(self.total, device=self.device) - firsts[self.rows]

    @once
    def positions(self) -> Tensor:
        """Absolute position of each packed token in its sequence, int64 [N]."""
        return self.columns + torch.tensor(self.starts, device=self.device)[self.rows]

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    @once
    def last(self) -> Tensor:
        """Packed index of the last token of each sequence, int64 [B]; needs no empty sequence."""
        return torch.tensor(self.lengths, device=self.device).cumsum(0) - 1

    def pad(self, x: Tensor) -> Tensor:
        """[N, ...] -> [B, longest, ...], zeros after the end of each sequence."""
        shape = (self.batch, self.longest, *x.shape[1:])
        if self.uniform:
            return x.view(shape)
        return x.new_zeros(shape).index_put((self.rows, self.columns), x)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, longest, ...] -> [N, ...]: the inverse of `pad`."""
        if self.uniform:
            return x.reshape(self.total, *x.shape[2:])
        return x[self.rows, self.columns]


class Rectangle(Packing):
    """Sequences of one length that start at position 0: one graph of torch.compile for all sizes.

    Everything is computed from two numbers, which may be symbolic; `lengths` and `starts`, which a
    graph would be compiled anew for, exist only where they are asked for.
    """

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        for name, found in (("sizes", (batch, length)), ("device", device)):
            object.__setattr__(self, name, found)

    sizes: tuple[int, int]

    @property
    def batch(self) -> int:
        return self.sizes[0]

    @property
    def longest(self) -> int:
        return self.sizes[1]

    @property
    def total(self) -> int:
        return self.batch * self.longest

    @property
    def uniform(self) -> bool:
        return True

    @property
    def lengths(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.longest,) * self.batch

    @property
    def starts(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (0,) * self.batch

    @once
    def cu_seqlens(self) -> Tensor:
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
        return starts * self.longest

    @once
    def held(self) -> Tensor:
        return self.last.new_full((self.batch,), self.longest, dtype=torch.int32)

    @once
    def rows(self) -> Tensor:
        sequences = torch.arange(self.batch, device=self.device)
        return sequences[:, None].expand(self.sizes).reshape(-1)

    @once
    def columns(self) -> Tensor:
        return torch.arange(self.longest, device=self.device).repeat(self.batch)

    @once
    def positions(self) -> Tensor:
        return self.columns

    @once
    def last(self) -> Tensor:
        return (torch.arange(self.batch, device=self.device) + 1) * self.longest - 1
