"""What expert balance is measured by, per sequence: choices per expert and mean score shares.

    counts[b, e] = how often the tokens of sequence b chose expert e
    shares[b, e] = mean over its tokens of scores[t, e] / (sum over e of scores[t, e])

Gradients reach the scores through shares: with g = dshares[b] / L and n_t = sum_e scores[t, e],
dscores[t, e] = (g_e - sum_j g_j scores[t, j] / n_t) / n_t.

The sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, eq. 17-20) is a sum over experts of
their product. Method: partial sums per piece of a sequence, added in a fixed order.

Shape letters: B sequences of L tokens each, T = B L tokens, E experts, K experts per token,
C pieces of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require
from .tables import pick


@dataclass(frozen=True)
class Balance:
    """Mean shares of the scores [B, E], and choices per sequence and expert int64 [B, E]."""

    shares_BE: Tensor
    counts_BE: Tensor


@dataclass(frozen=True)
class Config:
    """`rows` tokens per step, `steps` steps per program."""

    rows: int
    steps: int
    num_warps: int


def configs(experts: int, arch: Arch) -> list[Config]:
    """Candidates for `experts` experts, the default first."""
    if arch.is_cpu:
        return [Config(rows, 64, 4) for rows in (8, 4, 16)]
    return [Config(rows, 4, warps) for rows in (16, 32, 8) for warps in (4, 8)]


def balance_reference(scores_TE: Tensor, ids_TK: Tensor, *, sequences: int) -> Balance:
    """Counts by scatter, shares in the dtype of the scores."""
    chosen = ids_TK.reshape(sequences, -1).long()
    counts = chosen.new_zeros(sequences, scores_TE.shape[-1])
    counts = counts.scatter_add(1, chosen, torch.ones_like(chosen))
    shares = scores_TE / scores_TE.sum(-1, keepdim=True)
    return Balance(shares.unflatten(0, (sequences, -1)).mean(1), counts)


@jit
def _balance_kernel(
    scores_TE, ids_TK, counts_BCE, shares_BCE, L, E,
    K: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    piece, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    expert, slot = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    scores_TE += sequence * L * E
    ids_TK += sequence * L * K
    counts = tl.zeros([BLOCK], tl.int32)
    shares = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        first = (piece * STEPS + step) * ROWS
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < L) & (expert[None, :] < E)
        scores = tl.load(scores_TE + row * E + expert[None, :], mask=mask, other=0.0)
        total = tl.where(row < L, tl.sum(scores, 1)[:, None], 1.0)
        shares += tl.sum(scores / total, 0)
        live = (slot < ROWS * K) & (first * K + slot < L * K)
        ids = tl.load(ids_TK + first * K + slot, mask=live, other=0).to(tl.int32)
        counts += tl.histogram(ids, BLOCK, mask=live)
    at = (sequence * tl.num_programs(0) + piece) * E + expert
    tl.store(counts_BCE + at, counts, mask=expert < E)
    tl.store(shares_BCE + at, shares, mask=expert < E)


@jit
def _balance_backward_kernel(
    d_shares_BE, scores_TE, d_scores_TE, L, E, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    sequence, expert = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    grad = tl.load(d_shares_BE + sequence * E + expert, mask=expert < E, other=0.0)[None, :] / L
    mask = (row < L) & (expert[None, :] < E)
    at = (sequence * L + row) * E + expert[None, :]
    scores = tl.load(scores_TE + at, mask=mask, other=0.0)
    total = tl.where(row < L, tl.sum(scores, 1)[:, None], 1.0)
    mean = tl.sum(grad * scores / total, 1)[:, None]
    tl.store(d_scores_TE + at, (grad - mean) / total, mask=mask)


def _balance(scores: Tensor, ids: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    (tokens, experts), top_k = scores.shape, ids.shape[1]
    require(sequences > 0 and tokens % sequences == 0,
            f"{tokens} tokens are not {sequences} sequences of one length")  # fmt: skip
    require(len(ids) == tokens, f"ids of {len(ids)} tokens, scores of {tokens}")
    length = tokens // sequences
    config = pick("balance", configs, experts, scores.device)
    pieces = cdiv(length, config.rows * config.steps)
    counts = empty(sequences, pieces, experts, like=scores, dtype=torch.int32)
    shares = empty(sequences, pieces, experts, like=scores)
    if pieces:
        with on(scores):
            _balance_kernel[(pieces, sequences)](
                scores.contiguous(), ids.contiguous(), counts, shares, length, experts, K=top_k,
                SLOTS=triton.next_power_of_2(config.rows * top_k), ROWS=config.rows,
                STEPS=config.steps, BLOCK=max(16, triton.next_power_of_2(experts)),
                num_warps=config.num_warps,
            )  # fmt: skip
    return shares.sum(1) / length, counts.sum(1)


def _balance_backward(grad: Tensor, scores: Tensor) -> Tensor:
    (tokens, experts), sequences = scores.shape, len(grad)
    length = tokens // sequences
    config = pick("balance", configs, experts, scores.device)
    out = empty(tokens, experts, like=scores)
    if tokens:
        with on(scores):
            _balance_backward_kernel[(cdiv(length, config.rows), sequences)](
                grad.contiguous(), scores.contiguous(), out, length, experts, ROWS=config.rows,
                BLOCK=max(16, triton.next_power_of_2(experts)), num_warps=config.num_warps,
            )  # fmt: skip
    return out


_backward_op = register(
    "balance_backward(Tensor grad, Tensor scores) -> Tensor",
    _balance_backward,
    fake=lambda grad, scores: scores.new_empty(scores.shape),
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0])


_op = register(
    "balance(Tensor scores, Tensor ids, SymInt sequences) -> (Tensor, Tensor)",
    _balance,
    fake=lambda scores, ids, sequences: (
        scores.new_empty(sequences, scores.shape[1]),
        scores.new_empty(sequences, scores.shape[1], dtype=torch.int64),
    ),
    setup_context=_save,
    backward=lambda ctx, grad, _: (_backward_op(grad, *ctx.saved_tensors), None, None),
)


def balance_statistics(scores_TE: Tensor, ids_TK: Tensor, *, sequences: int) -> Balance:
    """Choices and mean score shares per sequence and expert; shares are differentiable in scores.

    Args:
        scores_TE: [T, E] float32, positive; other dtypes run the reference.
        ids_TK: [T, K] int64 or int32, each in 0..E - 1.
        sequences: B; sequence b is tokens b L to b L + L - 1, L = T / B.

    Raises:
        ValueError: T is no multiple of `sequences`.
    """
    if choose(scores_TE) == "reference" or scores_TE.dtype != torch.float32:
        return balance_reference(scores_TE, ids_TK, sequences=sequences)
    return Balance(*_op(scores_TE, ids_TK, sequences))
