"""Block-scaled float8 weights: e4m3 values with one scale per 128 x 128 block.

The released FP8 checkpoint stores `W = W_fp8 * scale` with `scale` of shape
[ceil(rows / 128), ceil(cols / 128)] (compressed-tensors, strategy "block").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dequantize import dequantize_fp8
from ..kernels.dispatch import choose
from ..kernels.grouped_gemm_fp8 import grouped_gemm_fp8

BLOCK = 128
FEW_ROWS = 32
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Quantized:
    """values: float8_e4m3fn [..., R, C]; scale: float32 [..., ceil(R/128), ceil(C/128)]."""

    values: Tensor
    scale: Tensor


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., R, C]."""
    *batch, rows, cols = shape
    return (*batch, -(-rows // BLOCK), -(-cols // BLOCK))


def _expand(scale: Tensor, shape: torch.Size) -> Tensor:
    rows, cols = shape[-2:]
    full = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return full[..., :rows, :cols]


def quantize(weight: Tensor) -> Quantized:
    """Round a weight [..., R, C] to block-scaled e4m3; the largest value of a block becomes 448."""
    rows, cols = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    peak = blocks.abs().amax(dim=(-3, -1))
    # a scale below the normal numbers would lose its precision, or be zero
    scale = (peak / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(peak > 0, scale, 1.0)
    values = (weight.float() / _expand(scale, weight.shape)).clamp(-E4M3_MAX, E4M3_MAX)
    return Quantized(values.to(torch.float8_e4m3fn), scale)


def dequantize(values: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """values x scale in float32, rounded once to `dtype`."""
    return dequantize_fp8(values, scale.float(), dtype=dtype)


class Fp8Linear(nn.Module):
    """A bias-free linear layer that keeps its weight in float8.

    It is widened when used; for a few rows without gradients in the kernel, as there the time is
    that of reading it.
    """

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("weight_scale", scale)
        self.weight_scale: Tensor

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Fp8Linear:
        # model.to(bfloat16) must neither widen the values nor round the scales
        values, scale = self.weight.detach(), self.weight_scale
        super()._apply(fn, recurse)
        if self.weight.dtype != values.dtype:
            device = self.weight.device
            self.weight = nn.Parameter(values.to(device), requires_grad=False)
            self.weight_scale = scale.to(device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() or choose(x) != "triton" or not 0 < rows <= FEW_ROWS:
            return F.linear(x, dequantize(self.weight, self.weight_scale, dtype=x.dtype))
        y = grouped_gemm_fp8(
            x.reshape(rows, -1), self.weight[None], self.weight_scale[None],
            _all_rows(rows, x.device),
        )  # fmt: skip
        return y.view(*x.shape[:-1], -1)


@lru_cache(maxsize=FEW_ROWS)
def _all_rows(count: int, device: torch.device) -> Tensor:
    """Offsets of one group: made outside of recordings, which could not make them again."""
    return torch.tensor([0, count], dtype=torch.int32, device=device)
