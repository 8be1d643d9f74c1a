"""Ragged batches: sequences of different lengths laid end to end, and back to a rectangle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


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
        # where a cached property looks first
        vars(fixed).update(buffers)
        return fixed

    @cached_property
    def turns(self) -> tuple[Tensor, Tensor] | None:
        """Rotary cos and sin of the tokens, [N, 1, D/2] each, where they are at hand."""
        return None

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where each sequence starts in the pack, and the end of the last, int32 [B + 1]."""
        return torch.tensor((0, *accumulate(self.lengths)), dtype=torch.int32, device=self.device)

    @cached_property
    def held(self) -> Tensor:
        """`ends` on the device, int32 [B]."""
        return torch.tensor(self.ends, dtype=torch.int32, device=self.device)

    @cached_property
    def rows(self) -> Tensor:
        """Sequence index of each packed token, int64 [N]."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.arange(len(self.lengths), device=self.device).repeat_interleave(
            lengths, output_size=self.total
        )

    @cached_property
    def columns(self) -> Tensor:
        """Index of each packed token within its sequence in this pack, int64 [N]."""
        firsts = torch.tensor((0, *self.lengths), device=self.device).cumsum(0)[:-1]
        return torch.arange(self.total, device=self.device) - firsts[self.rows]

    @cached_property
    def positions(self) -> Tensor:
        """Absolute position of each packed token in its sequence, int64 [N]."""
        return self.columns + torch.tensor(self.starts, device=self.device)[self.rows]

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    @cached_property
    def last(self) -> Tensor:
        """Packed index of the last token of each sequence, int64 [B]; needs no empty sequence."""
        return torch.tensor(self.lengths, device=self.device).cumsum(0) - 1

    def pad(self, x: Tensor) -> Tensor:
        """[N, ...] -> [B, longest, ...], zeros after the end of each sequence."""
        shape = (len(self.lengths), self.longest, *x.shape[1:])
        if self.uniform:
            return x.view(shape)
        return x.new_zeros(shape).index_put((self.rows, self.columns), x)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, longest, ...] -> [N, ...]: the inverse of `pad`."""
        if self.uniform:
            return x.reshape(self.total, *x.shape[2:])
        return x[self.rows, self.columns]
