"""Grouping slots by expert: a stable counting sort on the device.

A slot is one choice of one token: token t's k-th choice is slot t K + k. Slots are ordered by
expert, and within an expert as they were.

Method: three launches, all parallel and free of atomics: a histogram per block of slots, a scan
over the blocks per expert, and ranks inside each block, by comparing all pairs or by counting. Up
to one block of slots, a single launch does it.

Shape letters: T tokens, K experts per token, S = T K slots, E experts, B blocks of slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require
from .tables import pick


@dataclass(frozen=True)
class Config:
    """`block` slots per program, compared `piece` at a time (0: counted one by one, for
    processors that run a program on one thread); `chunk` blocks per step of the scan."""

    block: int
    piece: int
    chunk: int
    num_warps: int


def configs(slots: int, arch: Arch) -> list[Config]:
    """Candidates for sorting `slots` slots, the default first."""
    if arch.is_cpu:
        return [Config(block, 0, 64, 4) for block in (1024, 4096, 256)]
    return [Config(block, 32, 64, warps) for block in (128, 256, 512) for warps in (4, 8)]


@dataclass(frozen=True)
class Permutation:
    """Which slot goes where when slots are grouped by expert. All int32, on the device of the ids.

    `offsets` [E + 1]: expert e's rows are offsets[e] to offsets[e + 1] of the grouped rows.
    `order` [T K]: the slot t K + k that each grouped row comes from; its token is order // K.
    `position` [T K]: the grouped row of each slot; the inverse of `order`.
    """

    offsets: Tensor
    order: Tensor
    position: Tensor


def group_by_expert_reference(ids_TK: Tensor, *, experts: int) -> Permutation:
    """A stable sort of the flattened ids."""
    chosen = ids_TK.flatten().long()
    order = chosen.argsort(stable=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))
    counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Permutation(offsets.int(), order.int(), position.int())


@jit(do_not_specialize=["S"])
def _count_kernel(ids_S, counts_BE, S, E, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    live = slot < S
    ids = tl.load(ids_S + slot, mask=live, other=0).to(tl.int32)
    expert = tl.arange(0, BINS)
    tl.store(counts_BE + block * E + expert, tl.histogram(ids, BINS, mask=live), mask=expert < E)


@jit(do_not_specialize=["B"])
def _scan_kernel(counts_BE, totals_E, B, E, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Counts of a block become the counts of all blocks before it."""
    expert = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.int32)
    for start in range(0, B, CHUNK):
        block = start + tl.arange(0, CHUNK)
        at = block[:, None].to(tl.int64) * E + expert[None, :]
        mask = (block[:, None] < B) & (expert[None, :] < E)
        counts = tl.load(counts_BE + at, mask=mask, other=0)
        before = tl.cumsum(counts, 0) - counts + total[None, :]
        tl.store(counts_BE + at, before, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(totals_E + expert, total, mask=expert < E)


@jit(do_not_specialize=["S"])
def _place_kernel(
    ids_S, before_BE, totals_E, offsets_E1, order_S, position_S, S, E,
    SINGLE: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    live = slot < S
    ids = tl.load(ids_S + slot, mask=live, other=0).to(tl.int32)
    expert = tl.arange(0, BINS)
    if SINGLE:
        totals = tl.histogram(ids, BINS, mask=live)
        ends = tl.cumsum(totals, 0)
        start = ends - totals
    else:
        totals = tl.load(totals_E + expert, mask=expert < E, other=0)
        ends = tl.cumsum(totals, 0)
        before = tl.load(before_BE + block * E + expert, mask=expert < E, other=0)
        start = ends - totals + before
    if block == 0:
        tl.store(offsets_E1, 0)
        tl.store(offsets_E1 + 1 + expert, ends, mask=expert < E)
    if PIECE == 0:
        before_BE += block * E
        tl.store(before_BE + expert, start, mask=expert < E)
        for at in range(block * BLOCK, tl.minimum(S, (block + 1) * BLOCK)):
            counter = before_BE + tl.load(ids_S + at)
            row = tl.load(counter)
            tl.store(counter, row + 1)
            tl.store(position_S + at, row)
            tl.store(order_S + row, at.to(tl.int32))
    else:
        mine = tl.arange(0, BLOCK)
        rank = tl.gather(start, ids, 0)
        for first in range(0, BLOCK, PIECE):
            other = first + tl.arange(0, PIECE)
            at = block * BLOCK + other
            theirs = tl.load(ids_S + at, mask=at < S, other=-1).to(tl.int32)
            earlier = (ids[:, None] == theirs[None, :]) & (other[None, :] < mine[:, None])
            rank += tl.sum(earlier.to(tl.int32), 1)
        tl.store(position_S + slot, rank, mask=live)
        tl.store(order_S + rank, slot.to(tl.int32), mask=live)


def _group(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = ids.numel()
    require(experts > 0, f"experts must be positive, got {experts}")
    require(slots < 2**31, f"at most 2^31 - 1 slots, got {slots}")
    ids = ids.reshape(-1).contiguous()
    config = pick("group_by_expert", configs, slots, ids.device)
    bins, blocks = max(16, triton.next_power_of_2(experts)), cdiv(slots, config.block)
    single = blocks <= 1
    before = empty(max(1, blocks), experts, like=ids, dtype=torch.int32)
    totals, offsets, order, position = (
        empty(n, like=ids, dtype=torch.int32)
        for n in (0 if single else experts, experts + 1, slots, slots)
    )
    with on(ids):
        if not single:
            _count_kernel[(blocks,)](ids, before, slots, experts, BLOCK=config.block, BINS=bins,
                                     num_warps=config.num_warps)  # fmt: skip
            _scan_kernel[(cdiv(experts, 16),)](
                before, totals, blocks, experts, CHUNK=config.chunk, TILE=16,
                num_warps=config.num_warps,
            )  # fmt: skip
        _place_kernel[(max(1, blocks),)](
            ids, before, totals, offsets, order, position, slots, experts, SINGLE=single,
            BLOCK=config.block, PIECE=config.piece, BINS=bins, num_warps=config.num_warps,
        )  # fmt: skip
    return offsets, order, position


def _int32(ids: Tensor, count: int) -> Tensor:
    return ids.new_empty(count, dtype=torch.int32)


_group_op = register(
    "group_by_expert(Tensor ids, int experts) -> (Tensor, Tensor, Tensor)",
    _group,
    fake=lambda ids, experts: (
        _int32(ids, experts + 1), _int32(ids, ids.numel()), _int32(ids, ids.numel())
    ),
)  # fmt: skip


def group_by_expert(ids_TK: Tensor, *, experts: int) -> Permutation:
    """The stable order of slots by expert, without waiting for the device.

    Args:
        ids_TK: [T, K] int64 or int32, each in 0..experts - 1; any strides.
        experts: E, how many groups; a group may be empty.

    Raises:
        ValueError: experts is not positive, or there are 2^31 slots or more.
    """
    if choose(ids_TK) == "reference":
        return group_by_expert_reference(ids_TK, experts=experts)
    return Permutation(*_group_op(ids_TK, experts))
