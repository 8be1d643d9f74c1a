"""Attention over packed sequences: causal, global or in a sliding window, with grouped heads.

    s_ij = scale q_i k_j      for keys j <= i and, with a window w > 0, j > i - w
    lse_i = log(sum_j exp(s_ij) + exp(sink))            the sink is a learned logit per head
    out_i = sum_j exp(s_ij - lse_i) v_j

Sequences of any lengths lie end to end in q, k and v; `cu_seqlens` says where each starts. Where a
sequence has more keys than queries (a prefill chunk), its queries are the last of them.

Method: Dao 2023 (arXiv 2307.08691), scores never leave registers; sinks as in gpt-oss. A program
does a tile of tokens for all query heads of one key head (`attention_tiles.py`). Blocks of keys
that no row of the tile may see are never loaded. The gradient is in `attention_backward.py`.

Shape letters: N packed queries, M packed keys, A query heads, G key heads, D head dimension,
B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import attention_backward
from .arch import Arch
from .attention_tiles import (
    EVERYTHING,
    LOG2E,
    Problem,
    check_packed,
    fold,
    key_blocks,
    load_heads,
    load_rows,
    problem_of,
    query_tile,
    rows_of,
    tokens_of,
    unit_stride,
    visible,
    width,
)
from .dispatch import choose
from .lang import jit, tl, triton
from .launch import empty, on, register
from .tables import pick


@dataclass(frozen=True)
class Config:
    """Tiles of `rows` query rows (tokens times heads of a group) by `keys` keys.

    `split`: keys that every row of the tile sees are done first, in a loop without masks.
    """

    rows: int
    keys: int
    split: bool
    num_warps: int
    num_stages: int


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates, the default first."""
    if arch.is_cpu:
        keys = (32, 64, 128) if problem.narrow else (128, 64, 256)
        return [Config(rows, k, False, 4, 1) for rows in (256, 128) for k in keys]
    found = [
        Config(rows, keys, True, warps, stages)
        for rows in (128, 64, 32, 16)
        for keys in (64, 32, 128, 16)
        for warps in ((4,) if arch.warp_size == 64 else (8, 4))
        for stages in (2, 3, 1)
    ]
    return [c for c in found if feasible(c, problem, arch)]


def feasible(config: Config, problem: Problem, arch: Arch) -> bool:
    """Whether tiles fit shared memory, and what a thread holds its registers."""
    columns = width(problem.head_dim)
    rows = rows_of(config.rows, problem.group)
    if problem.itemsize == 4:
        # multiplied without tensor cores, by threads that hold whole rows
        return rows * columns <= 2048 and config.keys == 16
    shared = problem.itemsize * columns * (rows + 2 * config.num_stages * config.keys)
    # accumulator, scores, addresses and, where the instructions take them from there, queries
    held = rows * (columns + config.keys) + 0.75 * config.keys * columns
    held += 0 if arch.shared_operands else rows * columns / 2
    return shared <= arch.shared_bytes and held <= 124 * config.num_warps * arch.warp_size


