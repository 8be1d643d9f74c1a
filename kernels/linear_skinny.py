"""Linear layer for a few rows: y = x W^T with the weights streamed once; for inference.

    y[m, n] = sum over k of x[m, k] W[n, k]            in float32, cast to the dtype of x

With 1 to 16 rows the time is that of reading W. A program takes some rows of W and all of x; the
rows of x are not padded where the processor takes odd tiles (CPUs), and to 16 where it does not.

Shape letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .expert_tiles import product
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .tables import pick

MOST_ROWS = 16
"""Above it a matrix product is bound by arithmetic, and PyTorch's own is the better one."""


@dataclass(frozen=True)
class Problem:
    """`rows` (a power of two) times weights [`columns`, `depth`] of `size` bytes."""

    rows: int
    columns: int
    depth: int
    size: int


@dataclass(frozen=True)
class Config:
    """`columns` rows of W per program and `depth` inputs per step, for tiles of `rows` of x."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates, the default first: many small programs, so that all memory channels are busy."""
    depth = min(triton.next_power_of_2(max(16, problem.depth)), 512 // problem.size)
    if arch.is_cpu:
        # long pieces of rows of W, as much of x as the first-level cache holds, and no masks
        whole, most = problem.depth & -problem.depth, 16384 // (problem.rows * problem.size)
        deep = max(depth, min(whole, most, 4096))
        return [Config(problem.rows, 128, deep, 4, 1), Config(problem.rows, 64, deep, 4, 1)]
    found = [
        Config(max(16, problem.rows), columns, step, 4, stages)
        for columns in (32, 64, 16, 128)
        for stages in (5, 4, 3, 2)
        for step in (depth, depth // 2)
    ]
    return [c for c in found if feasible(c, problem, arch)]


def feasible(config: Config, problem: Problem, arch: Arch) -> bool:
    """Whether the stages fit shared memory."""
    stage = (config.rows + config.columns) * config.depth * problem.size
    return stage * arch.buffers(config.num_stages) <= arch.shared_bytes - 2048


def problem_of(x: Tensor, weight: Tensor) -> Problem:
    return Problem(triton.next_power_of_2(max(1, len(x))), *weight.shape, weight.itemsize)


def linear_skinny_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the dtype of x."""
    return torch.nn.functional.linear(x, weight)


@jit(do_not_specialize=["M"])
def _kernel(
    x_MK, w_NK, out_MN, M, N, K, x_stride, n_stride, k_stride, TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = product(x_MK, w_NK, tl.minimum(m, M - 1), tl.minimum(n, N - 1), K, x_stride, n_stride,
                    k_stride, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE)  # fmt: skip
    out = out_MN + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, total.to(out_MN.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    require(weight.dim() == 2 and weight.shape[1] == x.shape[-1] and weight.dtype == x.dtype,
            f"weight must be {x.dtype} [N, {x.shape[-1]}], got {weight.dtype} "
            f"{list(weight.shape)}")  # fmt: skip
    flat, (columns, depth) = rows(x), weight.shape
    weight = weight if 1 in weight.stride() else weight.contiguous()
    out = empty(len(flat), columns, like=x)
    config: Config = pick("linear_skinny", configs, problem_of(flat, weight), x.device)
    if out.numel():
        grid = cdiv(columns, config.columns), cdiv(len(flat), config.rows)
        with on(x):
            _kernel[grid](
                flat, weight, out, len(flat), columns, depth, flat.stride(0), *weight.stride(),
                TRANSPOSED=weight.stride(1) == 1, WHOLE=depth % config.depth == 0,
                BLOCK_M=config.rows, BLOCK_N=config.columns, BLOCK_K=config.depth,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return out.view(*x.shape[:-1], columns)


_linear = register(
    "linear_skinny(Tensor x, Tensor weight) -> Tensor",
    _forward,
    fake=lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]),
)


@torch.no_grad()
def linear_skinny(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for few rows; not differentiable.

    Args:
        x: [..., K] float32, bfloat16 or float16 of at most a few times 16 rows; float64 and more
            rows are correct as well, and slower than `torch.nn.functional.linear`.
        weight: [N, K] in the dtype of x.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: weight does not fit.
    """
    if choose(x, op="linear_skinny") == "reference":
        return linear_skinny_reference(x, weight)
    return _linear(x, weight)
