"""Moving tokens between ranks, with gradients that travel back.

Shape letters: N tokens of this rank, B sequences, T tokens per sequence, P ranks, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# newer versions of torch have renamed both
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Send(torch.autograd.Function):
    """Rows to their ranks; gradients go the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows_NH: Tensor, sent: list[int], received: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.counts, ctx.group = (sent, received), group
        return exchange(rows_NH, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        sent, received = ctx.counts
        return exchange(grads[0], received, sent, ctx.group), None, None, None


def exchange(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """`send_rows` without gradients."""
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def send_rows(
    rows_NH: Tensor, sent: list[int], received: list[int], *, group: ProcessGroup
) -> Tensor:
    """The next `sent[p]` rows go to rank p; what comes is ordered by the rank it comes from."""
    return _Send.apply(rows_NH, sent, received, group)  # type: ignore[return-value]


def _join(x: Tensor, sequences: int, group: ProcessGroup) -> Tensor:
    ranks = group.size()
    out = x.new_empty(ranks * len(x), *x.shape[1:])
    _gather(out, x.contiguous(), group=group)
    return out.unflatten(0, (ranks, sequences, -1)).transpose(0, 1).flatten(0, 2)


def _sum_pieces(x: Tensor, sequences: int, group: ProcessGroup) -> Tensor:
    ranks = group.size()
    by_rank = x.unflatten(0, (sequences, ranks, -1)).transpose(0, 1).flatten(0, 2).contiguous()
    out = x.new_empty(len(x) // ranks, *x.shape[1:])
    _reduce(out, by_rank, group=group)
    return out


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sequences: int, group: ProcessGroup) -> Tensor:
        ctx.args = sequences, group
        return _join(x, sequences, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return _sum_pieces(grads[0], *ctx.args), None, None


class _SumPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sequences: int, group: ProcessGroup) -> Tensor:
        ctx.args = sequences, group
        return _sum_pieces(x, sequences, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return _join(grads[0], *ctx.args), None, None


def join_pieces(x_NH: Tensor, *, sequences: int, group: ProcessGroup) -> Tensor:
    """Every rank's piece of each sequence, [B T / P, H], becomes the sequences, [B T, H]."""
    return _Join.apply(x_NH, sequences, group)  # type: ignore[return-value]


def sum_to_pieces(x_NH: Tensor, *, sequences: int, group: ProcessGroup) -> Tensor:
    """The sum over ranks of [B T, H], of which each keeps its piece of each sequence."""
    return _SumPieces.apply(x_NH, sequences, group)  # type: ignore[return-value]
