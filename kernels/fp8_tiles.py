"""Sums of a block-scaled float8 product: W = q * scale, one scale per 128 x 128 block.

    total += (x block . q block) * x scale * W scale           for each 128 of K, in float32

The inner product of 128 terms is taken by the tensor core, and scaled and added outside of it: a
tensor core keeps fewer bits in its own float8 sums. Method: DeepSeek-V3 (arXiv 2412.19437, 3.3.2).

The other operand comes in one of three forms: `scaled` float8 with one scale per 1 x 128 block,
`quantize`: the same from a wider x, cast here with the bits of `quantize_fp8`, and `wide`: x is
left as it is and W is widened, exactly, to its dtype. Where instructions take e4m3fnuz, in which
the same bits mean half, they are given to them as they are and the sums multiplied by four.

Shape letters: M rows, N outputs, K inputs, G blocks of 128 inputs.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from . import expert_tiles
from .arch import Arch, arch_of
from .expert_tiles import Config, Problem
from .lang import tl, triton
from .launch import cdiv, require
from .quantize import BLOCK, quantize_rows


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates that sum 128 by 128, the default first."""
    if arch.is_cpu:
        return [replace(c, depth=BLOCK) for c in expert_tiles.configs(problem, arch)]
    found = [c for c in expert_tiles.configs(problem, arch) if c.depth == BLOCK]
    return [c for c in found if feasible(c, arch)]


def feasible(config: Config, arch: Arch) -> bool:
    """Whether the stages fit shared memory with an x of two bytes."""
    stage = (2 * config.rows + config.columns) * BLOCK
    held = arch.buffers(config.num_stages)
    return stage * held <= arch.shared_bytes - 2048


def gated_configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates whose tiles hold 128 pairs of gate and up: a whole block of SwiGLU's output."""
    if arch.is_cpu:
        return [replace(c, columns=2 * BLOCK) for c in configs(problem, arch)]
    # AMD's matrix instructions take their operands from the registers that hold the sums
    most = 32 if arch.backend == "hip" else 128
    found = configs(problem, arch)
    return [c for c in found if c.columns == 2 * BLOCK and c.num_warps == 8 and c.rows <= most]


@triton.jit
def fnuz_bits(bits):
    """Bits of half of an e4m3fn number in e4m3fnuz: the same, but for -0 and NaN."""
    nan = (bits & 0x7F) == 0x7F
    return tl.where(nan, 0x80, tl.where(bits == 0x80, 0, bits)).to(tl.uint8)


@triton.jit
def dot_fp8(a, b, FNUZ: tl.constexpr):
    """float32 products of e4m3fn tiles."""
    if FNUZ:
        a = fnuz_bits(a.to(tl.uint8, bitcast=True)).to(tl.float8e4b8, bitcast=True)
        b = fnuz_bits(b.to(tl.uint8, bitcast=True)).to(tl.float8e4b8, bitcast=True)
        return tl.dot(a, b) * 4.0
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def product_fp8(
    x_MK, x_scales_MG, w_NK, w_scales_NG, source, n, K, x_stride, x_scale_stride,
    n_stride, k_stride, n_scale_stride, k_scale_stride,
    FORM: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 sums of rows `source` of x with rows `n` of w.

    `TRANSPOSED`: rows of w are dense. `ONE_BLOCK`: rows `n` lie in one block of 128.
    """
    k = tl.arange(0, 128)
    x = x_MK + source.to(tl.int64)[:, None] * x_stride + k[None, :]
    x_scale = x_scales_MG + source.to(tl.int64) * x_scale_stride
    block = (n // 128).to(tl.int64)
    w_scale = w_scales_NG + (tl.min(block, 0) if ONE_BLOCK else block[None, :]) * n_scale_stride
    if TRANSPOSED:
        w = w_NK + n.to(tl.int64)[:, None] * n_stride + k[None, :]
    else:
        w = w_NK + n.to(tl.int64)[None, :] + k.to(tl.int64)[:, None] * k_stride
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, 128):
        if WHOLE:
            a, b = tl.load(x), tl.load(w)
        else:
            live = k < K - start
            a = tl.load(x, mask=live[None, :], other=0.0)
            b = tl.load(w, mask=live[None, :] if TRANSPOSED else live[:, None], other=0.0)
        scale = tl.load(w_scale)
        if FORM == "quantize" or FORM == "quantize fnuz":
            a, rows_scale = quantize_rows(a.to(tl.float32), BLOCK_M, 128, POWER_OF_TWO)
            scale = rows_scale * scale
        elif FORM != "wide":
            scale = tl.load(x_scale)[:, None] * scale
        if FORM == "wide":
            b = b.to(a.dtype)
        if TRANSPOSED:
            b = tl.trans(b)
        total += dot_fp8(a, b, FORM == "scaled fnuz" or FORM == "quantize fnuz") * scale
        x += 128
        w += 128 * k_stride
        x_scale += 1
        w_scale += k_scale_stride
    return total


def has_fp8(x: Tensor) -> bool:
    """Whether kernels on the device of `x` can load float8; where not, ops run their reference."""
    return arch_of(x.device).fp8


def form_of(name: str, x: Tensor) -> str:
    """`name` as the kernels on the device of `x` know it."""
    return f"{name} fnuz" if arch_of(x.device).fnuz and name != "wide" else name


def check_scales(weight: Tensor, scales: Tensor) -> None:
    """Raises ValueError unless `scales` has one number per 128 x 128 block of `weight`."""
    *batch, n, k = weight.shape
    blocks = [*batch, cdiv(n, BLOCK), cdiv(k, BLOCK)]
    require(weight.element_size() == 1 and weight.is_floating_point(),
            f"weight must be float8_e4m3fn, got {weight.dtype}")  # fmt: skip
    require(list(scales.shape) == blocks and scales.itemsize == 4,
            f"scales must be float32 {blocks} for weight {list(weight.shape)}, got "
            f"{scales.dtype} {list(scales.shape)}")  # fmt: skip
