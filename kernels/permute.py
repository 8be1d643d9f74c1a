"""Rows to their experts and back, forward and backward.

    permute   rows[s] = x[order[s] // K]
    unpermute out[t] = sum over k of weights[t, k] * rows[position[t K + k]]    summed in float32

`order` and `position` are a `Permutation` (`grouping.py`). Gradients: permute's is the unweighted
sum over a token's rows; unpermute's are drows[position[t K + k]] = weights[t, k] * grad[t] and
dweights[t, k] = sum over columns of grad[t] * rows[position[t K + k]].

Method: by token. A program holds a piece of one token's row and writes, or adds up in the order of
k, its K copies: each row is read once, and no two programs write the same place.

Shape letters: T tokens, K experts per token, S = T K slots, H columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .grouping import Permutation
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .tables import pick


@dataclass(frozen=True)
class Config:
    """`block` columns per program, and per step of the programs that walk whole rows."""

    block: int
    num_warps: int


def configs(columns: int, arch: Arch) -> list[Config]:
    """Candidates for moving rows of `columns` elements, the default first."""
    whole = max(128, triton.next_power_of_2(columns))
    if arch.is_cpu:
        block = min(whole, 16_384)
        return [Config(size, 4) for size in (block, block // 2) if size >= 128]
    blocks = (2048, 1024, 4096, 512)
    return [Config(min(whole, block), warps) for block in blocks for warps in (8, 4)]


def permute_reference(x_TH: Tensor, permutation: Permutation) -> Tensor:
    """x[order // K]."""
    top_k = len(permutation.order) // max(1, len(x_TH))
    return x_TH.index_select(0, permutation.order // max(1, top_k))


def unpermute_reference(rows_SH: Tensor, permutation: Permutation, weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's rows, in the wider of float32 and the weights' dtype."""
    per_token = rows_SH.index_select(0, permutation.position).unflatten(0, weights_TK.shape)
    return (per_token * weights_TK.unsqueeze(-1)).sum(1).to(rows_SH.dtype)


@jit
def _permute_kernel(x_TH, position_TK, out_SH, H, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < H
    x = tl.load(x_TH + token * x_stride + at, mask=mask)
    for k in range(K):
        row = tl.load(position_TK + token * K + k).to(tl.int64)
        tl.store(out_SH + row * H + at, x, mask=mask)


@jit
def _unpermute_kernel(
    rows_SH, position_TK, weights_TK, out_TH, H, rows_stride,
    WEIGHTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < H
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        row = tl.load(position_TK + token * K + k).to(tl.int64)
        x = tl.load(rows_SH + row * rows_stride + at, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(weights_TK + token * K + k)
        total += x
    tl.store(out_TH + token * H + at, total.to(out_TH.dtype.element_ty), mask=mask)


@jit
def _unpermute_backward_kernel(
    grad_TH, rows_SH, position_TK, weights_TK, d_rows_SH, d_weights_TK, H,
    grad_stride, rows_stride, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token and one of its experts per program."""
    token, k = tl.program_id(1).to(tl.int64), tl.program_id(0)
    row = tl.load(position_TK + token * K + k).to(tl.int64)
    weight = tl.load(weights_TK + token * K + k)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < H
        grad = tl.load(grad_TH + token * grad_stride + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(rows_SH + row * rows_stride + at, mask=mask, other=0.0).to(tl.float32)
        total += grad * x
        d_row = (grad * weight).to(d_rows_SH.dtype.element_ty)
        tl.store(d_rows_SH + row * H + at, d_row, mask=mask)
    tl.store(d_weights_TK + token * K + k, tl.sum(total, 0))


def _permute(x: Tensor, position: Tensor) -> Tensor:
    flat = rows(x)
    (tokens, columns), slots = flat.shape, len(position)
    require(slots % tokens == 0 if tokens else not slots,
            f"{slots} slots are no whole number for each of {tokens} tokens")  # fmt: skip
    out = empty(slots, columns, like=x)
    config = pick("permute", configs, columns, x)
    if out.numel():
        with on(x):
            _permute_kernel[(tokens, cdiv(columns, config.block))](
                flat, position, out, columns, flat.stride(0), K=slots // tokens,
                BLOCK=config.block, num_warps=config.num_warps,
            )  # fmt: skip
    return out


def _unpermute(x: Tensor, position: Tensor, weights: Tensor | None, tokens: int) -> Tensor:
    flat, slots = rows(x), len(position)
    require(len(flat) == slots, f"{len(flat)} rows for {slots} slots")
    if weights is not None:
        require(weights.numel() == slots, f"{weights.numel()} weights for {slots} slots")
        require(weights.dtype == torch.float32, f"weights must be float32, got {weights.dtype}")
        weights = weights.contiguous()
    columns = flat.shape[1]
    out = empty(tokens, columns, like=x)
    config = pick("permute", configs, columns, x)
    if out.numel():
        with on(x):
            _unpermute_kernel[(tokens, cdiv(columns, config.block))](
                flat, position, x if weights is None else weights, out, columns, flat.stride(0),
                WEIGHTED=weights is not None, K=slots // tokens, BLOCK=config.block,
                num_warps=config.num_warps,
            )  # fmt: skip
    return out


def _unpermute_backward(
    grad: Tensor, x: Tensor, position: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    flat, grads, weights = rows(x), rows(grad), weights.contiguous()
    tokens, top_k = weights.shape
    columns = flat.shape[1]
    d_rows = empty(len(flat), columns, like=x)
    d_weights = empty(tokens, top_k, like=weights)
    config = pick("permute", configs, columns, x)
    if weights.numel():
        with on(x):
            _unpermute_backward_kernel[(top_k, tokens)](
                grads, flat, position, weights, d_rows, d_weights, columns,
                grads.stride(0), flat.stride(0), K=top_k,
                BLOCK=config.block, num_warps=config.num_warps,
            )  # fmt: skip
    return d_rows, d_weights


_sum_op = register(
    "unpermute_sum(Tensor rows, Tensor position, SymInt tokens) -> Tensor",
    lambda x, position, tokens: _unpermute(x, position, None, tokens),
    fake=lambda x, position, tokens: x.new_empty(tokens, x.shape[1]),
)
_backward_op = register(
    "unpermute_backward(Tensor grad, Tensor rows, Tensor position, Tensor weights)"
    " -> (Tensor, Tensor)",
    _unpermute_backward,
    fake=lambda grad, x, position, weights: (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape),
    ),
)


def _save_permute(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, position = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(position)


def _permute_gradient(ctx: Any, grad: Tensor) -> tuple:
    return _sum_op(grad, *ctx.saved_tensors, ctx.tokens), None


def _save_unpermute(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_gradient(ctx: Any, grad: Tensor) -> tuple:
    d_rows, d_weights = _backward_op(grad, *ctx.saved_tensors)
    return d_rows, None, d_weights


_permute_op = register(
    "permute(Tensor x, Tensor position) -> Tensor",
    _permute,
    fake=lambda x, position: x.new_empty(position.shape[0], x.shape[1]),
    setup_context=_save_permute,
    backward=_permute_gradient,
)
_unpermute_op = register(
    "unpermute(Tensor rows, Tensor position, Tensor weights) -> Tensor",
    lambda x, position, weights: _unpermute(x, position, weights, len(weights)),
    fake=lambda x, position, weights: x.new_empty(weights.shape[0], x.shape[1]),
    setup_context=_save_unpermute,
    backward=_unpermute_gradient,
)


def permute(x_TH: Tensor, permutation: Permutation) -> Tensor:
    """Rows grouped by expert, [T K, H] in the dtype of x; differentiable.

    Args:
        x_TH: [T, H] float32, bfloat16 or float16, any strides; float64 runs the reference.
        permutation: of T x K slots.

    Raises:
        ValueError: the slots are no whole number for each token.
    """
    if choose(x_TH) == "reference":
        return permute_reference(x_TH, permutation)
    return _permute_op(x_TH, permutation.position)


def unpermute(rows_SH: Tensor, permutation: Permutation, weights_TK: Tensor) -> Tensor:
    """Each token's weighted sum over its rows, [T, H] in the dtype of rows; differentiable.

    Args:
        rows_SH: [T K, H] float32, bfloat16 or float16, any strides; float64 runs the reference.
        permutation: what grouped them.
        weights_TK: [T, K] float32.

    Raises:
        ValueError: rows or weights do not fit the permutation's slots.
    """
    if choose(rows_SH) == "reference":
        return unpermute_reference(rows_SH, permutation, weights_TK)
    return _unpermute_op(rows_SH, permutation.position, weights_TK)
