"""Linear layer with block-scaled float8 weights: y = x (q * scale)^T; for inference.

    y[m, n] = sum over blocks of 128 k of (x block . q block) * x scale * scale

The sums are those of `fp8_tiles.py`. x is cast to float8 in the loads (few rows) or once before
(many rows, each of which many programs read), with the same bits; or it comes as float8.

Shape letters: M rows, N outputs, K inputs, G blocks of 128 inputs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .arch import Arch, arch_of
from .dispatch import choose
from .expert_tiles import Config, Problem
from .fp8_tiles import check_scales, form_of, has_fp8, product_fp8
from .fp8_tiles import configs as tall_configs
from .grouped_gemm_fp8 import parts, whole, widen_reference, widen_rows_reference
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .quantize import BLOCK, QuantizedRows, quantize_fp8, quantize_reference
from .tables import pick


def cast_in_loads(arch: Arch) -> int:
    """The most rows whose cast is repeated by every program: a GPU has arithmetic to spare."""
    return 0 if arch.is_cpu else 16


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates, the default first; for few rows many small programs."""
    found = tall_configs(problem, arch)
    if arch.is_cpu:
        return [replace(c, rows=min(128, problem.rows)) for c in found]
    if problem.rows > cast_in_loads(arch):
        return found
    return sorted(found, key=lambda c: (c.rows, abs(c.columns - 64), -c.num_stages, c.num_warps))


def linear_fp8_reference(
    x: Tensor | QuantizedRows, weight: Tensor, scales: Tensor,
    *, dtype: torch.dtype = torch.bfloat16, power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """The product of the widened operands, in float32 (float64 for float64)."""
    if isinstance(x, Tensor):
        dtype, x = x.dtype, quantize_reference(x, power_of_two=power_of_two)
    wide = torch.promote_types(dtype, torch.float32)
    y = widen_rows_reference(x, wide) @ widen_reference(weight, scales, wide).T
    return y.to(dtype)


@jit(do_not_specialize=["M"])
def _kernel(
    x_MK, x_scales_MG, w_NK, w_scales_NG, out_MN, M, N, K, x_stride, x_scale_stride, n_stride,
    k_stride, n_scale_stride, k_scale_stride, FORM: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = product_fp8(
        x_MK, x_scales_MG, w_NK, w_scales_NG, tl.minimum(m, M - 1), tl.minimum(n, N - 1), K,
        x_stride, x_scale_stride, n_stride, k_stride, n_scale_stride, k_scale_stride, FORM,
        POWER_OF_TWO, TRANSPOSED, BLOCK_M, BLOCK_N, WHOLE, 128 % BLOCK_N == 0)  # fmt: skip
    out = out_MN + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, total.to(out_MN.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _forward(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor, dtype: torch.dtype,
    power_of_two: bool,
) -> Tensor:  # fmt: skip
    require(weight.dim() == 2 and weight.shape[1] == x.shape[-1],
            f"weight must be [N, {x.shape[-1]}], got {list(weight.shape)}")  # fmt: skip
    check_scales(weight, scales)
    require((x.itemsize == 1) == (x_scales is not None), "float8 rows, and they alone, have scales")
    if not has_fp8(x):
        return linear_fp8_reference(whole(x, x_scales), weight, scales, dtype=dtype,
                                    power_of_two=power_of_two)  # fmt: skip
    if x_scales is None and x.numel() > cast_in_loads(arch_of(x.device)) * x.shape[-1]:
        cast = quantize_fp8(x, power_of_two=power_of_two)
        x, x_scales = cast.values, cast.scales
    flat, (columns, depth) = rows(x), weight.shape
    weight = weight if 1 in weight.stride() else weight.contiguous()
    flat_scales = flat if x_scales is None else rows(x_scales)
    count = len(flat)
    out = empty(count, columns, like=x, dtype=dtype)
    mean = triton.next_power_of_2(max(1, count))
    config: Config = pick("linear_fp8", configs, Problem(mean, columns, depth, 1), x.device)
    if out.numel():
        grid = cdiv(columns, config.columns), cdiv(count, config.rows)
        with on(x):
            _kernel[grid](
                flat, flat_scales, weight, scales, out, count, columns, depth, flat.stride(0),
                flat_scales.stride(0), *weight.stride(), *scales.stride(),
                FORM=form_of("quantize" if x_scales is None else "scaled", x),
                POWER_OF_TWO=power_of_two, TRANSPOSED=weight.stride(1) == 1,
                WHOLE=depth % BLOCK == 0,
                BLOCK_M=config.rows, BLOCK_N=config.columns,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return out.view(*x.shape[:-1], columns)


_linear = register(
    "linear_fp8(Tensor x, Tensor? x_scales, Tensor weight, Tensor scales, ScalarType dtype, "
    "bool power_of_two) -> Tensor",
    _forward,
    fake=lambda x, x_scales, weight, scales, dtype, power_of_two: x.new_empty(
        *x.shape[:-1], weight.shape[0], dtype=dtype
    ),
)


@torch.no_grad()
def linear_fp8(
    x: Tensor | QuantizedRows, weight: Tensor, scales: Tensor,
    *, dtype: torch.dtype = torch.bfloat16, power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """Rows times transposed float8 weights; not differentiable.

    Args:
        x: [..., K] float8 with 1 x 128 scales, or bfloat16, float16 or float32, which is cast to
            such (`quantize_fp8`).
        weight: float8_e4m3fn [N, K], any strides; without a copy if N or K is dense.
        scales: float32 [ceil(N / 128), ceil(K / 128)], any strides.
        dtype: of the result for float8 rows; else it is that of x.
        power_of_two: whether the scales that x is cast with are powers of two.

    Returns:
        [..., N].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    values, x_scales = parts(x)
    dtype = dtype if x_scales is not None else values.dtype
    if choose(scales if x_scales is not None else values) == "reference":
        return linear_fp8_reference(x, weight, scales, dtype=dtype, power_of_two=power_of_two)
    return _linear(values, x_scales, weight, scales, dtype, power_of_two)
