"""RMSNorm, alone or after a residual add; forward and backward.

    s = x + residual                                    (add_rms_norm; rounded to the dtype of x)
    y = cast(s / sqrt(mean(s^2) + eps)) * weight        statistics in float32

The cast to the input's dtype comes before the weight (the order of Llama, T5 and K-EXAONE). The
forward kernel can cast y to float8 in 1 x 128 blocks before it leaves (`rmsnorm_fp8.py`).

The gradient is in `rmsnorm_backward.py`.

Method: Zhang & Sennrich 2019 (arXiv 1910.07467). One program holds whole rows in registers and
reads and writes each element once; rows over `MAX_BLOCK` are walked in pieces instead.

Shape letters: T rows, N columns, G groups of 128 columns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .quantize import BLOCK as GROUP
from .quantize import quantize_rows
from .rmsnorm_backward import backward
from .tables import pick

MAX_BLOCK = 16_384
"""The widest row that is held in registers."""


@dataclass(frozen=True)
class Config:
    """`rows` rows of `block` columns per tile; the backward kernel runs `programs` programs."""

    block: int
    rows: int
    programs: int
    num_warps: int


def configs(columns: int, arch: Arch) -> list[Config]:
    """Candidates for rows of `columns` elements, the default first."""
    whole = max(GROUP, triton.next_power_of_2(columns))
    if arch.is_cpu:
        block = min(whole, MAX_BLOCK)
        tall = [r for r in (1, 2, 4) if r == 1 or columns <= block <= MAX_BLOCK // r]
        return [Config(block, r, p * arch.processors, 4) for r in tall for p in (4, 1)]
    blocks = [min(whole, MAX_BLOCK) >> halvings for halvings in range(3)]
    programs = [waves * arch.processors for waves in (1, 2, 4)]
    found = (Config(*c) for c in itertools.product(blocks, (1, 2, 4, 8), programs, (2, 4, 8, 16)))
    fitting = [c for c in found if feasible(c, columns, arch)]
    return sorted(fitting, key=lambda c: _default_first(c, columns))


def feasible(config: Config, columns: int, arch: Arch) -> bool:
    """Whether a tile leaves each thread between 4 and 64 elements, and rows are not in pieces."""
    per_thread = config.block * config.rows / (config.num_warps * arch.warp_size)
    return 4 <= per_thread <= 64 and (config.rows == 1 or config.block >= columns)


def _default_first(config: Config, columns: int) -> tuple[float, ...]:
    """Whole rows, then about 16 elements per thread, then one wave of backward programs.

    Pieces of 32 per thread spill on sm_80, where threads are held to 64 registers.
    """
    per_thread = config.block * config.rows / (config.num_warps * 32)
    pieces = config.block < columns
    return pieces, abs(per_thread - 16), -config.block, config.rows, config.programs


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm over the last dimension; float64 is computed in float64, all else in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normed.to(x.dtype) * weight


@jit
def _forward_kernel(
    x_TN, residual_TN, weight_N, out_TN, sum_TN, scales_TG, rstd_T,
    T, N, x_stride, residual_stride, eps,
    RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    x_TN += row[:, None] * x_stride
    residual_TN += row[:, None] * residual_stride
    out_TN += row[:, None] * N
    sum_TN += row[:, None] * N
    live = row[:, None] < T
    squares = tl.zeros([ROWS], tl.float32)
    x = tl.zeros([ROWS, BLOCK], x_TN.dtype.element_ty)
    for start in range(0, BLOCK if WHOLE else N, BLOCK):
        at = start + column[None, :]
        mask = live & (at < N)
        x = tl.load(x_TN + at, mask=mask, other=0.0)
        if RESIDUAL:
            other = tl.load(residual_TN + at, mask=mask, other=0.0)
            x = (x.to(tl.float32) + other.to(tl.float32)).to(x.dtype)
            tl.store(sum_TN + at, x, mask=mask)
        squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    rstd = tl.rsqrt(squares / N + eps)
    if RESIDUAL and not WHOLE:
        tl.debug_barrier()
    for start in range(0, BLOCK if WHOLE else N, BLOCK):
        at = start + column[None, :]
        mask = live & (at < N)
        if not WHOLE:
            x = tl.load((sum_TN if RESIDUAL else x_TN) + at, mask=mask, other=0.0)
        weight = tl.load(weight_N + at, mask=at < N, other=0.0).to(tl.float32)
        normed = (x.to(tl.float32) * rstd[:, None]).to(x.dtype)
        y = (normed.to(tl.float32) * weight).to(x.dtype)
        if QUANTIZE:
            values, scales = quantize_rows(y.to(tl.float32), ROWS, BLOCK, POWER_OF_TWO)
            tl.store(out_TN + at, values, mask=mask)
            group = start // 128 + tl.arange(0, BLOCK // 128)[None, :]
            count = tl.cdiv(N, 128)
            scales_TG_row = scales_TG + row[:, None] * count + group
            tl.store(scales_TG_row, scales, mask=live & (group < count))
        else:
            tl.store(out_TN + at, y, mask=mask)
    # last: rows that are read again after a store would have to be kept from it
    tl.store(rstd_T + row, rstd, mask=row < T)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float,
    *, quantize: bool = False, power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, sum, 1 / sqrt(mean square + eps) and scales; what was not asked for is empty."""
    columns = x.shape[-1]
    require(weight.shape == (columns,), f"weight must be [{columns}], got {tuple(weight.shape)}")
    require(residual is None or (residual.shape == x.shape and residual.dtype == x.dtype),
            "residual must have the shape and dtype of x")  # fmt: skip
    flat = rows(x)
    other = flat if residual is None else rows(residual)
    count, shape = len(flat), x.shape[:-1]
    out = empty(*x.shape, like=x, dtype=torch.float8_e4m3fn if quantize else x.dtype)
    total = out if residual is None else empty(*x.shape, like=x)
    groups = cdiv(columns, GROUP) if quantize else 0
    scales = empty(*shape, groups, like=x, dtype=torch.float32)
    rstd = empty(*shape, like=x, dtype=torch.float32)
    config = pick("rms_norm", configs, columns, x)
    if count and columns:
        with on(x):
            _forward_kernel[(cdiv(count, config.rows),)](
                flat, other, weight.contiguous(), out, total, scales, rstd,
                count, columns, flat.stride(0), other.stride(0), eps,
                RESIDUAL=residual is not None, QUANTIZE=quantize, POWER_OF_TWO=power_of_two,
                WHOLE=config.block >= columns, ROWS=config.rows, BLOCK=config.block,
                num_warps=config.num_warps,
            )  # fmt: skip
    return out, total, rstd, scales


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _rstd_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward(
    grad: Tensor, sum_grad: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the normed tensor and of the weight."""
    config = pick("rms_norm", configs, x.shape[-1], x)
    return backward(grad, sum_grad, x, weight, rstd, block=config.block,
                    programs=config.programs, num_warps=config.num_warps)  # fmt: skip


_norm_backward = register(
    "rms_norm_backward(Tensor grad, Tensor? sum_grad, Tensor x, Tensor weight, Tensor rstd)"
    " -> (Tensor, Tensor)",
    _backward,
    fake=lambda grad, sum_grad, x, weight, rstd: (_like(x), weight.new_empty(weight.shape)),
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *_, weight, _ = inputs
    ctx.save_for_backward(output[1] if len(output) == 3 else x, weight, output[-1])


def _add_norm_gradient(ctx: Any, grad: Tensor, sum_grad: Tensor, _: Tensor) -> tuple:
    d_sum, d_weight = _norm_backward(grad, sum_grad, *ctx.saved_tensors)
    return d_sum, d_sum, d_weight, None


_norm = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, weight, eps: forward(x, None, weight, eps)[:3:2],
    fake=lambda x, weight, eps: (_like(x), _rstd_like(x)),
    setup_context=_save,
    backward=lambda ctx, grad, _: (*_norm_backward(grad, None, *ctx.saved_tensors), None),
)
_add_norm = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps: forward(x, residual, weight, eps)[:3],
    fake=lambda x, residual, weight, eps: (_like(x), _like(x), _rstd_like(x)),
    setup_context=_save,
    backward=_add_norm_gradient,
)


@dataclass(frozen=True)
class NormedSum:
    """`normed` = rms_norm(`total`), `total` = x + residual; both [..., N] in the dtype of x."""

    normed: Tensor
    total: Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last dimension, differentiable.

    Args:
        x: [..., N] float32, bfloat16 or float16, any strides; float64 runs the reference.
        weight: [N], the dtype of x.
        eps: added to the mean square.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: weight does not have shape [N].
    """
    if choose(x, op="rms_norm") == "reference":
        return rms_norm_reference(x, weight, eps=eps)
    return _norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> NormedSum:
    """RMSNorm of x + residual, and the sum itself; differentiable in all three tensors.

    Arguments as for `rms_norm`; residual has the shape and dtype of x.
    """
    if choose(x, op="add_rms_norm") == "reference":
        total = x + residual
        return NormedSum(rms_norm_reference(total, weight, eps=eps), total)
    normed, total, _ = _add_norm(x, residual, weight, eps)
    return NormedSum(normed, total)
