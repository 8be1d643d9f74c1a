"""The gradient of `rmsnorm.py`.

With n = s / sqrt(mean(s^2) + eps) and g = dy * weight: ds = (g - n mean(g n)) / sqrt(...) and
dweight = sum over rows of dy * n, by partial sums per program and a second reduction. n is computed
again, and not rounded: what is left after the projection is subtracted may be small beside it.

Shape letters: T rows, N columns, P programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elementwise import share
from .lang import jit, tl
from .launch import cdiv, empty, on, rows


@jit
def _dot_kernel(grad_TN, x_TN, weight_N, rstd_T, dot_T, N, grad_stride, x_stride,
                BLOCK: tl.constexpr):  # fmt: skip
    """mean(g n) of one row in pieces."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_T + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_TN + row * grad_stride + at, mask=at < N, other=0.0).to(tl.float32)
        x = tl.load(x_TN + row * x_stride + at, mask=at < N, other=0.0).to(tl.float32)
        weight = tl.load(weight_N + at, mask=at < N, other=0.0).to(tl.float32)
        total += grad * weight * (x * rstd)
    tl.store(dot_T + row, tl.sum(total, 0) / N)


@jit
def _backward_kernel(
    grad_TN, sum_grad_TN, x_TN, weight_N, rstd_T, dot_T, out_TN, partial_PN,
    T, N, grad_stride, sum_grad_stride, x_stride,
    SUM_GRAD: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The input's gradient of this program's rows, and their share of dweight."""
    first, end = share(T)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    weight = tl.load(weight_N + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(first, end):
        grad = tl.load(grad_TN + row * grad_stride + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_TN + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_T + row)
        normed = x * rstd
        scaled = grad * weight
        dot = tl.sum(scaled * normed, 0) / N if WHOLE else tl.load(dot_T + row)
        out = (scaled - normed * dot) * rstd
        if SUM_GRAD:
            out += tl.load(sum_grad_TN + row * sum_grad_stride + at, mask=mask, other=0.0)
        total += grad * normed
        tl.store(out_TN + row * N + at, out.to(out_TN.dtype.element_ty), mask=mask)
    tl.store(partial_PN + tl.program_id(0).to(tl.int64) * N + at, total, mask=mask)


def backward(
    grad: Tensor, sum_grad: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    *, block: int, programs: int, num_warps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the normed tensor and of the weight, by tiles of `block` columns."""
    columns, flat, grads = x.shape[-1], rows(x), rows(grad)
    sums = grads if sum_grad is None else rows(sum_grad)
    count, rstd = len(flat), rstd.reshape(-1).contiguous()
    whole = block >= columns
    programs = max(1, min(programs, count))
    out = empty(count, columns, like=x)
    partial = empty(programs, columns, like=x, dtype=torch.float32)
    dot = empty(0 if whole else count, like=x, dtype=torch.float32)
    weight = weight.contiguous()
    if not count or not columns:
        return out.view(x.shape), torch.zeros_like(weight)
    with on(x):
        if not whole:
            _dot_kernel[(count,)](grads, flat, weight, rstd, dot, columns, grads.stride(0),
                                  flat.stride(0), BLOCK=block,
                                  num_warps=num_warps)  # fmt: skip
        _backward_kernel[(programs, cdiv(columns, block))](
            grads, sums, flat, weight, rstd, dot, out, partial,
            count, columns, grads.stride(0), sums.stride(0), flat.stride(0),
            SUM_GRAD=sum_grad is not None, WHOLE=whole, BLOCK=block,
            num_warps=num_warps,
        )  # fmt: skip
    return out.view(x.shape), partial.sum(0).to(weight.dtype)
