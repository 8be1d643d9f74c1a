"""Linear layer that trains with every product in float8; forward and backward.

    y = x W^T        x in blocks of 1 x 128 along the inputs, W in 128 x 128
    dx = dy W        dy in 1 x 128 along the outputs, W in 128 x 128
    dW = dy^T x      dy and x in 1 x 128 along the rows

A block of W has one scale whichever way it lies, so forward and backward multiply with the same
numbers. x, W, and what is kept between the passes stay in their dtype; sums over blocks are
float32. Recipe: DeepSeek-V3 (arXiv 2412.19437, section 3.3); for experts there is
`moe_experts_fp8_training`.

Shape letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.expert_weights_fp8 import weight_gradient_fp8
from ..kernels.launch import register, require
from ..kernels.linear_fp8 import linear_fp8
from ..kernels.quantize_groups import quantize_fp8_groups
from ..kernels.quantize_tiles import quantize_fp8_blocks


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    fits = x.dim() > 0 and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    require(fits, f"x {list(x.shape)} and weight {list(weight.shape)} must be [..., K] and [N, K]")
    require(x.dtype == weight.dtype, f"weight must be {x.dtype}, got {weight.dtype}")
    cast = quantize_fp8_blocks(weight)
    return linear_fp8(x, cast.values, cast.scales)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """dx and dW, empty if not wanted."""
    d_x, d_weight = x.new_empty(0), weight.new_empty(0)
    if wanted[0]:
        # float8 instructions want the summed dimension of both operands contiguous
        turned = quantize_fp8_blocks(weight, transposed=True)
        d_x = linear_fp8(grad, turned.values, turned.scales)
    if wanted[1]:
        grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        # all rows are one group's; made of numbers, without a copy from the host
        ends = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]
        pair = quantize_fp8_groups(grad, ends), quantize_fp8_groups(x, ends)
        d_weight = weight_gradient_fp8(*pair, ends, dtype=x.dtype)[0]
    return d_x, d_weight


_linear_backward = register(
    "linear_fp8_training_backward(Tensor grad, Tensor x, Tensor weight, bool[2] wanted) "
    "-> (Tensor, Tensor)",
    _backward,
    fake=lambda grad, x, weight, wanted: tuple(
        t.new_empty(t.shape if w else 0) for t, w in zip((x, weight), wanted, strict=True)
    ),
)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad)
    found = _linear_backward(grad, *ctx.saved_tensors, wanted)
    return tuple(g if w else None for g, w in zip(found, wanted, strict=True))


_linear = register(
    "linear_fp8_training(Tensor x, Tensor weight) -> Tensor",
    _forward,
    fake=lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]),
    setup_context=_save,
    backward=_gradient,
)


def linear_fp8_training(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with the three products of a training step in float8; differentiable.

    Args:
        x: [..., K] float32, bfloat16 or float16; float64 runs the reference.
        weight: [N, K] in the dtype of x; it is cast anew in each pass.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    return _linear(x, weight)
