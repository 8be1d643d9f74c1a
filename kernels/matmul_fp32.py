"""Matrix product with exact products and float32 sums, of operands in any of the kernels' dtypes.

    out = sum over pieces of k of a[:, piece] @ b[piece, :]

Operands of one 16-bit dtype are multiplied as they are: such products are exact in float32, so
this is the product of the widened matrices without widening them. Otherwise both are widened in
registers; or, on GPUs, a float32 operand beside a bfloat16 one is split into three bfloat16 parts
that add up to it exactly (8 + 8 + 8 bits), so that tensor cores take it. Few output tiles are
divided further along k, into partial results that the caller adds in a fixed order.

Shape letters: M, N, K of the product, S pieces of K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import Arch
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, require
from .tables import pick

FEW_ROWS = 8
"""Up to so many rows of a, dot products are added up without tiles."""
Problem = tuple[int, int, int, bool]


@dataclass(frozen=True)
class Config:
    """Tile of m x n, steps of k, `pieces` that k is divided into; `three`: split into bfloat16."""

    m: int
    n: int
    k: int
    pieces: int
    three: bool
    num_warps: int
    num_stages: int


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates for (M, N, K, whether the operands are 16-bit of one dtype), the default first."""
    m, n, k, narrow = problem
    least = 1 if arch.is_cpu else 16
    tall = min(128 if arch.is_cpu else 64, max(least, triton.next_power_of_2(m)))
    found = []
    # products in float32 take registers: narrower tiles, more threads
    few = narrow or arch.is_cpu
    for wide in (128, 64, 32) if few else (64, 128, 32):
        wide = max(16, min(wide, triton.next_power_of_2(n)))
        step = 64 if few else 32
        step = max(16, min(step, triton.next_power_of_2(k)))
        tiles = max(1, cdiv(m, tall) * cdiv(n, wide))
        pieces = max(1, min(arch.processors * (1 if arch.is_cpu else 2) // tiles, k // (4 * step)))
        for warps in (4, 8) if few else (8, 4):
            found.append(Config(tall, wide, step, pieces, not arch.is_cpu, warps, 3))
    return found


@dataclass(frozen=True)
class FewRowsConfig:
    """Tile of n columns, steps of k."""

    n: int
    k: int
    num_warps: int


def few_rows_configs(k: int, arch: Arch) -> list[FewRowsConfig]:
    """Candidates for rows of k elements, the default first."""
    if arch.is_cpu:
        return [FewRowsConfig(n, step, 4) for n in (1, 2, 4) for step in (512, 256)]
    return [FewRowsConfig(n, 1024, w) for n in (1, 2) for w in (4, 8)]


@jit
def _matmul_kernel(
    a_MK, b_KN, out_SMN, M, N, K, part, a_m, a_k, b_k, b_n, zero,
    SAME: tl.constexpr, THREE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Each step is summed on its own and then joins the total: one long chain would round worse.

    `zero` is 0; of a constant one the compiler would make that chain.
    """
    piece = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    a_MK += row[:, None] * a_m
    b_KN += column[None, :] * b_n
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(piece * part, tl.minimum(K, (piece + 1) * part), BK):
        at = start + inner
        mask = at < K
        a = tl.load(a_MK + at[None, :] * a_k, mask=(row[:, None] < M) & mask[None, :], other=0)
        b = tl.load(b_KN + at[:, None] * b_k, mask=mask[:, None] & (column[None, :] < N), other=0)
        partial = tl.full([BM, BN], zero, tl.float32)
        if SAME:
            partial = tl.dot(a, b, partial, input_precision="ieee")
        elif THREE:
            high = a.to(tl.bfloat16)
            rest = a - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            partial = tl.dot(low, b, partial)
            partial = tl.dot(middle, b, partial)
            partial = tl.dot(high, b, partial)
        else:
            wide = b.to(tl.float32)
            partial = tl.dot(a.to(tl.float32), wide, partial, input_precision="ieee")
        total += partial
    out_SMN += (piece * M + row[:, None]) * N + column[None, :]
    mask = (row[:, None] < M) & (column[None, :] < N)
    tl.store(out_SMN, total.to(out_SMN.dtype.element_ty), mask=mask)


@jit
def _few_rows_kernel(
    a_MK, b_KN, out_MN, N, K, a_m, b_n, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One row of a by BN columns of b, both contiguous along k."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    live = column[:, None] < N
    total = tl.zeros([BN, BK], tl.float32)
    for start in range(0, K, BK):
        at = start + tl.arange(0, BK)[None, :]
        a = tl.load(a_MK + row * a_m + at, mask=at < K, other=0).to(tl.float32)
        b = tl.load(b_KN + column[:, None] * b_n + at, mask=live & (at < K), other=0)
        total += a * b.to(tl.float32)
    tl.store(out_MN + row * N + column, tl.sum(total, 1).to(out_MN.dtype.element_ty), column < N)


def matmul_parts(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[S, M, N] partial products of a [M, K] and b [K, N] of any strides, in float32.

    With `dtype`, an unpartitioned product is rounded to it.
    """
    (m, k), n = a.shape, b.shape[1]
    require(b.shape[0] == k, f"cannot multiply {tuple(a.shape)} and {tuple(b.shape)}")
    same = a.dtype == b.dtype
    narrow = same and a.dtype != torch.float32
    if m <= FEW_ROWS and a.stride(1) == b.stride(0) == 1:
        return _few_rows(a, b, dtype or torch.float32)
    config = pick("matmul_fp32", configs, (m, n, k, narrow), a.device)
    part = cdiv(cdiv(k, config.pieces), config.k) * config.k
    pieces = max(1, cdiv(k, max(1, part)))
    out = empty(pieces, m, n, like=a, dtype=dtype if dtype and pieces == 1 else torch.float32)
    three = config.three and a.dtype == torch.float32 and b.dtype == torch.bfloat16
    if out.numel():
        with on(a):
            _matmul_kernel[(cdiv(m, config.m), cdiv(n, config.n), pieces)](
                a, b, out, m, n, k, part, *a.stride(), *b.stride(), 0.0, SAME=same, THREE=three,
                BM=config.m, BN=config.n, BK=config.k,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return out


def _few_rows(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    out = empty(1, m, n, like=a, dtype=dtype)
    config = pick("matmul_few_rows", few_rows_configs, k, a.device)
    if out.numel():
        with on(a):
            _few_rows_kernel[(m, cdiv(n, config.n))](
                a, b, out, n, k, a.stride(0), b.stride(1), BN=config.n, BK=config.k,
                num_warps=config.num_warps,
            )  # fmt: skip
    return out


def matmul_fp32(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed in float32 and rounded once to `dtype`."""
    parts = matmul_parts(a, b, dtype)
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)
