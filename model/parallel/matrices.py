"""Whole matrices out of their blocks on all ranks, each on one rank, and back.

Orthogonalization needs whole matrices. Matrix i is put together on rank i mod P: every rank does
its part of the work, and an element crosses the network twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import Ranks, block

Block = tuple[slice, ...]


class Assembly:
    """Where the blocks of some matrices lie. All ranks must call its methods alike."""

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks) -> None:
        self.ranks = ranks
        self.shapes = [tuple(p.shape) for p in parameters]
        mine = [[(s.start, s.stop) for s in block(p)] for p in parameters]
        self.blocks: list[list[Block]] = [
            [tuple(slice(*pair) for pair in pairs) for pairs in theirs]  # type: ignore[union-attr]
            for theirs in ranks.gather(mine)  # type: ignore[attr-defined]
        ]

    def owned(self) -> list[int]:
        """The matrices that are put together here."""
        return list(range(self.ranks.rank, len(self.shapes), self.ranks.world))

    def _of(self, rank: int) -> range:
        return range(rank, len(self.shapes), self.ranks.world)

    def _size(self, rank: int, i: int) -> int:
        rows, columns = self.blocks[rank][i]
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def _counts(self) -> tuple[list[int], list[int]]:
        """Elements of this rank's blocks by owner, and of owned matrices by the rank with them."""
        me, everyone = self.ranks.rank, range(self.ranks.world)
        away = [sum(self._size(me, i) for i in self._of(owner)) for owner in everyone]
        home = [sum(self._size(rank, i) for i in self._of(me)) for rank in everyone]
        return away, home

    def gather(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """This rank's block of every matrix in; whole matrices out, those of `owned`."""
        away, home = self._counts()
        order = [i for owner in range(self.ranks.world) for i in self._of(owner)]
        flat = torch.cat([blocks[i].flatten() for i in order])
        arrived = flat.new_empty(sum(home))
        dist.all_to_all_single(arrived, flat, home, away)
        whole = {i: flat.new_empty(self.shapes[i]) for i in self.owned()}
        at = 0
        for rank in range(self.ranks.world):
            for i in self.owned():
                size, goal = self._size(rank, i), whole[i][self.blocks[rank][i]]
                goal.copy_(arrived[at : at + size].view(goal.shape))
                at += size
        return list(whole.values())

    def scatter(self, whole: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """The way back: whole matrices of `owned` in, this rank's block of every matrix out."""
        away, home = self._counts()
        owned = dict(zip(self.owned(), whole, strict=True))
        parts = [
            owned[i][self.blocks[rank][i]].flatten()
            for rank in range(self.ranks.world)
            for i in self.owned()
        ]
        flat = torch.cat(parts) if parts else like.new_empty(0)
        arrived = flat.new_empty(sum(away))
        dist.all_to_all_single(arrived, flat, away, home)
        found: dict[int, Tensor] = {}
        at = 0
        for owner in range(self.ranks.world):
            for i in self._of(owner):
                rows, columns = self.blocks[self.ranks.rank][i]
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                size = shape[0] * shape[1]
                found[i] = arrived[at : at + size].view(shape)
                at += size
        return [found[i] for i in range(len(self.shapes))]
