"""Token permutation: rows grouped by expert and back, forward and backward.

    order     the T K slots (token t's k-th choice is slot t K + k) sorted by expert, stably
    permute   rows[s] = x[order[s] // K]
    unpermute out[t] = sum over k of weights[t, k] * rows[position[t K + k]]    summed in float32

Gradients: permute's is the unweighted sum over a token's rows; unpermute's are
drows[position[t K + k]] = weights[t, k] * grad[t] and dweights[t, k] = sum over columns of
grad[t] * rows[position[t K + k]].

Method: counting sort in three launches, all parallel and free of atomics: a histogram per block of
slots, a scan over blocks per expert, and ranks inside each block by comparing all pairs. Up to one
block of slots, a single launch does it. Rows are moved by token: each program holds a piece of one
token's row and writes, or adds up, its K copies.

Shape letters: T tokens, K experts per token, S = T K slots, E experts, B blocks of slots, H columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .arch import Arch


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


@dataclass(frozen=True)
class SortConfig:
    """`block` slots per program, compared `piece` at a time; `chunk` blocks per step of the scan."""

    block: int
    piece: int
    chunk: int
    num_warps: int


@dataclass(frozen=True)
class RowConfig:
    """`block` columns per program, and per step of the programs that walk whole rows."""

    block: int
    num_warps: int


def sort_configs(slots: int, arch: Arch) -> list[SortConfig]:
    """Candidates for sorting `slots` slots, the default first."""
    if arch.is_cpu:
        return [SortConfig(block, 64, 64, 4) for block in (64, 128, 256)]
    return [SortConfig(block, 32, 64, warps) for block in (128, 256, 512) for warps in (4, 8)]


def row_configs(columns: int, arch: Arch) -> list[RowConfig]:
    """Candidates for moving rows of `columns` elements, the default first."""
    whole = max(128, triton.next_power_of_2(columns))
    if arch.is_cpu:
        return [RowConfig(min(whole, 16_384), 4)]
    blocks = (2048, 1024, 4096, 512)
    return [RowConfig(min(whole, block), warps) for block in blocks for warps in (4, 8)]


def group_by_expert_reference(ids_TK: Tensor, *, experts: int) -> Permutation:
    """A stable sort of the flattened ids."""
    chosen = ids_TK.flatten().long()
    order = chosen.argsort(stable=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))
    counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Permutation(offsets.int(), order.int(), position.int())


def permute_reference(x_TH: Tensor, permutation: Permutation) -> Tensor:
    """x[order // K]."""
    top_k = len(permutation.order) // max(1, len(x_TH))
    return x_TH.index_select(0, permutation.order // max(1, top_k))


def unpermute_reference(rows_SH: Tensor, permutation: Permutation, weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's rows, in the wider of float32 and the weights' dtype."""
    per_token = rows_SH.index_select(0, permutation.position).unflatten(0, weights_TK.shape)
    return (per_token * weights_TK.unsqueeze(-1)).sum(1).to(rows_SH.dtype)
