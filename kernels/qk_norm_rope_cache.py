"""QK-norm + RoPE of new tokens straight into a key-value cache: one launch before decoding.

    q' = norm_rope(q)        keys[b, :, p mod C] = norm_rope(k)        values[b, :, p mod C] = v

for each token of sequence b at position p. A cache that grows has C slots > p, so p mod C = p; one
that keeps a window is a ring. The maths is `qk_norm_rope`'s, to the bit.

Shape letters: T tokens, A heads, D head dimension, B sequences, C slots, R rows of tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose
from .head_tiles import (
    Turn,
    block_of,
    check_heads,
    copy_rows,
    norm_rope_tile,
    rows_of,
    store_halves,
    unit,
)
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require
from .qk_norm_rope import configs, qk_norm_rope_reference
from .tables import pick


@triton.jit
def _slot_of(sequences_T, positions_T, token, live, slots, stride_B, stride_C):
    """Offset of each token's slot within the heads of a cache."""
    sequence = tl.load(sequences_T + token, mask=live, other=0).to(tl.int64)
    position = tl.load(positions_T + token, mask=live, other=0).to(tl.int64)
    return sequence * stride_B + position % slots * stride_C


@jit(do_not_specialize=["T", "slots"])
def _kernel(
    q_TAD, k_TAD, v_TAD, q_weight_D, k_weight_D, cos_RH, sin_RH, sequences_T, positions_T,
    q_out_TAD, keys_BACD, values_BACD, T, slots, q_token, q_head, k_token, k_head, v_token, v_head,
    keys_B, keys_A, keys_C, values_B, values_A, values_C, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs of query tiles, then of key tiles, then of value tiles."""
    tile = tl.program_id(0).to(tl.int64)
    q_tiles = tl.cdiv(T.to(tl.int64) * Q_HEADS, ROWS)
    k_tiles = tl.cdiv(T.to(tl.int64) * K_HEADS, ROWS)
    if tile < q_tiles:
        token, head, _, first, second, at, mask = norm_rope_tile(
            q_TAD, q_token, q_head, q_weight_D, cos_RH, sin_RH, positions_T, tile, T,
            eps, Q_HEADS, HALF, BLOCK, ROPE, False, ROWS)  # fmt: skip
        out = q_out_TAD + (token * Q_HEADS + head) * (2 * HALF)
        store_halves(out, at, mask, first, second, HALF)
    elif tile < q_tiles + k_tiles:
        token, head, live, first, second, at, mask = norm_rope_tile(
            k_TAD, k_token, k_head, k_weight_D, cos_RH, sin_RH, positions_T, tile - q_tiles, T,
            eps, K_HEADS, HALF, BLOCK, ROPE, False, ROWS)  # fmt: skip
        slot = _slot_of(sequences_T, positions_T, token, live, slots, keys_B, keys_C)
        store_halves(keys_BACD + slot + head * keys_A, at, mask, first, second, HALF)
    else:
        token, head, live = rows_of(tile - q_tiles - k_tiles, T, K_HEADS, ROWS)
        slot = _slot_of(sequences_T, positions_T, token, live, slots, values_B, values_C)
        copy_rows(v_TAD + token * v_token + head * v_head, values_BACD + slot + head * values_A,
                  live, HALF, BLOCK)  # fmt: skip


def _check_cache(k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
    tokens, heads, dim = k.shape
    require(v.shape == k.shape and v.dtype == k.dtype, "v must have the shape and dtype of k")
    for name, cache in (("keys", keys), ("values", values)):
        shape = tuple(cache.shape)
        require(
            len(shape) == 4 and shape[1::2] == (heads, dim) and cache.dtype == k.dtype,
            f"{name} must be {k.dtype} [B, {heads}, C, {dim}], got {cache.dtype} {shape}",
        )
        require(not tokens or shape[2] > 0, f"{name} have no slots")
        require(cache.stride(3) == 1, f"{name} must have unit stride in the last dimension")
    require(keys.shape == values.shape, "keys and values must have one shape")


def _append(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, keys: Tensor,
    values: Tensor, sequences: Tensor, positions: Tensor, cos: Tensor | None, sin: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    turn = Turn(cos, sin, None)
    check_heads(q, k, q_weight, k_weight, turn)
    _check_cache(k, v, keys, values)
    q, k, v = unit(q), unit(k), unit(v)
    (tokens, q_heads, dim), k_heads = q.shape, k.shape[1]
    for name, index in (("sequences", sequences), ("positions", positions)):
        require(
            index.shape == (tokens,) and not index.is_floating_point(),
            f"{name} must be integers [{tokens}], got {index.dtype} {tuple(index.shape)}",
        )
    out = empty(tokens, q_heads, dim, like=q)
    config = pick("qk_norm_rope", configs, dim, q)
    q_tiles, k_tiles = (cdiv(tokens * heads, config.rows) for heads in (q_heads, k_heads))
    table, sine, _ = turn.arguments(q)
    if tokens:
        with on(q):
            _kernel[(q_tiles + 2 * k_tiles,)](
                q, k, v, q_weight.contiguous(), k_weight.contiguous(), table, sine,
                sequences.contiguous(), positions.contiguous(), out, keys, values,
                tokens, keys.shape[2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                *keys.stride()[:3], *values.stride()[:3], eps,
                Q_HEADS=q_heads, K_HEADS=k_heads, HALF=dim // 2, ROPE=cos is not None,
                ROWS=config.rows, BLOCK=block_of(dim), num_warps=config.num_warps,
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


_op = register(
    "qk_norm_rope_cache(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight,"
    " Tensor(a!) keys, Tensor(b!) values, Tensor sequences, Tensor positions, Tensor? cos,"
    " Tensor? sin, float eps) -> Tensor",
    _append,
    fake=lambda q, *rest: q.new_empty(q.shape),
)


def qk_norm_rope_cache(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, keys: Tensor,
    values: Tensor, sequences: Tensor, positions: Tensor,
    *, cos: Tensor | None = None, sin: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Norms and turns the heads of new tokens, and writes their keys and values into a cache.

    For inference: not differentiable. No two tokens may share a slot.

    Args:
        q, k, q_weight, k_weight, eps: as for `qk_norm_rope`.
        v: [T, Ak, D], the dtype of k; stored as it is.
        keys, values: [B, Ak, C, D], the dtype of k, unit last stride; written in place.
        sequences: integers [T], each below B (unchecked: to look would wait for the device).
        positions: integers [T], not negative; position p lives in slot p modulo C.
        cos, sin: float32 [T, D/2] for these tokens; None: heads are not turned.

    Returns:
        The queries [T, Aq, D], normed and turned.

    Raises:
        ValueError: shapes or dtypes other than these, an odd D, or a gradient is asked for.
    """
    require(not torch.is_grad_enabled()
            or not any(x.requires_grad for x in (q, k, v, q_weight, k_weight)),
            "qk_norm_rope_cache has no gradient: call it under torch.no_grad()")  # fmt: skip
    if choose(q) == "reference":
        q, k = qk_norm_rope_reference(q, k, q_weight, k_weight, cos=cos, sin=sin, positions=None,
                                      eps=eps)  # fmt: skip
        slots = positions % keys.shape[2] if len(positions) else positions
        keys[sequences, :, slots] = k
        values[sequences, :, slots] = v
        return q
    return _op(q, k, v, q_weight, k_weight, keys, values, sequences, positions, cos, sin, eps)
