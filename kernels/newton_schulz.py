"""Batched Newton-Schulz iteration: roughly U V^T of each matrix's singular value decomposition.

    X = M / |M|                                     Frobenius norm; rows <= columns, else M^T
    repeat:  G = X X^T;  B = b G + c G G^T;  X = a X + B X

G and B are symmetric, so only the tiles on and under the diagonal are computed and mirrored: the
first two products cost half. All matrices of a batch (the experts of a layer) are one launch.
Operands are rounded to `dtype` (bfloat16), sums are float32.

Coefficients and method: Muon (kellerjordan.github.io/posts/muon); symmetric products as in
github.com/nil0x9/flash-muon.

Shape letters: E matrices, M rows, N columns, K the summed dimension.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require
from .tables import pick

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Config:
    """Output tiles of `block` x `block`, summed in steps of `depth`."""

    block: int
    depth: int
    num_warps: int
    num_stages: int


def configs(rows: int, arch: Arch) -> list[Config]:
    """Candidates for matrices whose shorter side is `rows`, the default first."""
    if arch.is_cpu:
        return [Config(min(128, max(16, triton.next_power_of_2(rows))), 64, 4, 1)]
    found = (Config(*c) for c in itertools.product((128, 64), (64, 32), (8, 4), (3, 4, 2)))
    return [c for c in found if feasible(c, rows, arch)]


def feasible(config: Config, rows: int, arch: Arch) -> bool:
    """Whether the operands of all stages fit shared memory and a tile is not mostly padding."""
    operands = 2 * config.block * config.depth * 2 * config.num_stages
    large = config.block <= 64 or rows > 64
    return large and operands <= arch.shared_bytes and config.block * config.block >= (
        1024 * config.num_warps
    )  # fmt: skip


def newton_schulz_reference(
    matrices: Tensor, *, steps: int = 5, eps: float = 1e-7, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The iteration on [..., rows, columns]; float64 matrices are computed in float64."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = _normalized(matrices.mT if tall else matrices, eps)
    x = x if x.dtype == torch.float64 else x.to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _normalized(x: Tensor, eps: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)


@jit
def _symmetric_kernel(
    x_EMK, gram_EMM, out_EMM, M, K, x_stride, alpha, beta,
    ADD: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = alpha X X^T (+ beta gram), one tile on or under the diagonal and its mirror image."""
    i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j > i:
        return
    x_EMK += e * M * x_stride
    row, column = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(x_EMK + row[:, None].to(tl.int64) * x_stride + k[None, :],
                       mask=(row[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        right = tl.load(x_EMK + column[:, None].to(tl.int64) * x_stride + k[None, :],
                        mask=(column[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    at = e * M * M + row[:, None].to(tl.int64) * M + column[None, :]
    mask = (row[:, None] < M) & (column[None, :] < M)
    total *= alpha
    if ADD:
        total += beta * tl.load(gram_EMM + at, mask=mask, other=0.0).to(tl.float32)
    out = total.to(out_EMM.dtype.element_ty)
    tl.store(out_EMM + at, out, mask=mask)
    if i != j:
        mirror = e * M * M + column[:, None].to(tl.int64) * M + row[None, :]
        mask = (column[:, None] < M) & (row[None, :] < M)
        tl.store(out_EMM + mirror, tl.trans(out), mask=mask)


@jit
def _apply_kernel(
    b_EMM, x_EMN, out_EMN, M, N, x_stride, out_stride, alpha,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = alpha X + B X, one tile."""
    i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    x_EMN += e * M * x_stride
    row, column = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, M, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(b_EMM + e * M * M + row[:, None].to(tl.int64) * M + k[None, :],
                       mask=(row[:, None] < M) & (k[None, :] < M), other=0.0)  # fmt: skip
        right = tl.load(x_EMN + k[:, None].to(tl.int64) * x_stride + column[None, :],
                        mask=(k[:, None] < M) & (column[None, :] < N), other=0.0)  # fmt: skip
        total = tl.dot(left, right, total, input_precision="ieee")
    mask = (row[:, None] < M) & (column[None, :] < N)
    own = row[:, None].to(tl.int64) * x_stride + column[None, :]
    total += alpha * tl.load(x_EMN + own, mask=mask, other=0.0).to(tl.float32)
    at = e * M * out_stride + row[:, None].to(tl.int64) * out_stride + column[None, :]
    tl.store(out_EMN + at, total.to(out_EMN.dtype.element_ty), mask=mask)


def _iterate(x: Tensor, steps: int) -> Tensor:
    """The iteration on contiguous [E, M, N] with M <= N and norm at most 1."""
    require(x.dim() == 3 and x.is_contiguous(), "x must be a contiguous [E, M, N]")
    a, b, c = COEFFICIENTS
    count, m, n = x.shape
    config = pick("newton_schulz", configs, m, x.device)
    tiles, wide = cdiv(m, config.block), cdiv(n, config.block)
    gram, mixed = (empty(count, m, m, like=x) for _ in "gb")
    spare = [empty(count, m, n, like=x) for _ in range(min(2, steps))]
    tile = {"BLOCK": config.block, "DEPTH": config.depth, "num_warps": config.num_warps,
            "num_stages": config.num_stages}  # fmt: skip
    for step in range(steps if x.numel() else 0):
        out = spare[step % 2]
        with on(x):
            _symmetric_kernel[(tiles, tiles, count)](
                x, x, gram, m, n, n, 1.0, 0.0, ADD=False, **tile
            )
            _symmetric_kernel[(tiles, tiles, count)](
                gram, gram, mixed, m, m, m, c, b, ADD=True, **tile
            )
            _apply_kernel[(tiles, wide, count)](mixed, x, out, m, n, n, n, a, **tile)
        x = out
    return x if steps and x.numel() else x.clone()


_newton_schulz = register(
    "newton_schulz(Tensor x, int steps) -> Tensor",
    _iterate,
    fake=lambda x, steps: x.new_empty(x.shape),
)


def newton_schulz(
    matrices: Tensor, *, steps: int = 5, eps: float = 1e-7, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Matrices with the singular vectors of the given ones and singular values near 1.

    Values above about 1e-3 of the Frobenius norm end between 0.7 and 1.2, which is what Muon needs.
    A zero matrix stays zero. Not differentiable.

    Args:
        matrices: [..., rows, columns], any strides; float64 runs the reference.
        steps: iterations.
        eps: least norm that is divided by.
        dtype: of the operands of the products.

    Returns:
        The shape and dtype of `matrices`.

    Raises:
        ValueError: fewer than two dimensions.
    """
    if matrices.dim() < 2:
        raise ValueError(f"matrices must be [..., rows, columns], got {tuple(matrices.shape)}")
    if choose(matrices) == "reference":
        return newton_schulz_reference(matrices, steps=steps, eps=eps, dtype=dtype)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = _normalized(matrices.mT if tall else matrices, eps).to(dtype)
    out = _newton_schulz(x.reshape(-1, *x.shape[-2:]).contiguous(), steps).view(x.shape)
    return (out.mT if tall else out).to(matrices.dtype)
