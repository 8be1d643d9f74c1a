"""A fused AdamW step over many tensors in one launch, in place.

    p = p (1 - lr decay)
    m = m + (1 - b1) (g - m),  v = b2 v + (1 - b2) g^2
    p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

All in float32, each of p, m and v rounded once to its own dtype; every element is read and written
once. Source: Loshchilov & Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import choose
from .lang import jit, tl, triton
from .launch import on, register, require
from .tables import pick
from .tensor_list import TYPES, chunk, configs, pointer, same_kind, table_of


def adamw_reference(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor],
    means: Sequence[Tensor], squares: Sequence[Tensor],
    *, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One step in place, tensor by tensor, in the dtype of each."""
    beta1, beta2 = betas
    for p, g, m, v in zip(parameters, gradients, means, squares, strict=True):
        grad = g.to(m.dtype)
        p.mul_(1 - lr * weight_decay)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        deviation = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
        p.addcdiv_(m, deviation, value=-lr / (1 - beta1**step))


@triton.jit
def _update(
    p_N, g_N, m_N, v_N, at, mask, keep, share, beta2, rest2, lr, correction, eps
):  # fmt: skip
    g = tl.load(g_N + at, mask=mask).to(tl.float32)
    m = tl.load(m_N + at, mask=mask).to(tl.float32)
    # from the nearer end, in one rounding: mean and gradient may cancel
    m = tl.fma(g - m, share, tl.where(share > 0, m, g))
    v = tl.load(v_N + at, mask=mask).to(tl.float32) * beta2 + g * g * rest2
    p = tl.load(p_N + at, mask=mask).to(tl.float32) * keep
    p -= lr * tl.div_rn(m, tl.sqrt_rn(v) * correction + eps)
    tl.store(m_N + at, m.to(m_N.dtype.element_ty), mask=mask)
    tl.store(v_N + at, v.to(v_N.dtype.element_ty), mask=mask)
    tl.store(p_N + at, p.to(p_N.dtype.element_ty), mask=mask)


@jit
def _kernel(
    rows_L5, chunks_C2, keep, share, beta2, rest2, lr, correction, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row, start, count = chunk(rows_L5, chunks_C2, 5, BLOCK * STEPS)
    p, g = pointer(row, 0, P, ALIGNED), pointer(row, 1, G, ALIGNED)
    m, v = pointer(row, 2, M, ALIGNED), pointer(row, 3, V, ALIGNED)
    whole = start + BLOCK * STEPS <= count
    for step in range(STEPS):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        if whole:
            _update(p, g, m, v, at, None, keep, share, beta2, rest2, lr, correction, eps)
        else:
            _update(p, g, m, v, at, at < count, keep, share, beta2, rest2, lr, correction, eps)


def _adamw(
    parameters: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor],
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    gradients = [g.contiguous() for g in gradients]
    for part in same_kind([parameters, gradients, means, squares]):
        first = part[0][0]
        config = pick("adamw_step", configs, None, first.device)
        table = table_of(part, config.chunk)
        p, g, m, v = (TYPES[tensors[0].dtype] for tensors in part)
        with on(first):
            _kernel[(len(table.chunks_C2),)](
                table.rows_LA, table.chunks_C2, 1 - lr * weight_decay,
                1 - beta1 if beta1 > 0.5 else -beta1, beta2, 1 - beta2,
                lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps,
                P=p, G=g, M=m, V=v, ALIGNED=table.aligned,
                BLOCK=config.block, STEPS=config.steps, num_warps=config.num_warps,
            )  # fmt: skip
    written = [t for t in (*parameters, *means, *squares) if not t.is_inference()]
    torch.autograd.graph.increment_version(written)


_adamw_step = register(
    "adamw_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means,"
    " Tensor(c!)[] squares, int step, float lr, float beta1, float beta2, float eps,"
    " float weight_decay) -> ()",
    _adamw,
    fake=lambda *arguments: None,
)


def _fused(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the kernel takes a parameter with this gradient and state."""
    parameter, _, mean, square = tensors
    return all(choose(t) == "triton" for t in tensors) and all(
        t.is_contiguous() for t in (parameter, mean, square)
    )


@torch.no_grad()
def adamw_step(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor],
    means: Sequence[Tensor], squares: Sequence[Tensor],
    *, step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """One AdamW step in place, the maths of torch.optim.AdamW.

    Args:
        parameters: any shapes and dtypes; those in float64 or not contiguous run the reference.
        gradients, means, squares: one each per parameter, of its shape. State in float32 serves
            parameters in bfloat16 best: a mean square takes steps that bfloat16 rounds away.
        step: counts from 1.
        lr, betas, eps, weight_decay: numbers of the host; a captured graph keeps those it saw.

    Raises:
        ValueError: lengths or shapes differ, or `step` is below 1.
    """
    lists = parameters, gradients, means, squares
    counts = [len(x) for x in lists]
    require(len(set(counts)) == 1,
            f"need one gradient, mean and square per parameter, got {counts}")  # fmt: skip
    require(step >= 1, f"step counts from 1, got {step}")
    rows = list(zip(*lists, strict=True))
    for i, row in enumerate(rows):
        shapes = [tuple(t.shape) for t in row]
        require(len(set(shapes)) == 1, f"tensors of parameter {i} differ in shape: {shapes}")
    numbers: dict[str, Any] = {"step": step, "lr": lr, "betas": betas, "eps": eps,
                               "weight_decay": weight_decay}  # fmt: skip
    plain = [row for row in rows if not _fused(row)]
    if plain:
        adamw_reference(*map(list, zip(*plain, strict=True)), **numbers)
    fused = [row for row in rows if _fused(row)]
    if fused:
        _adamw_step(*map(list, zip(*fused, strict=True)), step, float(lr), *map(float, betas),
                    float(eps), float(weight_decay))  # fmt: skip
