"""All routed experts of a layer with every product in float8; forward and backward.

The steps of `experts.py`. What is multiplied is cast to float8 first, along the summed dimension:

    z = x gate_up^T, y = h down^T           x, h in blocks of 1 x 128, weights in 128 x 128
    dh = dout down, dx = dz gate_up         dout, dz in 1 x 128, weights in 128 x 128
    dgate_up = dz^T x, ddown = dout^T w h   all in 1 x 128 along an expert's rows

Weights and gradients are in the dtype of x, and so is what is kept: x and z. A block of weights has
one scale whichever way it lies, so forward and backward multiply with the same numbers. Sums over
blocks are float32. Recipe: DeepSeek-V3 (arXiv 2412.19437, section 3.3).

Shape letters: T tokens, K experts per token, M = T K sorted rows, E experts, H hidden, D width,
N = 2 D, G blocks of 128.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .expert_tiles import Config, Problem, dense, find_tile, plan, source_rows
from .expert_weights_fp8 import weight_gradient, weight_gradient_fp8_reference
from .experts import check_experts, store_gated_gradient
from .experts_fp8 import gated, moe_experts_fp8_reference
from .fp8_tiles import configs, form_of, has_fp8, product_fp8
from .grouped_gemm import sum_choices
from .grouped_gemm_fp8 import grouped_gemm_fp8_reference, multiply_fp8
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, rows
from .quantize import QuantizedRows, quantize_fp8, quantize_reference
from .quantize_groups import quantize_groups, quantize_groups_reference
from .quantize_tiles import quantize_blocks_reference, quantize_fp8_blocks
from .swiglu import swiglu_reference


def heavy_configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates for a kernel that holds other tiles beside two of sums."""
    found = configs(problem, arch)
    if arch.is_cpu:
        return found
    return [c for c in found if c.rows * c.columns <= 16 * c.num_warps * arch.warp_size]


