"""Grouped matrix product with block-scaled float8 weights (`grouped_gemm.py`, `fp8_tiles.py`).

    y[m] = x[m] (q[e] * scale)^T       rows of x may be gathered, rows of y scattered

x is float8 with 1 x 128 scales, or wider: then the weights are widened in the kernel and x keeps
its precision. The gradient of x is the same product with transposed views of q and scale.

Shape letters: M sorted rows, E experts, N outputs, K inputs, G blocks of 128 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose
from .expert_tiles import dense, find_tile, plan, source_rows
from .fp8_tiles import check_scales, configs, form_of, has_fp8, product_fp8
from .grouped_gemm import grouped_gemm_reference
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .quantize import BLOCK, QuantizedRows


def widen_reference(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [..., N, K] from float8 and 128 x 128 scales, rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    full = scales.to(wide).repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return (values.to(wide) * full[..., : values.shape[-2], : values.shape[-1]]).to(dtype)


def widen_rows_reference(x: QuantizedRows, dtype: torch.dtype) -> Tensor:
    """Rows [..., K] from float8 and 1 x 128 scales, rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    full = x.scales.to(wide).repeat_interleave(BLOCK, -1)[..., : x.values.shape[-1]]
    return (x.values.to(wide) * full).to(dtype)


def grouped_gemm_fp8_reference(
    x: Tensor | QuantizedRows, weight: Tensor, scales: Tensor, offsets: Tensor,
    *, order: Tensor | None = None, top_k: int = 1, dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """The product of the widened operands, expert by expert."""
    wide = x if isinstance(x, Tensor) else widen_rows_reference(x, dtype)
    return grouped_gemm_reference(
        wide, widen_reference(weight, scales, wide.dtype), offsets, order=order, top_k=top_k
    )


@triton.jit
def _tile(
    x_MK, x_scales_MG, w_NK, w_scales_NG, out_MN, order_M, row, end, column, N, K, top_k, x_stride,
    x_scale_stride, n_stride, k_stride, n_scale_stride, k_scale_stride,
    FORM: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    if BLOCK_M > LEAST_M and end - row <= BLOCK_M // 2:
        _tile(x_MK, x_scales_MG, w_NK, w_scales_NG, out_MN, order_M, row, end, column, N, K, top_k,
              x_stride, x_scale_stride, n_stride, k_stride, n_scale_stride, k_scale_stride, FORM,
              GATHER, SCATTER, TRANSPOSED, WHOLE,
              BLOCK_M // 2 if BLOCK_M > LEAST_M else LEAST_M, LEAST_M, BLOCK_N)  # fmt: skip
    else:
        m, source = source_rows(order_M, row, end, top_k, GATHER, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        total = product_fp8(
            x_MK, x_scales_MG, w_NK, w_scales_NG, source, tl.minimum(n, N - 1), K, x_stride,
            x_scale_stride, n_stride, k_stride, n_scale_stride, k_scale_stride, FORM, False,
            TRANSPOSED, BLOCK_M, BLOCK_N, WHOLE, 128 % BLOCK_N == 0)  # fmt: skip
        target = tl.load(order_M + m) if SCATTER else m
        live = (row + tl.arange(0, BLOCK_M) < end)[:, None] & (n < N)[None, :]
        out = out_MN + target.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out, total.to(out_MN.dtype.element_ty), mask=live)


@jit(do_not_specialize=["E", "top_k"])
def _kernel(
    x_MK, x_scales_MG, w_ENK, w_scales_ENG, out_MN, order_M, offsets_E, N, K, E, top_k, x_stride,
    x_scale_stride, e_stride, n_stride, k_stride, e_scale_stride, n_scale_stride, k_scale_stride,
    FORM: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_K == 128)
    expert, row, end, column = find_tile(offsets_E, N, E, BLOCK_M, BLOCK_N, GROUP, EXPERTS)
    if row < end:
        _tile(x_MK, x_scales_MG, w_ENK + expert * e_stride, w_scales_ENG + expert * e_scale_stride,
              out_MN, order_M, row, end, column, N, K, top_k, x_stride, x_scale_stride, n_stride,
              k_stride, n_scale_stride, k_scale_stride, FORM, GATHER, SCATTER, TRANSPOSED,
              WHOLE, BLOCK_M, LEAST_M, BLOCK_N)  # fmt: skip


def multiply_fp8(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor, offsets: Tensor,
    order: Tensor | None, top_k: int, scatter: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x W[e]^T; `order` says where rows are read, or with `scatter` where they are written."""
    check_rows(x, x_scales, weight, scales)
    experts, columns, depth = weight.shape
    x, weight = rows(x), dense(weight)
    x_scales = x if x_scales is None else rows(x_scales)
    count = len(x) if order is None else len(order)
    out = empty(count, columns, like=x, dtype=dtype)
    if count and columns:
        planned = plan("grouped_gemm_fp8", count, weight, configs)
        with on(x):
            _kernel[planned.grid](
                x, x_scales, weight, scales, out, offsets if order is None else order, offsets,
                columns, depth, experts, top_k, x.stride(0), x_scales.stride(0),
                *weight.stride(), *scales.stride(),
                FORM=form_of("scaled" if x.itemsize == 1 else "wide", x),
                GATHER=order is not None and not scatter, SCATTER=scatter, **planned.constants,
            )  # fmt: skip
    return out


def check_rows(x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor) -> None:
    """Raises ValueError unless shapes and dtypes of rows, weights and their scales fit."""
    require(x.dim() == 2 and weight.dim() == 3 and weight.shape[2] == x.shape[1],
            f"weight must be [E, N, {x.shape[-1]}] for x {list(x.shape)}, got "
            f"{list(weight.shape)}")  # fmt: skip
    check_scales(weight, scales)
    groups = [len(x), cdiv(x.shape[1], BLOCK)]
    require((x.itemsize == 1) == (x_scales is not None), "float8 rows, and they alone, have scales")
    require(x_scales is None or list(x_scales.shape) == groups,
            f"x's scales must be {groups}")  # fmt: skip


def _forward(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor, offsets: Tensor,
    order: Tensor | None, top_k: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_rows(x, x_scales, weight, scales)
    if has_fp8(x):
        return multiply_fp8(x, x_scales, weight, scales, offsets, order, top_k, False, dtype)
    return grouped_gemm_fp8_reference(whole(x, x_scales), weight, scales, offsets, order=order,
                                      top_k=top_k, dtype=dtype)  # fmt: skip


_grouped = register(
    "grouped_gemm_fp8(Tensor x, Tensor? x_scales, Tensor weight, Tensor scales, Tensor offsets, "
    "Tensor? order, int top_k, ScalarType dtype) -> Tensor",
    _forward,
    fake=lambda x, x_scales, weight, scales, offsets, order, top_k, dtype: x.new_empty(
        (x if order is None else order).shape[0], weight.shape[1], dtype=dtype
    ),
)


def parts(x: Tensor | QuantizedRows) -> tuple[Tensor, Tensor | None]:
    """Values, and scales where there are some."""
    return (x, None) if isinstance(x, Tensor) else (x.values, x.scales)


def whole(x: Tensor, x_scales: Tensor | None) -> Tensor | QuantizedRows:
    """The opposite of `parts`."""
    return x if x_scales is None else QuantizedRows(x, x_scales)


@torch.no_grad()
def grouped_gemm_fp8(
    x: Tensor | QuantizedRows, weight: Tensor, scales: Tensor, offsets: Tensor,
    *, order: Tensor | None = None, top_k: int = 1, dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Rows times the transposed float8 weights of their expert; not differentiable.

    Args:
        x: [M, K] rows sorted by expert, or [T, K] with `order`, as for `grouped_gemm`: float8 with
            1 x 128 scales (`QuantizedRows`), or bfloat16, float16 or float32 as they are.
        weight: float8_e4m3fn [E, N, K], any strides; without a copy if N or K is dense.
        scales: float32 [E, ceil(N / 128), ceil(K / 128)], any strides.
        offsets, order, top_k: as for `grouped_gemm`.
        dtype: of the result for float8 rows; else it is that of x.

    Returns:
        [M, N].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    values, x_scales = parts(x)
    dtype = dtype if x_scales is not None else values.dtype
    if choose(scales if x_scales is not None else values) == "reference":
        return grouped_gemm_fp8_reference(
            x, weight, scales, offsets, order=order, top_k=top_k, dtype=dtype
        )
    return _grouped(values, x_scales, weight, scales, offsets, order, top_k, dtype)
