"""Block-scaled FP8 casts that look at 128 x 128 tiles: weights, and transposed activations.

    blocks      q_RC and s[ceil(R / 128), ceil(C / 128)]: one scale per 128 x 128 block
    transposed  quantize_fp8(x^T): q_CR and s[C, ceil(R / 128)], scales along what was a column
    both        quantize_fp8(x) and quantize_fp8(x^T) from one read of x

A matrix product in float8 wants both operands contiguous along the summed dimension. Training sums
activations over columns going forward and over rows for the weight's gradient, hence both.
Scales are those of `quantize.py`; a block over the edge counts what there is of it.

Method: one program per tile holds it in registers, so x is read once whatever is written (the
fusion of torchao and of DeepSeek's TileKernels).

Shape letters: B matrices, R rows, C columns, G groups of 128 rows, H groups of 128 columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import Arch, arch_of
from .dispatch import choose
from .lang import jit, tl
from .launch import cdiv, empty, on, register, require
from .quantize import BLOCK, QuantizedRows, quantize_reference, scales_of, scales_reference
from .tables import pick


@dataclass(frozen=True)
class Config:
    """Warps for one tile of 128 x 128."""

    num_warps: int


def configs(problem: None, arch: Arch) -> list[Config]:
    """Candidates, the default first; the tile is given by the blocks."""
    return [Config(warps) for warps in (8, 16, 4) if feasible(Config(warps), arch)]


def feasible(config: Config, arch: Arch) -> bool:
    """Whether a thread holds at most 64 float32 elements of the tile."""
    return arch.is_cpu or BLOCK * BLOCK // (config.num_warps * arch.warp_size) <= 64


@dataclass(frozen=True)
class QuantizedBlocks:
    """float8_e4m3fn values [..., R, C], float32 scales [..., ceil(R / 128), ceil(C / 128)]."""

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class QuantizedBoth:
    """`rows` = quantize_fp8(x) [..., R, C] and `columns` = quantize_fp8(x^T) [..., C, R]."""

    rows: QuantizedRows
    columns: QuantizedRows


def quantize_blocks_reference(x: Tensor, *, power_of_two: bool = False) -> QuantizedBlocks:
    """x [..., R, C] in float8 with one scale per 128 x 128 block."""
    row_count, columns = x.shape[-2:]
    padded = F.pad(x.float(), (0, -columns % BLOCK, 0, -row_count % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    amax = blocks.abs().nan_to_num(0.0, posinf=float("inf")).amax((-3, -1))
    scales, factors = scales_reference(amax, power_of_two=power_of_two)
    scaled = (blocks * factors[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return QuantizedBlocks(scaled[..., :row_count, :columns].to(torch.float8_e4m3fn), scales)


@jit
def _tile_kernel(
    x_BRC, values_BRC, scales_B, turned_BCR, turned_scales_B,
    R, C, x_batch_stride, x_stride,
    BLOCKS: tl.constexpr, STRAIGHT: tl.constexpr, TURNED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """The tile's values as they lie (STRAIGHT) and transposed (TURNED), with their scales."""
    groups, across = tl.cdiv(R, 128), tl.cdiv(C, 128)
    program = tl.program_id(0)
    batch = (program // (groups * across)).to(tl.int64)
    g, h = program // across % groups, program % across
    row = (g * 128 + tl.arange(0, 128)).to(tl.int64)[:, None]
    column = (h * 128 + tl.arange(0, 128))[None, :]
    mask = (row < R) & (column < C)
    x_BRC += batch * x_batch_stride
    x = tl.load(x_BRC + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    values_BRC += batch * R * C + row * C + column
    to = (h * 128 + tl.arange(0, 128)).to(tl.int64)[:, None]
    along = (g * 128 + tl.arange(0, 128))[None, :]
    turned_mask = (to < C) & (along < R)
    turned_BCR += batch * R * C + to * R + along
    if BLOCKS:
        scale, factor = scales_of(tl.max(tl.max(tl.abs(x), 1), 0), POWER_OF_TWO)
        values = (x * factor).to(tl.float8e4nv)
        if TURNED:
            tl.store(turned_BCR, tl.trans(values), mask=turned_mask)
            tl.store(turned_scales_B + (batch * across + h) * groups + g, scale)
        else:
            tl.store(values_BRC, values, mask=mask)
            tl.store(scales_B + (batch * groups + g) * across + h, scale)
    else:
        if STRAIGHT:
            scale, factor = scales_of(tl.max(tl.abs(x), 1), POWER_OF_TWO)
            tl.store(values_BRC, (x * factor[:, None]).to(tl.float8e4nv), mask=mask)
            at = g * 128 + tl.arange(0, 128)
            tl.store(scales_B + (batch * R + at) * across + h, scale, mask=at < R)
        if TURNED:
            scale, factor = scales_of(tl.max(tl.abs(x), 0), POWER_OF_TWO)
            values = (x * factor[None, :]).to(tl.float8e4nv)
            tl.store(turned_BCR, tl.trans(values), mask=turned_mask)
            at = h * 128 + tl.arange(0, 128)
            tl.store(turned_scales_B + (batch * C + at) * groups + g, scale, mask=at < C)


def _launch(
    x: Tensor, *, blocks: bool, straight: bool, turned: bool, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and scales, and those transposed; what was not asked for is empty."""
    *batch, row_count, columns = x.shape
    matrices = x.reshape(math.prod(batch), row_count, columns)
    if columns > 1 and matrices.stride(2) != 1:
        matrices = matrices.contiguous()
    groups, across = cdiv(row_count, BLOCK), cdiv(columns, BLOCK)
    fp8, none = torch.float8_e4m3fn, (0,)
    scales_shape = (*batch, groups if blocks else row_count, across)
    turned_shape = (*batch, across if blocks else columns, groups)
    values = empty(*(x.shape if straight else none), like=x, dtype=fp8)
    scales = empty(*(scales_shape if straight else none), like=x, dtype=torch.float32)
    turned_values = empty(*((*batch, columns, row_count) if turned else none), like=x, dtype=fp8)
    turned_scales = empty(*(turned_shape if turned else none), like=x, dtype=torch.float32)
    config = pick("quantize_fp8_tiles", configs, None, x.device)
    if x.numel():
        with on(x):
            _tile_kernel[(len(matrices) * groups * across,)](
                matrices, values, scales, turned_values, turned_scales,
                row_count, columns, matrices.stride(0), matrices.stride(1),
                BLOCKS=blocks, STRAIGHT=straight, TURNED=turned, POWER_OF_TWO=power_of_two,
                num_warps=config.num_warps,
            )  # fmt: skip
    return values, scales, turned_values, turned_scales


def _checked(x: Tensor) -> bool:
    """Whether the kernel can run on `x`; the reference runs where a GPU has no float8."""
    require(x.dim() >= 2, f"x must be [..., R, C], got {tuple(x.shape)}")
    return arch_of(x.device).fp8


def _blocks(x: Tensor, transposed: bool, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if not _checked(x):
        source = x.mT if transposed else x
        found = quantize_blocks_reference(source, power_of_two=power_of_two)
        return found.values.contiguous(), found.scales.contiguous()
    out = _launch(x, blocks=True, straight=not transposed, turned=transposed,
                  power_of_two=power_of_two)  # fmt: skip
    return out[2:] if transposed else out[:2]


def _transposed(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if not _checked(x):
        found = quantize_reference(x.mT, power_of_two=power_of_two)
        return found.values.contiguous(), found.scales.contiguous()
    return _launch(x, blocks=False, straight=False, turned=True, power_of_two=power_of_two)[2:]


def _both(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _checked(x):
        found = quantize_reference(x, power_of_two=power_of_two)
        return found.values, found.scales, *_transposed(x, power_of_two)
    return _launch(x, blocks=False, straight=True, turned=True, power_of_two=power_of_two)


def _cover(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK


def _blocks_fake(x: Tensor, transposed: bool, power_of_two: bool) -> tuple[Tensor, Tensor]:
    *batch, row_count, columns = (x.mT if transposed else x).shape
    return (
        x.new_empty((*batch, row_count, columns), dtype=torch.float8_e4m3fn),
        x.new_empty((*batch, _cover(row_count), _cover(columns)), dtype=torch.float32),
    )


def _rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty((*x.shape[:-1], _cover(x.shape[-1])), dtype=torch.float32),
    )


_quantize_blocks = register(
    "quantize_fp8_blocks(Tensor x, bool transposed, bool power_of_two) -> (Tensor, Tensor)",
    _blocks,
    fake=_blocks_fake,
)
_quantize_transposed = register(
    "quantize_fp8_transposed(Tensor x, bool power_of_two) -> (Tensor, Tensor)",
    _transposed,
    fake=lambda x, power_of_two: _rows_fake(x.mT),
)
_quantize_both = register(
    "quantize_fp8_both(Tensor x, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)",
    _both,
    fake=lambda x, power_of_two: (*_rows_fake(x), *_rows_fake(x.mT)),
)


@torch.no_grad()
def quantize_fp8_blocks(
    x: Tensor, *, transposed: bool = False, power_of_two: bool = False
) -> QuantizedBlocks:
    """A weight, or a stack of them, in float8 with one scale per 128 x 128; not differentiable.

    Args:
        x: [..., R, C] float32, bfloat16 or float16, any strides; float64 runs the reference.
        transposed: return the same for x^T, contiguous.
        power_of_two: round scales up to powers of two.

    Raises:
        ValueError: x has fewer than two dimensions.
    """
    if choose(x) == "reference":
        x = x.mT if transposed else x
        return quantize_blocks_reference(x, power_of_two=power_of_two)
    return QuantizedBlocks(*_quantize_blocks(x, transposed, power_of_two))


@torch.no_grad()
def quantize_fp8_transposed(x: Tensor, *, power_of_two: bool = False) -> QuantizedRows:
    """quantize_fp8(x^T), contiguous, reading x [..., R, C] as it lies; arguments as there.

    Raises:
        ValueError: x has fewer than two dimensions.
    """
    if choose(x) == "reference":
        return quantize_reference(x.mT, power_of_two=power_of_two)
    return QuantizedRows(*_quantize_transposed(x, power_of_two))


@torch.no_grad()
def quantize_fp8_both(x: Tensor, *, power_of_two: bool = False) -> QuantizedBoth:
    """quantize_fp8(x) and quantize_fp8(x^T) from one read of x [..., R, C]; arguments as there.

    Raises:
        ValueError: x has fewer than two dimensions.
    """
    if choose(x) == "reference":
        straight = quantize_reference(x, power_of_two=power_of_two)
        return QuantizedBoth(straight, quantize_reference(x.mT, power_of_two=power_of_two))
    values, scales, turned_values, turned_scales = _quantize_both(x, power_of_two)
    return QuantizedBoth(QuantizedRows(values, scales), QuantizedRows(turned_values, turned_scales))
