"""The largest of a row of logits: greedy decoding, as one kernel that a recorded step can hold.

    argmax(x)[n] = the lowest v with x[n, v] = max x[n]; -1 if a logit is NaN or infinite

Shape letters: N rows, V columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose
from .lang import jit, tl
from .launch import empty, on, register, require, rows

BLOCK = 1024


def argmax_reference(x: Tensor) -> Tensor:
    """PyTorch's argmax takes the first of equal values."""
    return torch.where(x.isfinite().all(-1), x.argmax(-1), -1)


@jit
def _kernel(x_NV, out_N, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_NV + row * stride + at, mask=at < V, other=0.0).to(tl.float32)
        # also false for NaN
        finite = tl.abs(x) < float("inf")
        wrong = tl.where(finite, wrong, 1)
        better = (x > best) & (at < V)
        place = tl.where(better, at, place)
        best = tl.where(better, x, best)
    top = tl.max(best, 0)
    index = tl.min(tl.where(best == top, place, V), 0)
    index = tl.where(tl.max(wrong, 0) > 0, -1, index)
    tl.store(out_N + row, index.to(tl.int64))


def _forward(x: Tensor) -> Tensor:
    require(x.dim() >= 1 and x.shape[-1] > 0, f"need [..., V] with V > 0, got {list(x.shape)}")
    flat = rows(x)
    out = empty(len(flat), like=x, dtype=torch.int64)
    if len(flat):
        with on(x):
            _kernel[(len(flat),)](flat, out, flat.shape[1], flat.stride(0), BLOCK=BLOCK)
    return out.view(x.shape[:-1])


_argmax = register(
    "argmax(Tensor x) -> Tensor",
    _forward,
    fake=lambda x: x.new_empty(x.shape[:-1], dtype=torch.int64),
)


@torch.no_grad()
def argmax(x: Tensor) -> Tensor:
    """Index of the largest value of each row, the lowest among equals.

    Args:
        x: [..., V] of any floating-point dtype, V > 0.

    Returns:
        int64 [...]; -1 for a row with a value that is NaN or infinite.

    Raises:
        ValueError: V is 0.
    """
    if choose(x) == "reference":
        require(x.dim() >= 1 and x.shape[-1] > 0, f"need [..., V], V > 0, got {list(x.shape)}")
        return argmax_reference(x)
    return _argmax(x)