def forward_reference(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, order: Tensor,
    limit: float, power_of_two: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and z."""
    two = {"power_of_two": power_of_two}
    cast = quantize_reference(x, **two)
    first, second = (quantize_blocks_reference(w, **two) for w in (gate_up, down))
    z = grouped_gemm_fp8_reference(cast, first.values, first.scales, offsets, order=order,
                                   top_k=weights.shape[1], dtype=x.dtype)  # fmt: skip
    pair = (QuantizedRows(w.values, w.scales) for w in (first, second))
    out = moe_experts_fp8_reference(cast, *pair, weights, offsets, order, limit=limit,
                                    dtype=x.dtype, **two)  # fmt: skip
    return out, z


def backward_reference(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor,
    order: Tensor, z: Tensor, limit: float, power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate_up, down and weights."""
    two, top_k, wide = {"power_of_two": power_of_two}, weights.shape[1], _wide(x.dtype)
    first, second = (quantize_blocks_reference(w.mT, **two) for w in (gate_up, down))
    dh = grouped_gemm_fp8_reference(quantize_reference(grad, **two), second.values, second.scales,
                                    offsets, order=order, top_k=top_k, dtype=wide)  # fmt: skip
    weight = weights.flatten()[order].unsqueeze(1)
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        h = swiglu_reference(leaf, limit=limit)
    (dz,) = torch.autograd.grad(h, leaf, (dh * weight).to(h.dtype))
    by_row = grouped_gemm_fp8_reference(quantize_reference(dz, **two), first.values, first.scales,
                                        offsets, dtype=x.dtype)  # fmt: skip
    back = order.argsort()
    d_x = by_row.index_select(0, back).unflatten(0, weights.shape).sum(1).to(x.dtype)
    d_weights = (dh * h.detach()).sum(1).index_select(0, back).to(weights.dtype)
    slots = {"order": order, "top_k": top_k, **two}
    d_gate_up = weight_gradient_fp8_reference(
        quantize_groups_reference(dz, offsets, **two),
        quantize_groups_reference(x, offsets, **slots), offsets, dtype=x.dtype)  # fmt: skip
    d_down = weight_gradient_fp8_reference(
        quantize_groups_reference(grad, offsets, **slots),
        quantize_groups_reference((h.detach() * weight).to(h.dtype), offsets, **two), offsets,
        dtype=x.dtype)  # fmt: skip
    return d_x, d_gate_up, d_down, d_weights.view(weights.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, z = forward_reference(*inputs)
        *tensors, ctx.limit, ctx.power_of_two = inputs
        ctx.save_for_backward(*tensors, z)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        found = backward_reference(*grads, *ctx.saved_tensors, ctx.limit, ctx.power_of_two)
        return *found, None, None, None, None


def moe_experts_fp8_training_reference(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, order: Tensor,
    *, limit: float = 0.0, power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """Expert by expert on cast and widened operands; differentiable, with the same casts."""
    found = _Reference.apply(x, gate_up, down, weights, offsets, order, limit, power_of_two)
    assert isinstance(found, Tensor)
    return found


@triton.jit
def _gated_backward_tile(
    grad_TH, grad_scales_TG, w_DH, w_scales_DG, z_MN, dz_MN, scaled_MD, weights_M, partial_PM,
    order_M, row, end, column, M, D, H, top_k, x_stride, x_scale_stride, n_stride, k_stride,
    n_scale_stride, k_scale_stride, limit, FORM: tl.constexpr, CLAMP: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    if BLOCK_M > LEAST_M and end - row <= BLOCK_M // 2:
        _gated_backward_tile(
            grad_TH, grad_scales_TG, w_DH, w_scales_DG, z_MN, dz_MN, scaled_MD, weights_M,
            partial_PM, order_M, row, end, column, M, D, H, top_k, x_stride, x_scale_stride,
            n_stride, k_stride, n_scale_stride, k_scale_stride, limit, FORM, CLAMP, TRANSPOSED,
            WHOLE, BLOCK_M // 2 if BLOCK_M > LEAST_M else LEAST_M, LEAST_M, BLOCK_N)  # fmt: skip
    else:
        m, source = source_rows(order_M, row, end, top_k, True, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        total = product_fp8(
            grad_TH, grad_scales_TG, w_DH, w_scales_DG, source, tl.minimum(n, D - 1), H, x_stride,
            x_scale_stride, n_stride, k_stride, n_scale_stride, k_scale_stride, FORM, False,
            TRANSPOSED, BLOCK_M, BLOCK_N, WHOLE, 128 % BLOCK_N == 0)  # fmt: skip
        store_gated_gradient(total, z_MN, dz_MN, scaled_MD, weights_M, partial_PM, order_M, m,
                             row + tl.arange(0, BLOCK_M) < end, column, M, D, limit, CLAMP,
                             BLOCK_N)  # fmt: skip


@jit(do_not_specialize=["M", "E", "top_k"])
def _gated_backward_kernel(
    grad_TH, grad_scales_TG, w_EDH, w_scales_EDG, z_MN, dz_MN, scaled_MD, weights_M, partial_PM,
    order_M, offsets_E, M, D, H, E, top_k, x_stride, x_scale_stride, e_stride, n_stride, k_stride,
    e_scale_stride, n_scale_stride, k_scale_stride, limit, FORM: tl.constexpr,
    CLAMP: tl.constexpr, TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    LEAST_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """dz, weights * h, and this tile's share of dweights."""
    tl.static_assert(BLOCK_K == 128)
    expert, row, end, column = find_tile(offsets_E, D, E, BLOCK_M, BLOCK_N, GROUP, EXPERTS)
    if row < end:
        _gated_backward_tile(
            grad_TH, grad_scales_TG, w_EDH + expert * e_stride,
            w_scales_EDG + expert * e_scale_stride, z_MN, dz_MN, scaled_MD, weights_M, partial_PM,
            order_M, row, end, column, M, D, H, top_k, x_stride, x_scale_stride, n_stride,
            k_stride, n_scale_stride, k_scale_stride, limit, FORM, CLAMP, TRANSPOSED, WHOLE,
            BLOCK_M, LEAST_M, BLOCK_N)  # fmt: skip


def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, order: Tensor,
    limit: float, power_of_two: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and z."""
    check_experts(x, gate_up, down, weights, offsets, order)
    if not has_fp8(x):
        return forward_reference(x, gate_up, down, weights, offsets, order, limit, power_of_two)
    top_k, two = weights.shape[1], {"power_of_two": power_of_two}
    cast = quantize_fp8(x, **two)
    first, second = (quantize_fp8_blocks(w, **two) for w in (gate_up, down))
    h, h_scales, z = gated(cast.values, cast.scales, first.values, first.scales, offsets, order,
                           top_k, (limit, x.dtype, power_of_two), keep=True)  # fmt: skip
    y = multiply_fp8(h, h_scales, second.values, second.scales, offsets, order, top_k, True,
                     x.dtype)  # fmt: skip
    return sum_choices(y, top_k, weights), z


def _gated_backward(
    grad: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, order: Tensor, z: Tensor,
    limit: float, power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz, weights * h and dweights."""
    experts, hidden, width = down.shape
    cast = quantize_fp8(rows(grad), power_of_two=power_of_two)
    # transposed, because float8 instructions want the summed dimension of both operands contiguous
    turned = quantize_fp8_blocks(down, transposed=True, power_of_two=power_of_two)
    count, values, scales = len(order), dense(turned.values), turned.scales
    planned = plan("grouped_gemm_fp8_gated_backward", count, values, heavy_configs)
    dz, scaled = empty(count, 2 * width, like=z), empty(count, width, like=z)
    partial = empty(cdiv(width, planned.config.columns), count, like=weights)
    if scaled.numel():
        with on(z):
            _gated_backward_kernel[planned.grid](
                cast.values, cast.scales, values, scales, z, dz, scaled, weights.contiguous(),
                partial, order, offsets, count, width, hidden, experts, weights.shape[1],
                cast.values.stride(0), cast.scales.stride(0), *values.stride(), *scales.stride(),
                float(limit), FORM=form_of("scaled", z), CLAMP=limit > 0, **planned.constants,
            )  # fmt: skip
    return dz, scaled, partial.sum(0).view(weights.shape)


def _backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor,
    order: Tensor, z: Tensor, limit: float, power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate_up, down and weights."""
    if not has_fp8(x):
        return backward_reference(grad, x, gate_up, down, weights, offsets, order, z, limit,
                                  power_of_two)  # fmt: skip
    top_k, two = weights.shape[1], {"power_of_two": power_of_two}
    dz, scaled, d_weights = _gated_backward(grad, down, weights, offsets, order, z, limit,
                                            power_of_two)  # fmt: skip
    cast, turned = quantize_fp8(dz, **two), quantize_fp8_blocks(gate_up, transposed=True, **two)
    by_slot = multiply_fp8(cast.values, cast.scales, turned.values, turned.scales, offsets, order,
                           top_k, True, x.dtype)  # fmt: skip
    d_gate_up = weight_gradient(
        *quantize_groups(dz, offsets, None, 1, power_of_two),
        *quantize_groups(x, offsets, order, top_k, power_of_two), offsets, x.dtype)  # fmt: skip
    d_down = weight_gradient(
        *quantize_groups(grad, offsets, order, top_k, power_of_two),
        *quantize_groups(scaled, offsets, None, 1, power_of_two), offsets, x.dtype)  # fmt: skip
    return sum_choices(by_slot, top_k), d_gate_up, d_down, d_weights


_experts_backward = register(
    "moe_experts_fp8_training_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor down, "
    "Tensor weights, Tensor offsets, Tensor order, Tensor z, float limit, bool power_of_two) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=lambda grad, *given: tuple(t.new_empty(t.shape) for t in given[:4]),
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.limit, ctx.power_of_two = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    found = _experts_backward(grad, *ctx.saved_tensors, ctx.limit, ctx.power_of_two)
    return *found, None, None, None, None


_experts = register(
    "moe_experts_fp8_training(Tensor x, Tensor gate_up, Tensor down, Tensor weights, "
    "Tensor offsets, Tensor order, float limit, bool power_of_two) -> (Tensor, Tensor)",
    _forward,
    fake=lambda x, gate_up, down, weights, offsets, order, limit, power_of_two: (
        x.new_empty(x.shape), x.new_empty(order.shape[0], gate_up.shape[1]),
    ),
    setup_context=_save,
    backward=_gradient,
)  # fmt: skip


def moe_experts_fp8_training(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, order: Tensor,
    *, limit: float = 0.0, power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """`moe_experts` with every product, forward and backward, in float8; differentiable.

    Args:
        x, gate_up, down, weights, offsets, order, limit: as for `moe_experts`; weights in the
            dtype of x, which are cast anew in each pass.
        power_of_two: whether all scales are powers of two.

    Returns:
        [T, H] in the dtype of x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if choose(x) == "reference":
        return moe_experts_fp8_training_reference(
            x, gate_up, down, weights, offsets, order, limit=limit, power_of_two=power_of_two
        )
    return _experts(x, gate_up, down, weights, offsets, order, limit, power_of_two)[0]
