"""RMSNorm with a float8 output: `quantize_fp8(rms_norm(x))` in one kernel, bit for bit.

The kernel is that of `rmsnorm.py`. For inference: a float8 output carries no gradient.

Shapes: x [..., N]; values [..., N] float8_e4m3fn, scales [..., ceil(N / 128)] float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import choose
from .launch import register
from .quantize import BLOCK, QuantizedRows, quantize_reference
from .rmsnorm import add_rms_norm, forward, rms_norm


def _norm_fp8_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, total, _, scales = forward(
        x, residual, weight, eps, quantize=True, power_of_two=power_of_two
    )
    return out, scales, total if residual is not None else x.new_empty(0)


def _norm_fp8_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups = (x.shape[-1] + BLOCK - 1) // BLOCK
    return (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty((*x.shape[:-1], groups), dtype=torch.float32),
        x.new_empty(0) if residual is None else x.new_empty(x.shape),
    )


_norm_fp8 = register(
    "rms_norm_fp8(Tensor x, Tensor? residual, Tensor weight, float eps, bool power_of_two)"
    " -> (Tensor, Tensor, Tensor)",
    _norm_fp8_op,
    fake=_norm_fp8_fake,
)


@dataclass(frozen=True)
class QuantizedSum:
    """`normed` = quantize_fp8(rms_norm(`total`)), `total` = x + residual [..., N]."""

    normed: QuantizedRows
    total: Tensor


def rms_norm_fp8(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, power_of_two: bool = False
) -> QuantizedRows:
    """quantize_fp8(rms_norm(x)) in one kernel, bit for bit; not differentiable."""
    if choose(x) == "reference":
        return quantize_reference(rms_norm(x, weight, eps=eps), power_of_two=power_of_two)
    values, scales, _ = _norm_fp8(x, None, weight, eps, power_of_two)
    return QuantizedRows(values, scales)


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5, power_of_two: bool = False
) -> QuantizedSum:
    """quantize_fp8(rms_norm(x + residual)) and the sum in one kernel; not differentiable."""
    if choose(x) == "reference":
        out = add_rms_norm(x, residual, weight, eps=eps)
        return QuantizedSum(quantize_reference(out.normed, power_of_two=power_of_two), out.total)
    values, scales, total = _norm_fp8(x, residual, weight, eps, power_of_two)
    return QuantizedSum(QuantizedRows(values, scales), total)
