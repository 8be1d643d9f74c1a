"""Grouped matrix product of sorted rows with their experts' weights; forward and backward.

    y[m] = x[m] W[e]^T                 for offsets[e] <= m < offsets[e + 1]
    y[m] = x[order[m] // top_k] W[e]^T with `order`: the gather happens in the loads

Gradients: dx[m] = dy[m] W[e] is the same kernel on transposed weights, and with `order` each token
gets the sum of its rows, in the order of its choices; dW[e] = dy_e^T x_e sums over an expert's rows
and is zero for an expert without rows. Sums are kept in float32.

Method: `expert_tiles.py`; fusing the gather into the loads: SonicMoE (arXiv 2512.14080).

Shape letters: T tokens, M sorted rows, E experts, N outputs, K inputs of the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import choose
from .expert_tiles import dense, find_tile, plan, product, source_rows
from .expert_weights import weight_gradient
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows


def grouped_gemm_reference(
    x: Tensor, weight: Tensor, offsets: Tensor, *, order: Tensor | None = None, top_k: int = 1
) -> Tensor:
    """Expert by expert, in the dtype of x."""
    if order is not None:
        x = x.index_select(0, order // top_k)
    counts = offsets.diff().tolist()
    return torch.cat([g @ w.T for g, w in zip(x.split(counts), weight, strict=True)])


@triton.jit
def _product_tile(
    x_MK, w_NK, out_MN, order_M, row, end, column, N, K, top_k, x_stride, n_stride, k_stride,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of at most BLOCK_M rows; halved while its rows fit the half."""
    if BLOCK_M > LEAST_M and end - row <= BLOCK_M // 2:
        _product_tile(
            x_MK,
            w_NK,
            out_MN,
            order_M,
            row,
            end,
            column,
            N,
            K,
            top_k,
            x_stride,
            n_stride,
            k_stride,
            GATHER,
            SCATTER,
            TRANSPOSED,
            WHOLE,
            BLOCK_M // 2 if BLOCK_M > LEAST_M else LEAST_M,
            LEAST_M,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        m, source = source_rows(order_M, row, end, top_k, GATHER, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        # a clamp would hide that neighbours are neighbours, and cost the wide loads
        read = n if WHOLE else tl.minimum(n, N - 1)
        total = product(x_MK, w_NK, source, read, K, x_stride, n_stride, k_stride, TRANSPOSED,
                        BLOCK_M, BLOCK_N, BLOCK_K, WHOLE)  # fmt: skip
        target = tl.load(order_M + m) if SCATTER else m
        live = (row + tl.arange(0, BLOCK_M) < end)[:, None] & (n < N)[None, :]
        out = out_MN + target.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out, total.to(out_MN.dtype.element_ty), mask=live)


@jit(do_not_specialize=["E", "top_k"])
def _product_kernel(
    x_MK, w_ENK, out_MN, order_M, offsets_E, N, K, E, top_k, x_stride, e_stride, n_stride, k_stride,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    expert, row, end, column = find_tile(offsets_E, N, E, BLOCK_M, BLOCK_N, GROUP, EXPERTS)
    if row < end:
        _product_tile(x_MK, w_ENK + expert * e_stride, out_MN, order_M, row, end, column, N, K,
                      top_k, x_stride, n_stride, k_stride, GATHER, SCATTER, TRANSPOSED, WHOLE,
                      BLOCK_M, LEAST_M, BLOCK_N, BLOCK_K)  # fmt: skip


@jit
def _sum_kernel(y_TKN, weights_TK, out_TN, N, K: tl.constexpr, WEIGHTED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Sum over a token's K rows, in their order."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        y = tl.load(y_TKN + (token * K + k) * N + n, mask=n < N, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_TK + token * K + k)
        total += y
    tl.store(out_TN + token * N + n, total.to(out_TN.dtype.element_ty), mask=n < N)


def multiply(
    x: Tensor, weight: Tensor, offsets: Tensor, order: Tensor | None, top_k: int,
    *, scatter: bool = False,
) -> Tensor:  # fmt: skip
    """x W[e]^T; `order` says where rows are read, or with `scatter` where they are written."""
    experts, columns, depth = weight.shape
    x, weight = rows(x), dense(weight)
    count = len(x) if order is None else len(order)
    out = empty(count, columns, like=x)
    if count and columns:
        planned = plan("grouped_gemm", count, weight)
        with on(x):
            _product_kernel[planned.grid](
                x, weight, out, offsets if order is None else order, offsets,
                columns, depth, experts, top_k, x.stride(0), *weight.stride(),
                GATHER=order is not None and not scatter, SCATTER=scatter, **planned.constants,
            )  # fmt: skip
    return out


def sum_choices(y: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    """[T * top_k, N] to [T, N]: each token's rows, weighted by weights [T, top_k], summed."""
    columns = y.shape[1]
    tokens = len(y) // top_k
    out = empty(tokens, columns, like=y)
    is_cpu = y.device.type == "cpu"
    block = min(16_384 if is_cpu else 1024, triton.next_power_of_2(max(16, columns)))
    if out.numel():
        with on(y):
            _sum_kernel[(tokens, cdiv(columns, block))](
                y, y if weights is None else weights.contiguous(), out, columns,
                K=top_k, WEIGHTED=weights is not None, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return out


def check_groups(x: Tensor, weight: Tensor, offsets: Tensor, order: Tensor | None) -> None:
    """Raises ValueError unless shapes and dtypes of sorted rows and weights fit."""
    require(x.dim() == 2 and weight.dim() == 3 and weight.shape[2] == x.shape[1],
            f"weight must be [E, N, {x.shape[-1]}] for x {list(x.shape)}, got "
            f"{list(weight.shape)}")  # fmt: skip
    require(weight.dtype == x.dtype, f"weight must be {x.dtype} as x is, got {weight.dtype}")
    require(offsets.shape == (len(weight) + 1,) and offsets.dtype == torch.int32,
            f"offsets must be int32 [{len(weight) + 1}], got {offsets.dtype} "
            f"{list(offsets.shape)}")  # fmt: skip
    require(order is None or (order.dim() == 1 and order.dtype == torch.int32),
            "order must be int32 [M]")  # fmt: skip


def _forward(
    x: Tensor, weight: Tensor, offsets: Tensor, order: Tensor | None, top_k: int
) -> Tensor:
    check_groups(x, weight, offsets, order)
    return multiply(x, weight, offsets, order, top_k)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, order: Tensor | None, top_k: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and weight; the one that is not wanted is empty."""
    d_x, d_weight = empty(0, like=x), empty(0, like=weight)
    if wanted[0]:
        d_x = multiply(grad, weight.transpose(1, 2), offsets, order, top_k,
                       scatter=order is not None)  # fmt: skip
        d_x = d_x if order is None else sum_choices(d_x, top_k)
    if wanted[1]:
        d_weight = weight_gradient(grad, x, weight, offsets, order=order, top_k=top_k)
    return d_x, d_weight


_grouped_backward = register(
    "grouped_gemm_backward(Tensor grad, Tensor x, Tensor weight, Tensor offsets, Tensor? order, "
    "int top_k, bool[2] wanted) -> (Tensor, Tensor)",
    _backward,
    fake=lambda grad, x, weight, offsets, order, top_k, wanted: (
        x.new_empty(x.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
    ),
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.top_k = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    wanted = list(ctx.needs_input_grad[:2])
    found = _grouped_backward(grad, *ctx.saved_tensors, ctx.top_k, wanted)
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), None, None, None


_grouped = register(
    "grouped_gemm(Tensor x, Tensor weight, Tensor offsets, Tensor? order, int top_k) -> Tensor",
    _forward,
    fake=lambda x, weight, offsets, order, top_k: x.new_empty(
        (x if order is None else order).shape[0], weight.shape[1]
    ),
    setup_context=_save,
    backward=_gradient,
)


def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, *, order: Tensor | None = None, top_k: int = 1
) -> Tensor:
    """Rows times the transposed weights of their expert; differentiable in x and weight.

    Args:
        x: [M, K] rows sorted by expert, float32, bfloat16 or float16; float64 runs the reference.
        weight: [E, N, K] in the dtype of x, any strides; without a copy if N or K is dense.
        offsets: int32 [E + 1] with offsets[0] = 0 and offsets[E] = M: expert e's rows.
        order: int32 [M], a permutation of the M = T * top_k slots: x is then [T, K], and sorted row
            m is x[order[m] // top_k], read where it lies.
        top_k: rows per token in `order`.

    Returns:
        [M, N] in the dtype of x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if choose(x) == "reference":
        return grouped_gemm_reference(x, weight, offsets, order=order, top_k=top_k)
    return _grouped(x, weight, offsets, order, top_k)
