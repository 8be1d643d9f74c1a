"""What the attention kernels share: where a program's rows are, and what a row may look at.

A tile of query rows holds `TOKENS` consecutive tokens of one sequence times the `GROUP` query heads
that share a key head, token by token: all of them read the same keys, so each key is loaded once,
and a window reaches over `TOKENS` + window - 1 keys instead of over a whole tile of tokens.

Sequences lie end to end, and no host code knows their lengths. Sequence b owns the slots from
cu[b] // BLOCK + b on, which is enough for its blocks whatever the lengths are; a program finds its
sequence by bisection, and a few slots stay empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .lang import tl, triton
from .launch import require

MAX_HEAD_DIM = 256
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
EVERYTHING = 2**31 - 1
"""The window of a global layer: more than any position."""


@triton.jit
def find_block(starts_B, slot, sequences, BLOCK: tl.constexpr):
    """Sequence that owns a slot, and the first of the slot's tokens, counted in the sequence."""
    low, high = slot * 0, slot * 0 + sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        owned = tl.load(starts_B + middle) // BLOCK + middle <= slot
        low = tl.where(owned, middle, low)
        high = tl.where(owned, high, middle - 1)
    return low, (slot - tl.load(starts_B + low) // BLOCK - low) * BLOCK


@triton.jit
def load_rows(x, row, stride, live, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of D elements as a tile of WIDTH columns, zero where not live."""
    at = tl.arange(0, WIDTH)
    mask = live[:, None] if WIDTH == D else live[:, None] & (at[None, :] < D)
    return tl.load(x + row[:, None] * stride + at[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, row, stride, values, live, D: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    mask = live[:, None] if WIDTH == D else live[:, None] & (at[None, :] < D)
    tl.store(x + row[:, None] * stride + at[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_heads(x, token, head, token_stride, head_stride, live, D: tl.constexpr,
               WIDTH: tl.constexpr):  # fmt: skip
    """Rows of several heads: as `load_rows`, each row at its own token and head."""
    at = tl.arange(0, WIDTH)
    mask = live[:, None] if WIDTH == D else live[:, None] & (at[None, :] < D)
    row = token[:, None] * token_stride + head[:, None] * head_stride
    return tl.load(x + row + at[None, :], mask=mask, other=0.0)


@triton.jit
def query_tile(starts_B, starts_k_B, sequences, window, GROUP: tl.constexpr, TOKENS: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    """This program's rows: token, head, existence and position of each, [ROWS].

    Then where the sequence's keys start, the window cut to them, and the positions of the tile:
    the first and one past the last.
    """
    # the last blocks have the most keys: they start first
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    b, place = find_block(starts_B, slot, sequences, TOKENS)
    start_q, start_k = tl.load(starts_B + b), tl.load(starts_k_B + b).to(tl.int64)
    length = tl.load(starts_B + b + 1) - start_q
    length_k = (tl.load(starts_k_B + b + 1) - start_k).to(tl.int32)
    behind = length_k - length
    row = tl.arange(0, ROWS)
    token = place + row // GROUP
    head = tl.program_id(1).to(tl.int64) * GROUP + row % GROUP
    live = (row < TOKENS * GROUP) & (token < length)
    low, high = behind + place, behind + tl.minimum(place + TOKENS, length)
    return (start_q.to(tl.int64) + token, head, live, behind + token, start_k,
            tl.minimum(window, length_k), low, high)  # fmt: skip


@triton.jit
def key_blocks(low, high, window, SPLIT: tl.constexpr, KEYS: tl.constexpr):
    """Blocks of keys that rows at positions low .. high - 1 see: the first key, and how many.

    Blocks first_full .. end_full - 1 are seen whole by every row (none, if not `SPLIT`).
    """
    begin = tl.maximum(low - window + 1, 0)
    blocks = tl.cdiv(tl.maximum(high - begin, 0), KEYS)
    first_full = blocks * 0
    end_full = first_full
    if SPLIT:
        first_full = tl.cdiv(tl.maximum(high - window, 0) - begin, KEYS)
        # a block past the last token has no row that could see up to low
        end_full = tl.maximum(first_full, (tl.minimum(low + 1, high) - begin) // KEYS)
    return begin, blocks, first_full, end_full


@triton.jit
def visible(position, key, window):
    """Query rows by keys: the keys at most at a query's position, and fewer than `window` back."""
    return (key <= position) & (key > position - window)


@triton.jit
def fold(scores, values, scale, top, total, acc, GUARD: tl.constexpr):
    """One step of the online softmax: `scale` turns scores into logarithms to base 2.

    GUARD: a row may have seen nothing so far; what is not visible has score -inf.
    """
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    base = tl.where(higher == -float("inf"), 0.0, higher) if GUARD else higher
    p = tl.exp2(tl.fma(scores, scale, -base[:, None]))
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@dataclass(frozen=True)
class Problem:
    """What the choice of tiles depends on; `window` is 0 for global attention."""

    head_dim: int
    group: int
    itemsize: int
    window: int

    @property
    def narrow(self) -> bool:
        """Whether tiles should be small, because few keys at their edges are wasted work."""
        return 0 < self.window <= 512


def problem_of(q: Tensor, kv_heads: int, window: int) -> Problem:
    return Problem(q.shape[-1], q.shape[1] // kv_heads, q.element_size(), window)


def width(head_dim: int) -> int:
    """Columns of a tile that holds rows of `head_dim` elements."""
    return max(16, triton.next_power_of_2(head_dim))


def tokens_of(rows: int, group: int) -> int:
    """Tokens per tile of `rows` rows."""
    return max(1, rows // group)


def rows_of(rows: int, group: int) -> int:
    """Rows of a tile: `rows`, or one token's where a token has more."""
    return max(rows, triton.next_power_of_2(group))


def unit_stride(x: Tensor) -> Tensor:
    """`x` with contiguous rows; a copy only where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def check_heads(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int, scale: float | None
) -> None:
    """Raises ValueError for inputs that no attention op takes. Heads are the second dimension."""
    heads, head_dim = q.shape[1], q.shape[2]
    require(k.shape == v.shape and k.shape[-1] == head_dim,
            f"keys and values must have one shape and q's head dimension {head_dim}, got "
            f"{tuple(k.shape)} and {tuple(v.shape)}")  # fmt: skip
    require(0 < head_dim <= MAX_HEAD_DIM,
            f"head dimension must be 1 to {MAX_HEAD_DIM}, got {head_dim}")  # fmt: skip
    require(sinks is None or sinks.shape == (heads,), f"sinks must be [{heads}]")
    require(window >= 0, f"window must be 0 (everything) or positive, got {window}")
    require(scale is None or scale > 0, f"scale must be positive, got {scale}")


def check_starts(name: str, starts: Tensor) -> None:
    whole = starts.dim() == 1 and len(starts) > 0 and starts.dtype == torch.int32
    got = f"{starts.dtype} {tuple(starts.shape)}"
    require(whole, f"{name} must be int32 [sequences + 1], got {got}")


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None,
    sinks: Tensor | None, window: int, scale: float | None,
) -> Tensor:  # fmt: skip
    """Where each sequence's keys start. Raises ValueError for inputs that do not fit together."""
    require(q.dim() == 3 and k.dim() == 3, f"q, k and v must be [tokens, heads, head dimension], "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")  # fmt: skip
    check_heads(q, k, v, sinks, window, scale)
    require(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
            f"{q.shape[1]} query heads must be a multiple of {k.shape[1]} key heads")  # fmt: skip
    require(q.dtype == k.dtype == v.dtype, "q, k and v must have one dtype")
    check_starts("cu_seqlens", cu_seqlens)
    if cu_seqlens_k is None:
        require(len(q) == len(k), f"{len(q)} queries and {len(k)} keys need cu_seqlens_k")
        return cu_seqlens
    check_starts("cu_seqlens_k", cu_seqlens_k)
    require(len(cu_seqlens) == len(cu_seqlens_k), "cu_seqlens and cu_seqlens_k differ in length")
    return cu_seqlens_k
