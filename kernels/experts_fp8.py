"""All routed experts of a layer with block-scaled float8 weights; for inference.

The three steps of `experts.py` on the sums of `fp8_tiles.py`. If x is float8, h is cast to float8
in 1 x 128 blocks before it leaves the first product; if x is wider, h keeps its dtype.

Shape letters: T tokens, K experts per token, M = T K sorted rows, E experts, H hidden, D width,
N = 2 D, G blocks of 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose
from .expert_tiles import dense, find_tile, plan, source_rows
from .experts import moe_experts_reference
from .fp8_tiles import form_of, gated_configs, has_fp8, product_fp8
from .grouped_gemm import grouped_gemm_reference, sum_choices
from .grouped_gemm_fp8 import (
    check_rows,
    multiply_fp8,
    parts,
    whole,
    widen_reference,
    widen_rows_reference,
)
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .quantize import BLOCK, QuantizedRows, quantize_reference, quantize_rows
from .swiglu import activated, swiglu_reference


def moe_experts_fp8_reference(
    x: Tensor | QuantizedRows, gate_up: QuantizedRows, down: QuantizedRows, weights: Tensor,
    offsets: Tensor, order: Tensor,
    *, limit: float = 0.0, dtype: torch.dtype = torch.bfloat16, power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """Widened operands, expert by expert; h is cast to float8 and back if x is float8."""
    if isinstance(x, Tensor):
        wide = (widen_reference(w.values, w.scales, x.dtype) for w in (gate_up, down))
        return moe_experts_reference(x, *wide, weights, offsets, order, limit=limit)
    first, second = (widen_reference(w.values, w.scales, dtype) for w in (gate_up, down))
    wide_x = widen_rows_reference(x, dtype)
    z = grouped_gemm_reference(wide_x, first, offsets, order=order, top_k=weights.shape[1])
    h = quantize_reference(swiglu_reference(z, limit=limit), power_of_two=power_of_two)
    y = grouped_gemm_reference(widen_rows_reference(h, dtype), second, offsets)
    by_token = y.index_select(0, order.argsort()).unflatten(0, weights.shape)
    return (by_token * weights.unsqueeze(-1)).sum(1).to(dtype)


@triton.jit
def _gated_tile(
    x_TH, x_scales_TG, w_NH, w_scales_NG, z_MN, h_MD, h_scales_MG, order_M, row, end, column, D,
    H, top_k, x_stride, x_scale_stride, n_stride, k_stride, n_scale_stride, k_scale_stride, limit,
    FORM: tl.constexpr, KEEP: tl.constexpr, CLAMP: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    if BLOCK_M > LEAST_M and end - row <= BLOCK_M // 2:
        _gated_tile(x_TH, x_scales_TG, w_NH, w_scales_NG, z_MN, h_MD, h_scales_MG, order_M, row,
                    end, column, D, H, top_k, x_stride, x_scale_stride, n_stride, k_stride,
                    n_scale_stride, k_scale_stride, limit, FORM, KEEP, CLAMP, POWER_OF_TWO,
                    TRANSPOSED, WHOLE, BLOCK_M // 2 if BLOCK_M > LEAST_M else LEAST_M, LEAST_M,
                    BLOCK_N, DTYPE)  # fmt: skip
    else:
        m, source = source_rows(order_M, row, end, top_k, True, BLOCK_M)
        pair = column + tl.arange(0, BLOCK_N)
        n = tl.minimum(pair // 2, D - 1) + pair % 2 * D
        total = product_fp8(
            x_TH, x_scales_TG, w_NH, w_scales_NG, source, n, H, x_stride, x_scale_stride, n_stride,
            k_stride, n_scale_stride, k_scale_stride, FORM, False, TRANSPOSED, BLOCK_M,
            BLOCK_N, WHOLE, False)  # fmt: skip
        gate, up = tl.split(tl.reshape(total, [BLOCK_M, BLOCK_N // 2, 2]).to(DTYPE))
        i = (column // 2 + tl.arange(0, BLOCK_N // 2))[None, :]
        rows = (row + tl.arange(0, BLOCK_M) < end)[:, None]
        h = activated(gate, up, limit, CLAMP)
        at = m.to(tl.int64)[:, None]
        if KEEP:
            tl.store(z_MN + 2 * at * D + i, gate, mask=rows & (i < D))
            tl.store(z_MN + 2 * at * D + D + i, up, mask=rows & (i < D))
        if FORM != "wide":
            # columns past the width repeat the last one, which the block's scale has seen already
            h, scales = quantize_rows(h.to(tl.float32), BLOCK_M, BLOCK_N // 2, POWER_OF_TWO)
            group = (column // 256 + tl.arange(0, BLOCK_N // 256))[None, :]
            count = tl.cdiv(D, 128)
            tl.store(h_scales_MG + at * count + group, scales, mask=rows & (group < count))
        tl.store(h_MD + at * D + i, h, mask=rows & (i < D))


@jit(do_not_specialize=["E", "top_k"])
def _gated_kernel(
    x_TH, x_scales_TG, w_ENH, w_scales_ENG, z_MN, h_MD, h_scales_MG, order_M, offsets_E, D, H, E,
    top_k, x_stride, x_scale_stride, e_stride, n_stride, k_stride, e_scale_stride, n_scale_stride,
    k_scale_stride, limit, FORM: tl.constexpr, KEEP: tl.constexpr, CLAMP: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, EXPERTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_K == 128 and BLOCK_N % 256 == 0)
    expert, row, end, column = find_tile(offsets_E, 2 * D, E, BLOCK_M, BLOCK_N, GROUP, EXPERTS)
    if row < end:
        _gated_tile(x_TH, x_scales_TG, w_ENH + expert * e_stride,
                    w_scales_ENG + expert * e_scale_stride, z_MN, h_MD, h_scales_MG, order_M, row,
                    end, column, D, H, top_k, x_stride, x_scale_stride, n_stride, k_stride,
                    n_scale_stride, k_scale_stride, limit, FORM, KEEP, CLAMP, POWER_OF_TWO,
                    TRANSPOSED, WHOLE, BLOCK_M, LEAST_M, BLOCK_N, DTYPE)  # fmt: skip


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def gated(
    x: Tensor, x_scales: Tensor | None, gate_up: Tensor, scales: Tensor, offsets: Tensor,
    order: Tensor, top_k: int, epilogue: tuple[float, torch.dtype, bool], *, keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """h, its scales if x has some, and z if it is to be kept."""
    check_rows(x, x_scales, gate_up, scales)
    limit, dtype, power_of_two = epilogue
    experts, width, hidden = gate_up.shape
    x, gate_up, count, width = rows(x), dense(gate_up), len(order), width // 2
    scaled = x_scales is not None
    x_rows = x if x_scales is None else rows(x_scales)
    h = empty(count, width, like=x, dtype=x.dtype if scaled else dtype)
    h_scales = empty(count, cdiv(width, BLOCK), like=x, dtype=torch.float32)
    z = empty(count if keep else 0, 2 * width, like=x, dtype=dtype)
    if h.numel():
        planned = plan("grouped_gemm_fp8_gated", count, gate_up, gated_configs)
        with on(x):
            _gated_kernel[planned.grid](
                x, x_rows, gate_up, scales, z, h, h_scales, order, offsets, width, hidden, experts,
                top_k, x.stride(0), x_rows.stride(0), *gate_up.stride(), *scales.stride(),
                float(limit), FORM=form_of("scaled" if scaled else "wide", x), KEEP=keep,
                CLAMP=limit > 0, POWER_OF_TWO=power_of_two, DTYPE=_DTYPES[dtype],
                **planned.constants,
            )  # fmt: skip
    return h, h_scales if scaled else None, z


def _forward(
    x: Tensor, x_scales: Tensor | None, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor, weights: Tensor, offsets: Tensor, order: Tensor,
    limit: float, dtype: torch.dtype, power_of_two: bool,
) -> Tensor:  # fmt: skip
    experts, width, hidden = gate_up.shape
    require(down.shape == (experts, hidden, width // 2),
            f"down must be {[experts, hidden, width // 2]}, got {list(down.shape)}")  # fmt: skip
    require(weights.dim() == 2 and len(weights) == len(x) and weights.numel() == len(order),
            f"weights must be [T, K] for {len(x)} tokens and {len(order)} rows, got "
            f"{list(weights.shape)}")  # fmt: skip
    if not has_fp8(x):
        pairs = QuantizedRows(gate_up, gate_up_scales), QuantizedRows(down, down_scales)
        return moe_experts_fp8_reference(
            whole(x, x_scales), *pairs, weights, offsets, order, limit=limit, dtype=dtype,
            power_of_two=power_of_two)  # fmt: skip
    top_k = weights.shape[1]
    h, h_scales, _ = gated(x, x_scales, gate_up, gate_up_scales, offsets, order, top_k,
                            (limit, dtype, power_of_two))  # fmt: skip
    y = multiply_fp8(h, h_scales, down, down_scales, offsets, order, top_k, True, dtype)
    return sum_choices(y, top_k, weights)


_experts = register(
    "moe_experts_fp8(Tensor x, Tensor? x_scales, Tensor gate_up, Tensor gate_up_scales, "
    "Tensor down, Tensor down_scales, Tensor weights, Tensor offsets, Tensor order, float limit, "
    "ScalarType dtype, bool power_of_two) -> Tensor",
    _forward,
    fake=lambda x, *rest: x.new_empty(x.shape, dtype=rest[9]),
)


@torch.no_grad()
def moe_experts_fp8(
    x: Tensor | QuantizedRows, gate_up: QuantizedRows, down: QuantizedRows, weights: Tensor,
    offsets: Tensor, order: Tensor,
    *, limit: float = 0.0, dtype: torch.dtype = torch.bfloat16, power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """`moe_experts` with float8 weights and 128 x 128 scales; not differentiable.

    Args:
        x: [T, H] bfloat16, float16 or float32, or float8 with 1 x 128 scales.
        gate_up: float8_e4m3fn [E, 2D, H] and scales [E, ceil(2D / 128), ceil(H / 128)] float32.
        down: float8_e4m3fn [E, H, D] and scales.
        weights, offsets, order, limit: as for `moe_experts`.
        dtype: of the result for float8 rows; else it is that of x.
        power_of_two: whether the scales of the inner activations are powers of two.

    Returns:
        [T, H].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    values, x_scales = parts(x)
    dtype = dtype if x_scales is not None else values.dtype
    if choose(weights if x_scales is not None else values) == "reference":
        return moe_experts_fp8_reference(x, gate_up, down, weights, offsets, order, limit=limit,
                                         dtype=dtype, power_of_two=power_of_two)  # fmt: skip
    return _experts(values, x_scales, gate_up.values, gate_up.scales, down.values, down.scales,
                    weights, offsets, order, limit, dtype, power_of_two)  # fmt: skip
