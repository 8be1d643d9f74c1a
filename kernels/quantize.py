"""Block-scaled FP8 casts: x is about q * scale, q in float8 e4m3, one scale per block.

    amax  = max(max |x| over the block, 1e-12)      NaN is left out
    scale = amax / 448                              448 is the largest e4m3 number
    q     = cast(x * (448 / amax))                  round to nearest even, NaN stays NaN

A block is 1 x 128 along a row (activations; this file) or 128 x 128 (weights; `quantize_tiles.py`,
with the transposed forms). With `power_of_two` the scale is the least power of two not below
amax / 448 (UE8M0, the scale format of microscaling hardware) and x is multiplied by its exact
inverse. Recipe: DeepSeek-V3 (arXiv 2412.19437, section 3.3).

Shapes: x [..., N]; values [..., N] float8_e4m3fn, scales [..., ceil(N / 128)] float32.
Shape letters of kernels: T rows, N columns, G groups of 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import arch_of
from .dispatch import choose
from .elementwise import configs, grid, group, tile
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .tables import pick

BLOCK = 128
LARGEST = 448.0
SMALLEST_AMAX = 1e-12


def scales_reference(amax: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Scales of blocks with absolute maximum `amax`, and the factors x is multiplied by."""
    amax = amax.float().clamp(min=SMALLEST_AMAX)
    scale = amax / LARGEST
    if not power_of_two:
        # a number divided by a tensor would be its reciprocal times the number: two roundings
        return scale, torch.full_like(amax, LARGEST) / amax
    # the next power of two: carry a mantissa into the exponent, then clear it
    scale = ((scale.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
    return scale, 1 / scale


@triton.jit
def scales_of(amax, POWER_OF_TWO: tl.constexpr):
    """`scales_reference`, bit for bit. Divisions round correctly, which `/` does not on GPUs."""
    amax = tl.maximum(amax, 1e-12)
    largest = tl.full(amax.shape, 448.0, tl.float32)
    scale = tl.math.div_rn(amax, largest)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & ~0x7FFFFF).to(tl.float32, bitcast=True)
        return scale, tl.math.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
    return scale, tl.math.div_rn(largest, amax)


@triton.jit
def quantize_rows(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """float8 values and 1 x 128 scales [ROWS, COLUMNS / 128] of a float32 tile."""
    groups = tl.reshape(x, [ROWS, COLUMNS // 128, 128])
    scale, factor = scales_of(tl.max(tl.abs(groups), 2), POWER_OF_TWO)
    values = (groups * factor[:, :, None]).to(tl.float8e4nv)
    return tl.reshape(values, [ROWS, COLUMNS]), scale


@dataclass(frozen=True)
class QuantizedRows:
    """float8_e4m3fn values [..., N], float32 scales [..., ceil(N / 128)] of each 128."""

    values: Tensor
    scales: Tensor


def quantize_reference(x: Tensor, *, power_of_two: bool = False) -> QuantizedRows:
    """x in float8 with one scale per 128 columns."""
    columns = x.shape[-1]
    groups = F.pad(x.float(), (0, -columns % BLOCK)).unflatten(-1, (-1, BLOCK))
    amax = groups.abs().nan_to_num(0.0, posinf=float("inf")).amax(-1)
    scales, factors = scales_reference(amax, power_of_two=power_of_two)
    scaled = (groups * factors.unsqueeze(-1)).flatten(-2)[..., :columns]
    return QuantizedRows(scaled.to(torch.float8_e4m3fn), scales)


@jit(do_not_specialize=["T"])
def _kernel(x_TN, values_TN, scales_TG, T, N, x_stride, POWER_OF_TWO: tl.constexpr,
            ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, at = tile(N, ROWS, BLOCK)
    mask = (row < T) & (at < N)
    x = tl.load(x_TN + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    values, scales = quantize_rows(x, ROWS, BLOCK, POWER_OF_TWO)
    tl.store(values_TN + row * N + at, values, mask=mask)
    at_group, count = group(N, BLOCK), tl.cdiv(N, 128)
    tl.store(scales_TG + row * count + at_group, scales, mask=(row < T) & (at_group < count))


def _quantize(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values and scales."""
    require(x.dim() > 0, "x must have at least one dimension")
    if not arch_of(x.device).fp8:
        found = quantize_reference(x, power_of_two=power_of_two)
        return found.values, found.scales
    flat, columns = rows(x), x.shape[-1]
    count, groups = len(flat), cdiv(columns, BLOCK)
    values = empty(*x.shape, like=x, dtype=torch.float8_e4m3fn)
    scales = empty(*x.shape[:-1], groups, like=x, dtype=torch.float32)
    config = pick("quantize_fp8", configs, columns, x)
    if count and columns:
        with on(x):
            _kernel[grid(count, columns, config)](
                flat, values, scales, count, columns, flat.stride(0), POWER_OF_TWO=power_of_two,
                ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps,
            )  # fmt: skip
    return values, scales


def _fake(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    groups = (x.shape[-1] + BLOCK - 1) // BLOCK
    return (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty((*x.shape[:-1], groups), dtype=torch.float32),
    )


_quantize_fp8 = register(
    "quantize_fp8(Tensor x, bool power_of_two) -> (Tensor, Tensor)", _quantize, fake=_fake
)


@torch.no_grad()
def quantize_fp8(x: Tensor, *, power_of_two: bool = False) -> QuantizedRows:
    """x in float8 with one scale per 128 columns of a row; not differentiable.

    Args:
        x: [..., N] float32, bfloat16 or float16, any strides; float64 runs the reference.
        power_of_two: round scales up to powers of two.

    Returns:
        The bits of `quantize_reference`.

    Raises:
        ValueError: x has no dimension.
    """
    if choose(x) == "reference":
        return quantize_reference(x, power_of_two=power_of_two)
    return QuantizedRows(*_quantize_fp8(x, power_of_two))
