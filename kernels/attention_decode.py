"""Attention of a few new rows per sequence over a key-value cache, in slots or in pages.

The maths is that of `attention.py`; the keys lie in a cache that holds the new rows' own keys too.
Two layouts, told apart by `pages`:

    slots    [B, G, S, D]: position p of a sequence in slot p % S. S may exceed every length, or be
             a ring: then the slots hold the last S positions
    pages    [P, R, G, D]: position p in row p % R of page `pages[b, p // R]`

Keys and values may be float8, with one scale for all heads or one each. Rows of all query heads of
a key head form one tile, so the cache is read once. Where sequences and heads are few, the keys of
one are split among programs (`attention_splits.py`). Sliding layers read their window only. For
inference: not differentiable.

Shape letters: N packed rows, A query heads, G key heads, D head dimension, B sequences, S slots,
R rows of a page, P pages, C splits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arch import arch_of
from .attention import AttentionOutput
from .attention_splits import Problem, configs, join
from .attention_tiles import (
    EVERYTHING,
    LOG2E,
    check_heads,
    check_starts,
    fold,
    load_heads,
    load_rows,
    store_rows,
    unit_stride,
    visible,
    width,
)
from .dispatch import choose
from .lang import jit, tl
from .launch import cdiv, empty, on, register, require
from .tables import pick

FP8 = torch.float8_e4m3fn


def attention_decode_reference(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, *, lengths: Tensor,
    cu_seqlens: Tensor, pages: Tensor | None = None, window: int = 0, scale: float | None = None,
) -> AttentionOutput:  # fmt: skip
    """Attention with all N x S scores in memory, in the dtype of q."""
    if pages is not None:
        keys, values = (x[pages.long()].flatten(1, 2).transpose(1, 2) for x in (keys, values))
    slots, group = keys.shape[2], q.shape[1] // keys.shape[1]
    k, v = (
        x.to(q.dtype) * (1 if s is None else s.to(q.dtype).reshape(-1, 1, 1))
        for x, s in ((keys, k_scale), (values, v_scale))
    )
    row = torch.arange(len(q), dtype=torch.int32, device=q.device)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True)
    position = (row + lengths[sequence] - cu_seqlens[1:][sequence])[:, None]
    slot = torch.arange(slots, device=q.device)
    last = lengths[sequence][:, None] - 1
    held = last - (last - slot) % slots
    seen = (held >= 0) & (held <= position)
    if window:
        seen &= held > position - window
    k, v = (x[sequence].repeat_interleave(group, 1) for x in (k, v))
    scores = (q[:, :, None] @ k.mT)[:, :, 0] * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen[:, None], -float("inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None].expand(len(q), -1, 1)), -1)
    p = scores.softmax(-1)[..., :slots]
    # slots that nothing wrote yet may hold anything
    out = p[:, :, None] @ v.masked_fill(~seen[:, None, :, None], 0)
    lse = scores.logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))
    return AttentionOutput(out[:, :, 0], lse)


@jit(do_not_specialize=["window", "slots", "splits", "pages_stride"])
def _decode_kernel(
    q_NAD, keys, values, starts_B, lengths_B, pages, k_scale, v_scale, sinks_A, out_CNAD, lse_CNA,
    N, window, slots, splits, pages_stride, scale, q_stride, q_head_stride,
    k_outer, k_head_stride, k_stride, v_outer, v_head_stride, v_stride,
    SINKS: tl.constexpr, SCALED: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    split, place = tl.program_id(0) % splits, tl.program_id(0) // splits * TOKENS
    kv_head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.load(starts_B + b)
    length = tl.load(starts_B + b + 1) - start
    behind = tl.load(lengths_B + b) - length
    window = tl.minimum(window, behind + length)

    row = tl.arange(0, ROWS)
    token, head = place + row // GROUP, kv_head * GROUP + row % GROUP
    position = behind + token
    live = (row < TOKENS * GROUP) & (token < length)
    token = start.to(tl.int64) + token
    q = load_heads(q_NAD, token, head, q_stride, q_head_stride, live, D, WIDTH)
    keys += kv_head * k_head_stride
    values += kv_head * v_head_stride
    factor, unscale = scale * LOG2E, 1.0
    if SCALED:
        factor *= tl.load(k_scale + kv_head)
        unscale = tl.load(v_scale + kv_head)

    low, high = behind + place, behind + tl.minimum(place + TOKENS, length)
    begin = tl.maximum(low - window + 1, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - begin, 0), splits), KEYS) * KEYS
    begin += split * share
    end = tl.minimum(begin + share, high)
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if SINKS:
        sink = tl.load(sinks_A + head, mask=row < TOKENS * GROUP, other=0.0).to(tl.float32)
        top = tl.where(split == 0, sink * LOG2E, top)
        total += tl.where(split == 0, 1.0, 0.0)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        seen = key < end
        if PAGE:
            page = tl.load(pages + b * pages_stride + key // PAGE, mask=seen, other=0)
            outer, slot = page.to(tl.int64), (key % PAGE).to(tl.int64)
        else:
            # at most `slots` keys are seen, so they go around the ring once
            slot = first % slots + tl.arange(0, KEYS)
            outer, slot = b, tl.where(slot >= slots, slot - slots, slot).to(tl.int64)
        k = load_rows(keys, outer * k_outer + slot * k_stride, 1, seen, D, WIDTH).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        mask = visible(position[:, None], key[None, :], window) & seen[None, :]
        scores = tl.where(mask, scores, -float("inf"))
        v = load_rows(values, outer * v_outer + slot * v_stride, 1, seen, D, WIDTH).to(q.dtype)
        top, total, acc = fold(scores, v, factor, top, total, acc, True)
    at = token * HEADS + head
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None] * unscale
    lse = top + tl.log2(total)
    if PARTS:
        at += split.to(tl.int64) * N * HEADS
    else:
        lse = lse / LOG2E
    store_rows(out_CNAD, at, D, result, live, D, WIDTH)
    tl.store(lse_CNA + at, lse, mask=live)


def _forward(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, starts: Tensor,
    pages: Tensor | None, sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
    longest: int, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [N, A, D] and log of the denominator [N, A]."""
    (rows, heads, head_dim), batch = q.shape, len(lengths)
    q, keys, values = (unit_stride(x) for x in (q, keys, values))
    # one order of strides for both layouts: outer, head, slot
    order = (0, 1, 2) if pages is None else (0, 2, 1)
    slots, kv_heads = keys.shape[order[2]], keys.shape[order[1]]
    most = slots if pages is None else slots * pages.shape[1]
    problem = Problem(batch, kv_heads, heads // kv_heads, head_dim, q.element_size(), longest,
                      min(window + longest - 1, most) if window else most)  # fmt: skip
    config = pick("attention_decode", configs, problem, q.device)
    tokens, splits = config.tokens(problem), config.splits(problem)
    out, lse = empty(rows, heads, head_dim, like=q), empty(rows, heads, like=q, dtype=torch.float32)
    parts, part_lse = out, lse
    if splits > 1:
        parts = empty(splits, rows, heads, head_dim, like=q, dtype=torch.float32)
        part_lse = empty(splits, rows, heads, like=q, dtype=torch.float32)
    scaled = k_scale is not None or v_scale is not None
    scales = (lse, lse) if not scaled else tuple(
        q.new_ones(kv_heads, dtype=torch.float32) if s is None
        else s.float().expand(kv_heads).contiguous() for s in (k_scale, v_scale)
    )  # fmt: skip
    if not rows or not heads or not batch:
        return out, lse
    table = lengths if pages is None else unit_stride(pages)
    with on(q):
        _decode_kernel[(cdiv(longest, tokens) * splits, kv_heads, batch)](
            q, keys, values, starts.contiguous(), lengths.contiguous(), table, *scales,
            lse if sinks is None else sinks.contiguous(), parts, part_lse, rows,
            window or EVERYTHING, slots, splits, table.stride(0), scale, *q.stride()[:2],
            *(keys.stride(i) for i in order), *(values.stride(i) for i in order),
            SINKS=sinks is not None, SCALED=scaled, PAGE=0 if pages is None else slots,
            PARTS=splits > 1, HEADS=heads, GROUP=problem.group, D=head_dim, WIDTH=width(head_dim),
            TOKENS=tokens, ROWS=config.tile_rows(problem), KEYS=config.keys,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if splits > 1:
            join(parts, part_lse, out, lse)
    return out, lse


_decode = register(
    "attention_decode(Tensor q, Tensor keys, Tensor values, Tensor lengths, Tensor cu_seqlens,"
    " Tensor? pages, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, SymInt longest,"
    " SymInt window, float scale) -> (Tensor, Tensor)",
    _forward,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)),
)


