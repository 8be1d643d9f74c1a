"""RMSNorm of every query and key head, and their rotation, in one launch; forward and backward.

    n = cast(x / sqrt(mean(x^2) + eps)) * weight        over one head; statistics in float32
    y = cast(n1 * cos - n2 * sin), cast(n2 * cos + n1 * sin)      n1, n2: the halves of n

The casts are those of the unfused chain: to the input's dtype after the norm, after the weight and
after the rotation, whose products are rounded before they are added (no FMA). So the rotation costs
no accuracy and gives the bits of the unfused one. Without tables there is none (K-EXAONE's global
layers: QK-norm on every layer, RoPE on windowed ones only).

Gradients, with r = dy rotated back, g = r * weight: dx = (g - n mean(g n)) / sqrt(...) and
dweight = sum over tokens and heads of r * n, by partial sums per program and a second reduction.
The square root is taken again from x: nothing is saved but the inputs.

Method: Zhang & Sennrich 2019 (arXiv 1910.07467), Su et al. 2021 (arXiv 2104.09864, half-split
pairs). A tile is several heads, as two halves in registers; each element is read and written once.

Shape letters: T tokens, A heads, D head dimension, H = D / 2, P programs, R rows of tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .elementwise import share
from .head_tiles import (
    Turn,
    block_of,
    check_heads,
    copy_rows,
    norm_rope_gradient,
    norm_rope_tile,
    rows_of,
    store_halves,
    unit,
)
from .lang import jit, tl
from .launch import cdiv, empty, on, register
from .rmsnorm import rms_norm_reference
from .tables import pick


@dataclass(frozen=True)
class Config:
    """`rows` heads per tile; the backward kernel runs `programs` programs."""

    rows: int
    programs: int
    num_warps: int


def configs(dim: int, arch: Arch) -> list[Config]:
    """Candidates for heads of `dim` elements, the default first."""
    if arch.is_cpu:
        # programs cost next to nothing here, and many short sums are more exact than few long ones
        return [Config(rows, 256, 4) for rows in (8, 4, 16, 32)]
    found = [
        Config(rows, programs * arch.processors, warps)
        for rows in (4, 8, 16, 32, 64)
        for warps in (2, 4, 8)
        for programs in (4, 2, 8)
    ]
    return sorted(filter(lambda c: feasible(c, dim, arch), found), key=lambda c: _order(c, dim))


def feasible(config: Config, dim: int, arch: Arch) -> bool:
    """Whether a thread holds 16 to 64 elements: at least one load of 16 bytes from each half."""
    per_thread = config.rows * block_of(dim) * 2 / (config.num_warps * arch.warp_size)
    return 16 <= per_thread <= 64


def _order(config: Config, dim: int) -> tuple[float, ...]:
    return config.rows * block_of(dim) / config.num_warps, abs(config.num_warps - 4)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + D/2) of heads [T, A, D] turned by the angles of tables [T, D/2]."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    *, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both heads normed and turned; float64 is computed in float64, all else in float32."""
    q, k = rms_norm_reference(q, q_weight, eps=eps), rms_norm_reference(k, k_weight, eps=eps)
    if cos is None or sin is None:
        return q, k
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)


