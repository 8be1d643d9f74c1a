"""Gradient of experts' weights in float8: dW[e] = dy_e^T x_e, both cast along the expert's rows.

    dW[e, n, k] = sum over blocks s of e:  (dy block . x block) * dy scale[s, n] * x scale[s, k]

Sums within a block of 128 rows are those of the matrix instruction, sums over blocks float32. An
expert without rows gets zeros. One program owns one tile of one expert, so nothing is added across
programs. Operands and blocks are those of `quantize_groups.py`.

Method: K-grouped products with 1 x 128 scales, DeepGEMM (github.com/deepseek-ai/DeepGEMM).

Shape letters: E experts, N outputs, K inputs, S blocks of 128 rows, P = 128 S.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .arch import Arch, arch_of
from .dispatch import choose
from .expert_tiles import Config, Problem
from .fp8_tiles import dot_fp8, has_fp8
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require
from .quantize import BLOCK
from .quantize_groups import QuantizedGroups
from .tables import pick


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates that sum 128 rows at a time, the default first."""
    if arch.is_cpu:
        return [Config(128, 128, 128, BLOCK, 1, 4, 1)]
    found = (
        Config(side, side, side, BLOCK, 1, warps, stages)
        for side in (128, 64)
        for warps in (8, 4)
        for stages in (4, 3, 2)
    )
    return [c for c in found if feasible(c, arch)]


def feasible(config: Config, arch: Arch) -> bool:
    """Whether the stages fit shared memory, and a thread its sums of a block and of all."""
    held = arch.buffers(config.num_stages)
    staged = (config.rows + config.columns) * BLOCK * held
    sums = config.rows * config.columns / (config.num_warps * arch.warp_size)
    return staged <= arch.shared_bytes - 2048 and sums <= 64


def weight_gradient_fp8_reference(
    grad: QuantizedGroups, x: QuantizedGroups, offsets: Tensor,
    *, dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """The product of the widened operands, expert by expert, in float32 (float64 for float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    out, starts = [], offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(starts)):
        first = start // BLOCK + expert
        own = slice(first, first + (end - start + BLOCK - 1) // BLOCK)
        left, right = (_widen(t, own, wide) for t in (grad, x))
        out.append((left @ right.T).to(dtype))
    return torch.stack(out)


def _widen(x: QuantizedGroups, blocks: slice, dtype: torch.dtype) -> Tensor:
    """Columns by rows of some blocks."""
    values = x.values[:, blocks.start * BLOCK : blocks.stop * BLOCK].to(dtype)
    return values * x.scales[blocks].T.to(dtype).repeat_interleave(BLOCK, 1)


@jit
def _kernel(
    grad_NP, grad_scales_SN, x_KP, x_scales_SK, out_ENK, offsets_E, N, K, P,
    FNUZ: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's gradient."""
    across = tl.cdiv(K, BLOCK_K)
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    read_n, read_k = n if WHOLE else tl.minimum(n, N - 1), k if WHOLE else tl.minimum(k, K - 1)
    start, end = tl.load(offsets_E + expert), tl.load(offsets_E + expert + 1)
    first = start // 128 + expert
    at = first * 128 + tl.arange(0, 128)[None, :]
    grad = grad_NP + read_n.to(tl.int64)[:, None] * P + at
    x = x_KP + read_k.to(tl.int64)[:, None] * P + at
    grad_scale, x_scale = grad_scales_SN + first * N + read_n, x_scales_SK + first * K + read_k
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for _ in range(0, tl.cdiv(end - start, 128)):
        scale = tl.load(grad_scale)[:, None] * tl.load(x_scale)[None, :]
        total += dot_fp8(tl.load(grad), tl.trans(tl.load(x)), FNUZ) * scale
        grad += 128
        x += 128
        grad_scale += N
        x_scale += K
    out = out_ENK + expert * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out, total.to(out_ENK.dtype.element_ty), mask=mask)


def weight_gradient(
    grad: Tensor, grad_scales: Tensor, x: Tensor, x_scales: Tensor, offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dW [E, N, K]."""
    experts, places = len(offsets) - 1, x_scales.shape[0] * BLOCK
    require(grad.shape[1:] == x.shape[1:] == (places,) and x.dim() == grad.dim() == 2,
            f"values must be [columns, {places}], got {tuple(grad.shape)} and "
            f"{tuple(x.shape)}")  # fmt: skip
    for values, scales in ((grad, grad_scales), (x, x_scales)):
        blocks = (places // BLOCK, len(values))
        require(scales.shape == blocks and scales.dtype == torch.float32 and values.itemsize == 1,
                f"float8 values [N, P] have float32 scales {blocks}, got {values.dtype} and "
                f"{scales.dtype} {tuple(scales.shape)}")  # fmt: skip
    if not has_fp8(x):
        return weight_gradient_fp8_reference(
            QuantizedGroups(grad, grad_scales), QuantizedGroups(x, x_scales), offsets, dtype=dtype
        )
    columns, depth = len(grad), len(x)
    out = empty(experts, columns, depth, like=x, dtype=dtype)
    mean = triton.next_power_of_2(max(1, places // max(1, experts)))
    config: Config = pick("grouped_gemm_fp8_weight", configs, Problem(mean, columns, depth, 1),
                          x.device)  # fmt: skip
    tiles = cdiv(columns, config.rows) * cdiv(depth, config.columns)
    if out.numel():
        with on(x):
            _kernel[(tiles, experts)](
                grad.contiguous(), grad_scales.contiguous(), x.contiguous(),
                x_scales.contiguous(), out, offsets, columns, depth, places,
                FNUZ=arch_of(x.device).fnuz,
                WHOLE=columns % config.rows == depth % config.columns == 0,
                BLOCK_N=config.rows, BLOCK_K=config.columns,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return out


_op = register(
    "grouped_gemm_fp8_weight(Tensor grad, Tensor grad_scales, Tensor x, Tensor x_scales, "
    "Tensor offsets, ScalarType dtype) -> Tensor",
    weight_gradient,
    fake=lambda grad, grad_scales, x, x_scales, offsets, dtype: x.new_empty(
        (offsets.shape[0] - 1, grad.shape[0], x.shape[0]), dtype=dtype
    ),
)


@torch.no_grad()
def weight_gradient_fp8(
    grad: QuantizedGroups, x: QuantizedGroups, offsets: Tensor,
    *, dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """dW[e] = dy_e^T x_e of float8 operands scaled along each expert's rows; not differentiable.

    Args:
        grad: `quantize_fp8_groups` of the gradients [M, N] of the product's rows.
        x: `quantize_fp8_groups` of its inputs [M, K], with the same offsets.
        offsets: int32 [E + 1], expert e's rows.
        dtype: of the result.

    Returns:
        [E, N, K]; zero for an expert without rows.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if choose(grad.scales) == "reference" or dtype == torch.float64:
        return weight_gradient_fp8_reference(grad, x, offsets, dtype=dtype)
    return _op(grad.values, grad.scales, x.values, x.scales, offsets, dtype)
