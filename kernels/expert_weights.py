"""Gradient of experts' weights: dW[e] = dy_e^T x_e, summed in float32 over an expert's rows.

Both operands may be gathered in the loads: row m is read at order[m] // top_k. An expert without
rows gets zeros. One program owns one tile of one expert, so nothing is added across programs.

Shape letters: M sorted rows, E experts, N outputs, K inputs of the product.
"""

from __future__ import annotations

from torch import Tensor

from .arch import Arch
from .expert_tiles import Config, Problem, problem_of
from .lang import jit, tl
from .launch import cdiv, empty, on, rows
from .tables import pick


def weight_configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates for tiles of a weight's gradient, summed over rows; the default first."""
    if arch.is_cpu:
        # the left operand is transposed while it is packed: wide tiles use it longer
        depth = 64 if problem.rows >= 64 else 16
        widths = (256, 128) if problem.rows >= 64 else (128, 256)
        sizes = [(w, d) for w in widths for d in (depth, 2 * depth)]
        return [Config(128, 128, w, d, 1, 4, 1) for w, d in sizes]
    size = problem.size
    return [
        Config(side, side, side, depth, 1, 8 if side == 128 else 4, stages)
        for side in (128, 64)
        for depth in (64, 32, 128)
        for stages in (3, 2, 4)
        if 2 * side * depth * size * arch.buffers(stages) <= arch.shared_bytes - 2048
        and depth * size <= 256
    ]


@jit(do_not_specialize=["top_k"])
def _weight_gradient_kernel(
    grad_MN, x_MK, out_ENK, grad_order_M, x_order_M, offsets_E, N, K, top_k, grad_stride, x_stride,
    GATHER_GRAD: tl.constexpr, GATHER_X: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's gradient."""
    across = tl.cdiv(K, BLOCK_K)
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    end = tl.load(offsets_E + expert + 1)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for row in range(tl.load(offsets_E + expert), end, BLOCK_M):
        m = row + tl.arange(0, BLOCK_M)
        live = (m < end)[:, None]
        at = tl.load(grad_order_M + m, mask=m < end, other=0) // top_k if GATHER_GRAD else m
        grad = tl.load(grad_MN + at.to(tl.int64)[:, None] * grad_stride + n[None, :],
                       mask=live & (n < N)[None, :], other=0.0)  # fmt: skip
        at = tl.load(x_order_M + m, mask=m < end, other=0) // top_k if GATHER_X else m
        x = tl.load(x_MK + at.to(tl.int64)[:, None] * x_stride + k[None, :],
                    mask=live & (k < K)[None, :], other=0.0)  # fmt: skip
        total = tl.dot(tl.trans(grad), x, total, input_precision="ieee")
    out = out_ENK + expert * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out, total.to(out_ENK.dtype.element_ty), mask=mask)


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor,
    *, grad_order: Tensor | None = None, order: Tensor | None = None, top_k: int = 1,
) -> Tensor:  # fmt: skip
    """dW [E, N, K] in the dtype of `weight`; with an order, rows are read at order // top_k."""
    experts, columns, depth = weight.shape
    grad, x = rows(grad), rows(x)
    out = empty(experts, columns, depth, like=weight)
    problem = problem_of(max(len(grad), len(x)), weight)
    config: Config = pick("grouped_gemm_weight", weight_configs, problem, x.device)
    tiles = cdiv(columns, config.rows) * cdiv(depth, config.columns)
    if out.numel():
        with on(x):
            _weight_gradient_kernel[(tiles, experts)](
                grad, x, out, offsets if grad_order is None else grad_order,
                offsets if order is None else order, offsets, columns, depth, top_k,
                grad.stride(0), x.stride(0),
                GATHER_GRAD=grad_order is not None, GATHER_X=order is not None,
                BLOCK_M=config.depth, BLOCK_N=config.rows, BLOCK_K=config.columns,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return out
