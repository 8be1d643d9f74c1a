"""Block-scaled float8 back to a wide dtype: x = values * scale, one rounding from float32.

Takes what `quantize.py` and `quantize_tiles.py` return, and the weights of released FP8
checkpoints: one scale per 128 of a row, or per 128 x 128 block.

Shape letters: B matrices, R rows each, T = B R, N columns, G groups of 128 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arch import arch_of
from .dispatch import choose
from .elementwise import configs, grid, group, tile
from .lang import jit, tl
from .launch import empty, on, register, require, rows
from .quantize import BLOCK
from .tables import pick

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _blocks(values: Tensor, scales: Tensor) -> bool:
    """Whether a scale is for 128 rows; refuses scales that fit neither way."""
    rank, row_count = values.dim(), values.shape[-2] if values.dim() > 1 else 1
    across = (values.shape[-1] + BLOCK - 1) // BLOCK if rank else 0
    by_row = (*values.shape[:-1], across)
    by_block = (*values.shape[:-2], (row_count + BLOCK - 1) // BLOCK, across)
    require(
        rank > 0 and tuple(scales.shape) in (by_row, by_block),
        f"scales must be {list(by_row)} or {list(by_block)}, got {list(scales.shape)}",
    )
    return tuple(scales.shape) != by_row


def dequantize_reference(values: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """values [..., R, N] times scales [..., R or ceil(R / 128), ceil(N / 128)]."""
    wide = torch.promote_types(dtype, torch.float32)
    full = scales.to(wide).repeat_interleave(BLOCK, -1)[..., : values.shape[-1]]
    if _blocks(values, scales):
        full = full.repeat_interleave(BLOCK, -2)[..., : values.shape[-2], :]
    return (values.to(wide) * full).to(dtype)


@jit(do_not_specialize=["T"])
def _kernel(values_TN, scales_BG, out_TN, T, R, N, values_stride, BLOCKS: tl.constexpr,
            ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, at = tile(N, ROWS, BLOCK)
    mask = (row < T) & (at < N)
    at_group, groups = group(N, BLOCK), tl.cdiv(N, 128)
    scale_row = row // R * tl.cdiv(R, 128) + row % R // 128 if BLOCKS else row
    scale = tl.load(scales_BG + scale_row * groups + at_group,
                    mask=(row < T) & (at_group < groups), other=0.0)  # fmt: skip
    values = tl.load(values_TN + row * values_stride + at, mask=mask).to(tl.float32)
    out = tl.reshape(values, [ROWS, BLOCK // 128, 128]) * scale[:, :, None]
    out = tl.reshape(out, [ROWS, BLOCK]).to(out_TN.dtype.element_ty)
    tl.store(out_TN + row * N + at, out, mask=mask)


def _dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    require(
        values.dtype == torch.float8_e4m3fn, f"values must be float8_e4m3fn, got {values.dtype}"
    )
    blocks = _blocks(values, scales)
    if not arch_of(values.device).fp8:
        return dequantize_reference(values, scales, dtype=dtype)
    out = empty(*values.shape, like=values, dtype=dtype)
    if not out.numel():
        return out
    flat, columns = rows(values), values.shape[-1]
    count, row_count = len(flat), values.shape[-2] if blocks else 1
    config = pick("dequantize_fp8", configs, columns, values.device)
    with on(values):
        _kernel[grid(count, columns, config)](
            flat, scales.float().contiguous(), out, count, row_count, columns, flat.stride(0),
            BLOCKS=blocks, ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
    return out


_dequantize_fp8 = register(
    "dequantize_fp8(Tensor values, Tensor scales, ScalarType dtype) -> Tensor",
    _dequantize,
    fake=lambda values, scales, dtype: values.new_empty(values.shape, dtype=dtype),
)


@torch.no_grad()
def dequantize_fp8(
    values: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """values times their scales, in float32 and rounded once; not differentiable.

    Args:
        values: [..., R, N] float8_e4m3fn, any strides.
        scales: float, [..., R, ceil(N / 128)] or [..., ceil(R / 128), ceil(N / 128)].
        dtype: of the result; float64 runs the reference.

    Raises:
        ValueError: the scales fit neither way, or the values are not float8_e4m3fn.
    """
    if dtype not in _DTYPES or choose(scales.float()) == "reference":
        return dequantize_reference(values, scales, dtype=dtype)
    return _dequantize_fp8(values, scales, dtype)
