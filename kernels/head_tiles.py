"""Tiles of attention heads, as two halves: what the kernels that norm and turn heads share.

Row r of a tile is head r mod A of token r div A, so a tile is full whatever A is. Halves, because
RoPE pairs element i with i + D/2: both are then in one thread, and each half is contiguous.

Shape letters: T tokens, A heads, D head dimension, H = D / 2 ("HALF"; BLOCK is the power of two
that holds it), R rows of the tables of cosines and sines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .elementwise import share
from .lang import tl, triton
from .launch import require


def block_of(dim: int) -> int:
    """The width of half a head in a tile."""
    return triton.next_power_of_2(max(dim // 2, 1))


@dataclass(frozen=True)
class Turn:
    """Rows of cos and sin [R, D/2] by token, or by the position of a token; None: no rotation."""

    cos: Tensor | None
    sin: Tensor | None
    positions: Tensor | None

    def arguments(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three contiguous tensors; what the kernel does not read is `like`."""
        parts = (self.cos, self.sin, self.positions)
        cos, sin, positions = (like if t is None else t.contiguous() for t in parts)
        return cos, sin, positions

    def check(self, tokens: int, dim: int) -> None:
        require((self.cos is None) == (self.sin is None), "cos and sin go together")
        if self.cos is None or self.sin is None:
            require(self.positions is None, "positions go with cos and sin")
            return
        rows = len(self.cos) if self.positions is not None else tokens
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            require(table.shape == (rows, dim // 2) and table.dtype == torch.float32,
                    f"{name} must be float32 [{rows}, {dim // 2}], got {table.dtype} "
                    f"{tuple(table.shape)}")  # fmt: skip
        if self.positions is not None:
            require(self.positions.shape == (tokens,) and not self.positions.is_floating_point(),
                    f"positions must be integers [{tokens}], got {self.positions.dtype} "
                    f"{tuple(self.positions.shape)}")  # fmt: skip


def unit(x: Tensor) -> Tensor:
    """`x` with unit stride in the last dimension; a copy only if it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_heads(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, turn: Turn) -> None:
    require(q.dim() == k.dim() == 3 and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2],
            f"q and k must be [T, A, D] with equal T and D, got {tuple(q.shape)} and "
            f"{tuple(k.shape)}")  # fmt: skip
    tokens, _, dim = q.shape
    require(dim > 0 and dim % 2 == 0, f"the head dimension must be even and positive, got {dim}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        require(weight.shape == (dim,), f"{name} must be [{dim}], got {tuple(weight.shape)}")
    require(q.dtype == k.dtype == q_weight.dtype == k_weight.dtype,
            f"q, k and their weights must have one dtype, got {q.dtype}, {k.dtype}, "
            f"{q_weight.dtype}, {k_weight.dtype}")  # fmt: skip
    turn.check(tokens, dim)


@triton.jit
def rows_of(tile, T, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Token, head and existence of the rows of a tile, each [ROWS, 1]."""
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // HEADS
    return token, row - token * HEADS, token < T


@triton.jit
def load_halves(x, at, mask, HALF: tl.constexpr):
    return tl.load(x + at, mask=mask, other=0.0), tl.load(x + HALF + at, mask=mask, other=0.0)


@triton.jit
def store_halves(x, at, mask, first, second, HALF: tl.constexpr):
    tl.store(x + at, first.to(x.dtype.element_ty), mask=mask)
    tl.store(x + HALF + at, second.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_turn(cos_RH, sin_RH, positions_T, token, live, at, mask, HALF: tl.constexpr,
              INDEXED: tl.constexpr):  # fmt: skip
    if INDEXED:
        token = tl.load(positions_T + token, mask=live, other=0).to(tl.int64)
    at = token * HALF + at
    return tl.load(cos_RH + at, mask=mask, other=0.0), tl.load(sin_RH + at, mask=mask, other=0.0)


@triton.jit
def inverse_deviation(first, second, eps, HALF: tl.constexpr):
    return tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)[:, None]


@triton.jit
def norm_rope(x, weight_D, cos_RH, sin_RH, positions_T, token, live, eps, HALF: tl.constexpr,
              BLOCK: tl.constexpr, ROPE: tl.constexpr, INDEXED: tl.constexpr):  # fmt: skip
    """The halves of heads whose first elements are at `x` [ROWS, 1], normed and turned."""
    at = tl.arange(0, BLOCK)[None, :]
    mask = live & (at < HALF)
    dtype = x.dtype.element_ty
    first, second = load_halves(x, at, mask, HALF)
    first, second = first.to(tl.float32), second.to(tl.float32)
    scale = inverse_deviation(first, second, eps, HALF)
    w1, w2 = load_halves(weight_D, at, at < HALF, HALF)
    first = ((first * scale).to(dtype).to(tl.float32) * w1.to(tl.float32)).to(dtype)
    second = ((second * scale).to(dtype).to(tl.float32) * w2.to(tl.float32)).to(dtype)
    if ROPE:
        cos, sin = load_turn(cos_RH, sin_RH, positions_T, token, live, at, mask, HALF, INDEXED)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    return first, second, at, mask


@triton.jit
def norm_rope_tile(
    x_TAD, x_token, x_head, weight_D, cos_RH, sin_RH, positions_T, tile, T, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr,
    INDEXED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Token, head and existence of a tile's rows, and their halves, normed and turned."""
    token, head, live = rows_of(tile, T, HEADS, ROWS)
    first, second, at, mask = norm_rope(
        x_TAD + token * x_token + head * x_head, weight_D, cos_RH, sin_RH, positions_T,
        token, live, eps, HALF, BLOCK, ROPE, INDEXED)  # fmt: skip
    return token, head, live, first, second, at, mask


@triton.jit
def copy_rows(x, out, live, HALF: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[None, :]
    first, second = load_halves(x, at, live & (at < HALF), HALF)
    store_halves(out, at, live & (at < HALF), first, second, HALF)


@triton.jit
def norm_rope_gradient(
    grad_TAD, x_TAD, weight_D, cos_RH, sin_RH, positions_T, out_TAD, partial_D,
    T, grad_token, grad_head, x_token, x_head, out_token, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr, INDEXED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The input's gradient of this program's tiles, and their share of the weight's."""
    at = tl.arange(0, BLOCK)[None, :]
    w1, w2 = load_halves(weight_D, at, at < HALF, HALF)
    w1, w2 = w1.to(tl.float32), w2.to(tl.float32)
    total1 = tl.zeros([ROWS, BLOCK], tl.float32)
    total2 = tl.zeros([ROWS, BLOCK], tl.float32)
    tiles = tl.cdiv(T.to(tl.int64) * HEADS, ROWS)
    begin, end = share(tiles)
    for tile in range(begin, end):
        token, head, live = rows_of(tile, T, HEADS, ROWS)
        mask = live & (at < HALF)
        r1, r2 = load_halves(grad_TAD + token * grad_token + head * grad_head, at, mask, HALF)
        n1, n2 = load_halves(x_TAD + token * x_token + head * x_head, at, mask, HALF)
        r1, r2, n1, n2 = r1.to(tl.float32), r2.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32)
        if ROPE:
            cos, sin = load_turn(cos_RH, sin_RH, positions_T, token, live, at, mask, HALF, INDEXED)
            r1, r2 = tl.fma(r1, cos, r2 * sin), tl.fma(r2, cos, -r1 * sin)
        scale = inverse_deviation(n1, n2, eps, HALF)
        n1, n2 = n1 * scale, n2 * scale
        total1 += r1 * n1
        total2 += r2 * n2
        g1, g2 = r1 * w1, r2 * w2
        dot = tl.sum(tl.fma(g1, n1, g2 * n2), 1)[:, None] / (2 * HALF)
        store_halves(out_TAD + token * out_token + head * (2 * HALF), at, mask,
                     tl.fma(-n1, dot, g1) * scale, tl.fma(-n2, dot, g2) * scale, HALF)  # fmt: skip
    store_halves(partial_D, at, at < HALF, tl.sum(total1, 0)[None, :], tl.sum(total2, 0)[None, :],
                 HALF)  # fmt: skip