def _check(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, cu_seqlens: Tensor,
    pages: Tensor | None,
) -> None:  # fmt: skip
    require(q.dim() == 3 and keys.dim() == 4, "q must be [rows, heads, head dimension], keys and "
            f"values 4-dimensional, got {tuple(q.shape)} and {tuple(keys.shape)}")  # fmt: skip
    kv_heads = keys.shape[1 if pages is None else 2]
    require(kv_heads > 0 and q.shape[1] % kv_heads == 0,
            f"{q.shape[1]} query heads must be a multiple of {kv_heads} key heads")  # fmt: skip
    require(keys.dtype == values.dtype and keys.dtype in (q.dtype, FP8),
            f"keys and values must be {q.dtype} or {FP8}, got {keys.dtype}")  # fmt: skip
    check_starts("cu_seqlens", cu_seqlens)
    require(lengths.dtype == torch.int32 and lengths.shape == (len(cu_seqlens) - 1,),
            "lengths must be int32, one for each sequence of cu_seqlens")  # fmt: skip
    batch = len(keys) if pages is None else len(pages)
    require(batch == len(lengths), "lengths must be one for each sequence of the cache")


def attention_decode(
    q: Tensor, keys: Tensor, values: Tensor, *, lengths: Tensor, cu_seqlens: Tensor,
    longest: int | None = None, pages: Tensor | None = None, window: int = 0,
    scale: float | None = None, sinks: Tensor | None = None, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> AttentionOutput:  # fmt: skip
    """Causal attention of packed new rows over a cache that already holds their keys.

    Args:
        q: [N, A, D], any strides; a sequence's rows are the last of its positions.
        keys, values: slots [B, G, S, D], or pages [P, R, G, D]; the dtype of q or float8_e4m3fn.
        lengths: int32 [B], positions of each sequence, the new rows included. A ring needs
            S >= min(length, window + rows - 1).
        cu_seqlens: int32 [B + 1], where each sequence's rows start in q; none is allowed.
        longest: the most rows that any sequence brings; N if None, which only costs time.
        pages: int32 [B, most pages], for the paged layout.
        window, scale, sinks: as for `attention`.
        k_scale, v_scale: float32 [] or [G], what stored keys and values are multiplied by.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_heads(q, keys, values, sinks, window, scale)
    _check(q, keys, values, lengths, cu_seqlens, pages)
    if choose(q) == "reference" or not (keys.dtype != FP8 or arch_of(q.device).fp8):
        return attention_decode_reference(
            q, keys, values, sinks, k_scale, v_scale, lengths=lengths, cu_seqlens=cu_seqlens,
            pages=pages, window=window, scale=scale,
        )  # fmt: skip
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return AttentionOutput(*_decode(q, keys, values, lengths, cu_seqlens, pages, sinks, k_scale,
                                    v_scale, len(q) if longest is None else longest, window,
                                    factor))  # fmt: skip