@jit(do_not_specialize=["T"])
def _forward_kernel(
    q_TAD, k_TAD, v_TAD, q_weight_D, k_weight_D, cos_RH, sin_RH, positions_T,
    q_out_TAD, k_out_TAD, v_out_TAD, T, q_token, q_head, k_token, k_head, v_token, v_head, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr,
    INDEXED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs of query tiles, then of key tiles, then (if launched) of value tiles to copy."""
    tile = tl.program_id(0).to(tl.int64)
    q_tiles = tl.cdiv(T.to(tl.int64) * Q_HEADS, ROWS)
    k_tiles = tl.cdiv(T.to(tl.int64) * K_HEADS, ROWS)
    if tile < q_tiles:
        token, head, _, first, second, at, mask = norm_rope_tile(
            q_TAD, q_token, q_head, q_weight_D, cos_RH, sin_RH, positions_T, tile, T,
            eps, Q_HEADS, HALF, BLOCK, ROPE, INDEXED, ROWS)  # fmt: skip
        out = q_out_TAD + (token * Q_HEADS + head) * (2 * HALF)
        store_halves(out, at, mask, first, second, HALF)
    elif tile < q_tiles + k_tiles:
        token, head, _, first, second, at, mask = norm_rope_tile(
            k_TAD, k_token, k_head, k_weight_D, cos_RH, sin_RH, positions_T, tile - q_tiles, T,
            eps, K_HEADS, HALF, BLOCK, ROPE, INDEXED, ROWS)  # fmt: skip
        out = k_out_TAD + (token * K_HEADS + head) * (2 * HALF)
        store_halves(out, at, mask, first, second, HALF)
    else:
        token, head, live = rows_of(tile - q_tiles - k_tiles, T, K_HEADS, ROWS)
        copy_rows(v_TAD + token * v_token + head * v_head,
                  v_out_TAD + (token * K_HEADS + head) * (2 * HALF), live, HALF, BLOCK)  # fmt: skip


@jit(do_not_specialize=["T"])
def _backward_kernel(
    q_grad_TAD, k_grad_TAD, v_grad_TAD, q_TAD, k_TAD, q_weight_D, k_weight_D,
    cos_RH, sin_RH, positions_T, q_out_TAD, k_out_TAD, v_out_TAD, partial_P2D,
    T, q_grad_token, q_grad_head, k_grad_token, k_grad_head, v_grad_token, v_grad_head,
    q_token, q_head, k_token, k_head, q_out_token, k_out_token, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr,
    INDEXED: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    partial_P2D += program * (4 * HALF)
    norm_rope_gradient(
        q_grad_TAD, q_TAD, q_weight_D, cos_RH, sin_RH, positions_T, q_out_TAD, partial_P2D,
        T, q_grad_token, q_grad_head, q_token, q_head, q_out_token, eps,
        Q_HEADS, HALF, ROPE, INDEXED, ROWS, BLOCK)  # fmt: skip
    norm_rope_gradient(
        k_grad_TAD, k_TAD, k_weight_D, cos_RH, sin_RH, positions_T, k_out_TAD,
        partial_P2D + 2 * HALF,
        T, k_grad_token, k_grad_head, k_token, k_head, k_out_token, eps,
        K_HEADS, HALF, ROPE, INDEXED, ROWS, BLOCK)  # fmt: skip
    if VALUES:
        tiles = tl.cdiv(T.to(tl.int64) * K_HEADS, ROWS)
        begin, end = share(tiles)
        for tile in range(begin, end):
            token, head, live = rows_of(tile, T, K_HEADS, ROWS)
            copy_rows(v_grad_TAD + token * v_grad_token + head * v_grad_head,
                      v_out_TAD + token * k_out_token + head * (2 * HALF),
                      live, HALF, BLOCK)  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor, k_weight: Tensor, turn: Turn,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q and k normed and turned, and a copy of v (of k, unwritten, where v is None)."""
    check_heads(q, k, q_weight, k_weight, turn)
    q, k = unit(q), unit(k)
    values = k if v is None else unit(v)
    (tokens, q_heads, dim), k_heads = q.shape, k.shape[1]
    q_out, k_out = empty(tokens, q_heads, dim, like=q), empty(tokens, k_heads, dim, like=q)
    v_out = empty(0 if v is None else tokens, k_heads, dim, like=q)
    config = pick("qk_norm_rope", configs, dim, q)
    q_tiles, k_tiles = (cdiv(tokens * heads, config.rows) for heads in (q_heads, k_heads))
    if tiles := q_tiles + k_tiles * (1 if v is None else 2):
        with on(q):
            _forward_kernel[(tiles,)](
                q, k, values, q_weight.contiguous(), k_weight.contiguous(), *turn.arguments(q),
                q_out, k_out, v_out, tokens, *q.stride()[:2], *k.stride()[:2],
                *values.stride()[:2], eps,
                Q_HEADS=q_heads, K_HEADS=k_heads, HALF=dim // 2, ROPE=turn.cos is not None,
                INDEXED=turn.positions is not None, ROWS=config.rows, BLOCK=block_of(dim),
                num_warps=config.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
    return q_out, k_out, v_out


def backward(
    grads: tuple[Tensor, ...], heads: tuple[Tensor, ...], outs: tuple[Tensor, ...],
    q_weight: Tensor, k_weight: Tensor, turn: Turn, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes the gradients of q, k (and v, if `grads` has three) to `outs`; returns the weights'.

    A head of `outs` follows the one before without a gap; k and v have equal strides.
    """
    grads = tuple(unit(g) for g in grads)
    q, k = (unit(x) for x in heads)
    tokens, q_heads, dim = q.shape
    k_heads = k.shape[1]
    config = pick("qk_norm_rope", configs, dim, q)
    tiles = cdiv(tokens * max(q_heads, k_heads), config.rows)
    programs = min(config.programs, tiles)
    if not programs:
        return torch.zeros_like(q_weight), torch.zeros_like(k_weight)
    partial = empty(programs, 2, dim, like=q, dtype=torch.float32)
    with on(q):
        _backward_kernel[(programs,)](
            *grads[:2], grads[-1], q, k, q_weight.contiguous(), k_weight.contiguous(),
            *turn.arguments(q), *outs[:2], outs[-1], partial,
            tokens, *grads[0].stride()[:2], *grads[1].stride()[:2], *grads[-1].stride()[:2],
            *q.stride()[:2], *k.stride()[:2], outs[0].stride(0), outs[1].stride(0), eps,
            Q_HEADS=q_heads, K_HEADS=k_heads, HALF=dim // 2, ROPE=turn.cos is not None,
            INDEXED=turn.positions is not None, VALUES=len(grads) == 3, ROWS=config.rows,
            BLOCK=block_of(dim), num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    q_partial, k_partial = partial.unbind(1)
    return q_partial.sum(0).to(q_weight.dtype), k_partial.sum(0).to(k_weight.dtype)


def _separate(q, k, q_weight, k_weight, cos, sin, positions, eps):
    return forward(q, k, None, q_weight, k_weight, Turn(cos, sin, positions), eps)[:2]


def _separate_backward(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, positions, eps):
    outs = empty(*q.shape, like=q), empty(*k.shape, like=k)
    turn = Turn(cos, sin, positions)
    return *outs, *backward((q_grad, k_grad), (q, k), outs, q_weight, k_weight, turn, eps)


_backward_op = register(
    "qk_norm_rope_backward(Tensor q_grad, Tensor k_grad, Tensor q, Tensor k, Tensor q_weight,"
    " Tensor k_weight, Tensor? cos, Tensor? sin, Tensor? positions, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _separate_backward,
    fake=lambda q_grad, k_grad, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:4]),
)


def save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple:
    return *_backward_op(q_grad, k_grad, *ctx.saved_tensors, ctx.eps), None, None, None, None


_op = register(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin,"
    " Tensor? positions, float eps) -> (Tensor, Tensor)",
    _separate,
    fake=lambda q, k, *rest: (q.new_empty(q.shape), k.new_empty(k.shape)),
    setup_context=save,
    backward=_gradients,
)


@dataclass(frozen=True)
class NormedHeads:
    """Queries [T, Aq, D] and keys [T, Ak, D], normed and turned."""

    q: Tensor
    k: Tensor


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    *, cos: Tensor | None = None, sin: Tensor | None = None, positions: Tensor | None = None,
    eps: float = 1e-5,
) -> NormedHeads:  # fmt: skip
    """RMSNorm of each head of q and k, then RoPE (half-split) where tables are given.

    Differentiable in q, k and the weights.

    Args:
        q: [T, Aq, D] float32, bfloat16 or float16, any strides; float64 runs the reference.
        k: [T, Ak, D], the dtype of q.
        q_weight, k_weight: [D], the dtype of q.
        cos, sin: float32 [T, D/2], or [R, D/2] with positions; None: heads are not turned.
        positions: integers [T], the row of the tables for each token, each below R (unchecked:
            to look at them would wait for the device).
        eps: added to the mean square.

    Raises:
        ValueError: shapes or dtypes other than these, or an odd D.
    """
    if choose(q) == "reference":
        return NormedHeads(*qk_norm_rope_reference(
            q, k, q_weight, k_weight, cos=cos, sin=sin, positions=positions, eps=eps))  # fmt: skip
    return NormedHeads(*_op(q, k, q_weight, k_weight, cos, sin, positions, eps))
