"""Block-scaled float8 of sorted rows along the rows: the operands of an expert's weight gradient.

    block (e, j) is rows offsets[e] + 128 j .. at most offsets[e + 1] - 1, one column
    values[n, 128 s + i] = q of row i of block s, column n;  zero where the expert has no such row
    scales[s, n]

A weight's gradient sums over an expert's rows, so its operands are scaled in blocks of 128 rows
that begin with the expert, and written transposed: matrix instructions want the summed dimension
contiguous. Block s belongs to the last expert e with offsets[e] // 128 + e <= s, as the tiles of
`expert_tiles.py` do: M // 128 + E blocks are enough whatever the groups are, and blocks without
rows are zero. Scales are those of `quantize.py`.

Shape letters: T tokens, M sorted rows, N columns, E experts, S blocks, P = 128 S.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import arch_of
from .dispatch import choose
from .expert_tiles import find_tile
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .quantize import BLOCK, scales_of, scales_reference
from .quantize_tiles import configs
from .tables import pick


@dataclass(frozen=True)
class QuantizedGroups:
    """float8_e4m3fn values [N, P] and float32 scales [S, N]."""

    values: Tensor
    scales: Tensor


def blocks_of(count: int, experts: int) -> int:
    """Blocks that hold `count` rows of `experts` experts, however they are spread."""
    return count // BLOCK + experts


def quantize_groups_reference(
    x: Tensor, offsets: Tensor, *, order: Tensor | None = None, top_k: int = 1,
    power_of_two: bool = False,
) -> QuantizedGroups:  # fmt: skip
    """Block by block; each expert's last one, and those without rows, are filled with zeros."""
    x = x if order is None else x.index_select(0, order // top_k)
    blocks = blocks_of(len(x), len(offsets) - 1)
    values = x.new_zeros(x.shape[1], blocks * BLOCK, dtype=torch.float8_e4m3fn)
    nothing = x.new_zeros(blocks, x.shape[1], dtype=torch.float32)
    scales, _ = scales_reference(nothing, power_of_two=power_of_two)
    starts = offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(starts)):
        for row in range(start, end, BLOCK):
            block = x[row : min(row + BLOCK, end)].float()
            at = start // BLOCK + expert + (row - start) // BLOCK
            amax = block.abs().nan_to_num(0.0, posinf=float("inf")).amax(0)
            scales[at], factors = scales_reference(amax, power_of_two=power_of_two)
            padded = F.pad((block * factors).T, (0, BLOCK - len(block)))
            values[:, at * BLOCK : (at + 1) * BLOCK] = padded.to(torch.float8_e4m3fn)
    return QuantizedGroups(values, scales)


@jit(do_not_specialize=["E", "top_k"])
def _kernel(
    x_TN, values_NP, scales_SN, order_M, offsets_E, N, P, E, top_k, x_stride,
    GATHER: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    _, row, end, column = find_tile(offsets_E, N, E, 128, 128, 1, EXPERTS)
    block = (tl.program_id(0) // tl.cdiv(N, 128)).to(tl.int64)
    m = row + tl.arange(0, 128)
    n = column + tl.arange(0, 128)
    live = m < end
    source = tl.load(order_M + m, mask=live, other=0) // top_k if GATHER else m
    x = tl.load(x_TN + source.to(tl.int64)[:, None] * x_stride + n[None, :],
                mask=live[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)  # fmt: skip
    scale, factor = scales_of(tl.max(tl.abs(x), 0), POWER_OF_TWO)
    values = tl.trans((x * factor[None, :]).to(tl.float8e4nv))
    out = values_NP + n.to(tl.int64)[:, None] * P + block * 128 + tl.arange(0, 128)[None, :]
    tl.store(out, values, mask=(n < N)[:, None])
    tl.store(scales_SN + block * N + n, scale, mask=n < N)


def quantize_groups(
    x: Tensor, offsets: Tensor, order: Tensor | None, top_k: int, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Values and scales."""
    require(x.dim() == 2, f"x must be [rows, columns], got {tuple(x.shape)}")
    require(offsets.dim() == 1 and len(offsets) > 0 and offsets.dtype == torch.int32,
            f"offsets must be int32 [E + 1], got {offsets.dtype} "
            f"{tuple(offsets.shape)}")  # fmt: skip
    require(order is None or (order.dim() == 1 and order.dtype == torch.int32),
            "order must be int32 [M]")  # fmt: skip
    if not arch_of(x.device).fp8:
        found = quantize_groups_reference(x, offsets, order=order, top_k=top_k,
                                          power_of_two=power_of_two)  # fmt: skip
        return found.values, found.scales
    flat, columns, experts = rows(x), x.shape[1], len(offsets) - 1
    count = len(x) if order is None else len(order)
    blocks = blocks_of(count, experts)
    values = empty(columns, blocks * BLOCK, like=x, dtype=torch.float8_e4m3fn)
    scales = empty(blocks, columns, like=x, dtype=torch.float32)
    config = pick("quantize_fp8_tiles", configs, None, x.device)
    if values.numel():
        with on(x):
            _kernel[(blocks * cdiv(columns, BLOCK),)](
                flat, values, scales, offsets if order is None else order, offsets,
                columns, blocks * BLOCK, experts, top_k, flat.stride(0),
                GATHER=order is not None, POWER_OF_TWO=power_of_two,
                EXPERTS=max(16, triton.next_power_of_2(experts)), num_warps=config.num_warps,
            )  # fmt: skip
    return values, scales


def _fake(
    x: Tensor, offsets: Tensor, order: Tensor | None, top_k: int, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    blocks = blocks_of((x if order is None else order).shape[0], offsets.shape[0] - 1)
    return (
        x.new_empty((x.shape[1], blocks * BLOCK), dtype=torch.float8_e4m3fn),
        x.new_empty((blocks, x.shape[1]), dtype=torch.float32),
    )


_quantize_groups = register(
    "quantize_fp8_groups(Tensor x, Tensor offsets, Tensor? order, int top_k, bool power_of_two) "
    "-> (Tensor, Tensor)",
    quantize_groups,
    fake=_fake,
)


@torch.no_grad()
def quantize_fp8_groups(
    x: Tensor, offsets: Tensor, *, order: Tensor | None = None, top_k: int = 1,
    power_of_two: bool = False,
) -> QuantizedGroups:  # fmt: skip
    """Sorted rows in float8, scaled along the rows of each expert; not differentiable.

    Args:
        x: [M, N] rows sorted by expert, float32, bfloat16 or float16; float64 runs the reference.
        offsets: int32 [E + 1], expert e's rows; 0 first and M last.
        order: int32 [M]: x is then [T, N], and sorted row m is x[order[m] // top_k].
        top_k: rows per token in `order`.
        power_of_two: round scales up to powers of two.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if choose(x) == "reference":
        return quantize_groups_reference(x, offsets, order=order, top_k=top_k,
                                         power_of_two=power_of_two)  # fmt: skip
    return QuantizedGroups(*_quantize_groups(x, offsets, order, top_k, power_of_two))
