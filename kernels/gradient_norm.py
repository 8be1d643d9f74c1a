"""The joint norm of many tensors, and scaling them to a limit, without asking the device.

    norm = sqrt(sum over all elements of x^2)
    x    = x * min(1, limit / (norm + 1e-6))

One launch sums the squares of each chunk in float32; the sum over chunks is in float64, in a fixed
order. Where nothing exceeds the limit, the second launch reads the norm and returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import choose
from .lang import jit, tl
from .launch import empty, on, register, require
from .tables import pick
from .tensor_list import TYPES, chunk, configs, pointer, same_kind, table_of

EPSILON = 1e-6
"""Added to the norm, as torch.nn.utils.clip_grad_norm_ does."""


def gradient_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of all elements, in float32 or, for float64, in float64."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.stack([t.square().sum().to(wide[0].device) for t in wide]).sum().sqrt()


def clip_gradients_reference(tensors: Sequence[Tensor], *, limit: float) -> Tensor:
    """Scale in place so that the norm is at most `limit`; returns the norm before."""
    norm = gradient_norm_reference(tensors)
    factor = (limit / (norm + EPSILON)).clamp(max=1.0)
    for t in tensors:
        t.mul_(factor.to(t.device))
    return norm


@jit
def _squares_kernel(rows_L2, chunks_C2, sums_C, X: tl.constexpr, ALIGNED: tl.constexpr,
                    BLOCK: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    row, start, count = chunk(rows_L2, chunks_C2, 2, BLOCK * STEPS)
    x_N = pointer(row, 0, X, ALIGNED)
    whole = start + BLOCK * STEPS <= count
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        if whole:
            x = tl.load(x_N + at).to(tl.float32)
        else:
            x = tl.load(x_N + at, mask=at < count, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums_C + tl.program_id(0), tl.sum(total, 0))


@jit
def _scale_kernel(rows_L2, chunks_C2, norm, limit, X: tl.constexpr, ALIGNED: tl.constexpr,
                  BLOCK: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    factor = tl.div_rn(limit, tl.load(norm) + 1e-6)
    row, start, count = chunk(rows_L2, chunks_C2, 2, BLOCK * STEPS)
    x_N = pointer(row, 0, X, ALIGNED)
    whole = start + BLOCK * STEPS <= count
    # a norm that is NaN must reach the tensors
    if (factor < 1.0) | (factor != factor):
        for step in range(STEPS):
            at = start + step * BLOCK + tl.arange(0, BLOCK)
            if whole:
                x = tl.load(x_N + at).to(tl.float32) * factor
                tl.store(x_N + at, x.to(X))
            else:
                x = tl.load(x_N + at, mask=at < count, other=0.0).to(tl.float32) * factor
                tl.store(x_N + at, x.to(X), mask=at < count)


def _norm(tensors: list[Tensor]) -> Tensor:
    sums = []
    for (part,) in same_kind([[t.contiguous() for t in tensors]]):
        config = pick("gradient_norm", configs, None, part[0].device)
        table = table_of([part], config.chunk)
        found = empty(len(table.chunks_C2), like=part[0], dtype=torch.float32)
        with on(part[0]):
            _squares_kernel[(len(found),)](
                table.rows_LA, table.chunks_C2, found, X=TYPES[part[0].dtype],
                ALIGNED=table.aligned, BLOCK=config.block, STEPS=config.steps,
                num_warps=config.num_warps,
            )  # fmt: skip
        sums.append(found.sum(dtype=torch.float64).to(tensors[0].device))
    if not sums:
        return torch.zeros((), device=tensors[0].device)
    return torch.stack(sums).sum().sqrt().float()


def _clip(tensors: list[Tensor], limit: float) -> Tensor:
    norm = _norm(tensors)
    for t in tensors:
        if not t.is_contiguous():
            t.mul_((limit / (norm.to(t.device) + EPSILON)).clamp(max=1.0))
    for (part,) in same_kind([[t for t in tensors if t.is_contiguous()]]):
        config = pick("clip_gradients", configs, None, part[0].device)
        table = table_of([part], config.chunk)
        with on(part[0]):
            _scale_kernel[(len(table.chunks_C2),)](
                table.rows_LA, table.chunks_C2, norm.to(part[0].device), limit,
                X=TYPES[part[0].dtype], ALIGNED=table.aligned, BLOCK=config.block,
                STEPS=config.steps, num_warps=config.num_warps,
            )  # fmt: skip
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
    return norm


_gradient_norm = register(
    "gradient_norm(Tensor[] tensors) -> Tensor",
    _norm,
    fake=lambda tensors: tensors[0].new_empty((), dtype=torch.float32),
)
_clip_gradients = register(
    "clip_gradients(Tensor(a!)[] tensors, float limit) -> Tensor",
    _clip,
    fake=lambda tensors, limit: tensors[0].new_empty((), dtype=torch.float32),
)


@torch.no_grad()
def gradient_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of all elements of all tensors together, a number on the device of the first.

    Args:
        tensors: any shapes and strides, float32, bfloat16 or float16, mixed; with one in float64
            the reference runs.

    Returns:
        [] float32. The same bits for the same tensors; zero for no tensors.
    """
    if not tensors:
        return torch.zeros(())
    if any(choose(t) == "reference" for t in tensors):
        return gradient_norm_reference(tensors)
    return _gradient_norm(list(tensors))


@torch.no_grad()
def clip_gradients(tensors: Sequence[Tensor], *, limit: float) -> Tensor:
    """Scale all tensors in place so that their joint norm is at most `limit`.

    Arguments and result are those of `gradient_norm`: the norm before. A norm that is not finite
    makes all elements zero or NaN.

    Raises:
        ValueError: limit is not above zero.
    """
    require(limit > 0, f"limit must be above zero, got {limit}")
    if not tensors:
        return torch.zeros(())
    if any(choose(t) == "reference" for t in tensors):
        return clip_gradients_reference(tensors, limit=limit)
    return _clip_gradients(list(tensors), float(limit))