@dataclass(frozen=True)
class AttentionOutput:
    """`out` [N, A, D] in the dtype of q; `lse` [N, A] float32, the log of the denominator."""

    out: Tensor
    lse: Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, *, cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None, window: int = 0, scale: float | None = None,
) -> AttentionOutput:  # fmt: skip
    """Attention with all N x M scores in memory, in the dtype of its inputs."""
    starts_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    group = q.shape[1] // k.shape[1]
    seen = visible_reference(cu_seqlens, starts_k, len(q), len(k), window)
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -float("inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(q), 1)), -1)
    out = scores.softmax(-1)[..., : k.shape[1]] @ v
    lse = scores.logsumexp(-1).T
    return AttentionOutput(out.transpose(0, 1), lse.to(torch.promote_types(q.dtype, torch.float32)))


def visible_reference(
    starts: Tensor, starts_k: Tensor, queries: int, keys: int, window: int
) -> Tensor:
    """Which of M keys each of N queries sees, [N, M]."""
    sequence, place = _places(starts, queries)
    sequence_k, key = _places(starts_k, keys)
    position = place + (starts_k.diff() - starts.diff())[sequence]
    seen = (sequence[:, None] == sequence_k) & (key <= position[:, None])
    return seen & (key > position[:, None] - window) if window else seen


def _places(starts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sequence of each packed token, and its index in the sequence."""
    token = torch.arange(count, dtype=starts.dtype, device=starts.device)
    sequence = torch.searchsorted(starts[1:], token, right=True)
    return sequence, token - starts[sequence]


@triton.jit
def _step(q, k_MGD, v_MGD, first, start, high, position, window, scale, k_stride, v_stride,
          top, total, acc, MASKED: tl.constexpr, GUARD: tl.constexpr, D: tl.constexpr,
          WIDTH: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    key = start + tl.arange(0, KEYS)
    live = key < high if MASKED else key >= 0
    k = load_rows(k_MGD, first + key, k_stride, live, D, WIDTH)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        seen = visible(position[:, None], key[None, :], window)
        scores = tl.where(seen, scores, -float("inf"))
    v = load_rows(v_MGD, first + key, v_stride, live, D, WIDTH)
    return fold(scores, v, scale, top, total, acc, GUARD)


@jit(do_not_specialize=["sequences", "window"])
def _forward_kernel(
    q_NAD, k_MGD, v_MGD, starts_B, starts_k_B, sinks_A, out_NAD, lse_NA,
    sequences, window, scale, q_stride, q_head_stride, k_stride, k_head_stride,
    v_stride, v_head_stride,
    SINKS: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    token, head, live, position, start_k, window, low, high = query_tile(
        starts_B, starts_k_B, sequences, window, GROUP, TOKENS, ROWS)  # fmt: skip
    kv_head = tl.program_id(1).to(tl.int64)
    q = load_heads(q_NAD, token, head, q_stride, q_head_stride, live, D, WIDTH)
    k_MGD += kv_head * k_head_stride
    v_MGD += kv_head * v_head_stride

    begin, blocks, first_full, end_full = key_blocks(low, high, window, SPLIT, KEYS)
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if SINKS:
        top = tl.load(sinks_A + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    if SPLIT:
        for block in range(first_full, end_full):
            top, total, acc = _step(
                q, k_MGD, v_MGD, start_k, begin + block * KEYS, high, position, window,
                scale * LOG2E, k_stride, v_stride, top, total, acc,
                False, False, D, WIDTH, KEYS,
            )  # fmt: skip
    for edge in range(0, blocks - (end_full - first_full)):
        block = tl.where(edge < first_full, edge, edge + end_full - first_full)
        top, total, acc = _step(
            q, k_MGD, v_MGD, start_k, begin + block * KEYS, high, position, window,
            scale * LOG2E, k_stride, v_stride, top, total, acc,
            True, not SINKS, D, WIDTH, KEYS,
        )  # fmt: skip

    at, mask = tl.arange(0, WIDTH), live[:, None]
    if WIDTH != D:
        mask = mask & (at[None, :] < D)
    out_NAD += (token * HEADS + head)[:, None] * D + at[None, :]
    tl.store(out_NAD, (acc / total[:, None]).to(out_NAD.dtype.element_ty), mask=mask)
    tl.store(lse_NA + token * HEADS + head, (top + tl.log2(total)) / LOG2E, mask=live)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None,
    sinks: Tensor | None, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [N, A, D] and log of the denominator [N, A]."""
    starts_k = check_packed(q, k, v, cu_seqlens, cu_seqlens_k, sinks, window, scale)
    tokens, heads, head_dim = q.shape
    q, k, v = (unit_stride(x) for x in (q, k, v))
    out = empty(tokens, heads, head_dim, like=q)
    lse = empty(tokens, heads, like=q, dtype=torch.float32)
    problem = problem_of(q, k.shape[1], window)
    config = pick("attention", configs, problem, q.device)
    block = tokens_of(config.rows, problem.group)
    sequences = len(cu_seqlens) - 1
    if tokens and heads and sequences:
        with on(q):
            _forward_kernel[(tokens // block + sequences, k.shape[1])](
                q, k, v, cu_seqlens.contiguous(), starts_k.contiguous(),
                lse if sinks is None else sinks.contiguous(), out, lse,
                sequences, window or EVERYTHING, scale, *q.stride()[:2], *k.stride()[:2],
                *v.stride()[:2], SINKS=sinks is not None, SPLIT=config.split, HEADS=heads,
                GROUP=problem.group, D=head_dim, WIDTH=width(head_dim), TOKENS=block,
                ROWS=rows_of(config.rows, problem.group), KEYS=config.keys,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return out, lse


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, grad: Tensor, lse_grad: Tensor) -> tuple:
    q, k, v, starts, starts_k, sinks, out, lse = ctx.saved_tensors
    dq, dk, dv, d_sinks = attention_backward.op(
        grad, lse_grad, q, k, v, starts, starts_k, sinks, out, lse, ctx.window, ctx.scale
    )
    return dq, dk, dv, None, None, d_sinks if sinks is not None else None, None, None


_attention = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k,"
    " Tensor? sinks, SymInt window, float scale) -> (Tensor, Tensor)",
    forward,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)),
    setup_context=_save,
    backward=_gradient,
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None,
    window: int = 0, scale: float | None = None, sinks: Tensor | None = None,
) -> AttentionOutput:  # fmt: skip
    """Causal attention within each of B packed sequences; differentiable in q, k, v and sinks.

    Args:
        q: [N, A, D] float32, bfloat16 or float16, any strides; D at most 256. float64
            runs the reference.
        k, v: [M, G, D], A a multiple of G: query head a reads key head a // (A / G).
        cu_seqlens: int32 [B + 1], ascending from 0 to N: sequence b is tokens
            cu_seqlens[b] .. cu_seqlens[b + 1] - 1. Empty sequences are allowed.
        cu_seqlens_k: the same for keys, where they are more than queries: each sequence's queries
            are then its last positions. None: M = N, and every sequence brings its own keys.
        window: keys that a query sees, itself included; 0: all up to itself.
        scale: of q k, positive; 1 / sqrt(D) if None.
        sinks: [A], a logit per head that joins the denominator.

    Returns:
        `out` [N, A, D] and `lse` [N, A]; both carry gradients.

    Raises:
        ValueError: shapes or dtypes do not fit together, window is negative, scale not positive.
    """
    if choose(q) == "reference":
        check_packed(q, k, v, cu_seqlens, cu_seqlens_k, sinks, window, scale)
        return attention_reference(
            q, k, v, sinks, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, window=window,
            scale=scale,
        )  # fmt: skip
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return AttentionOutput(*_attention(q, k, v, cu_seqlens, cu_seqlens_k, sinks, window, factor))
