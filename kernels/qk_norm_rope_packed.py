"""QK-norm + RoPE of packed projections [T, (Aq + 2 Ak) D]: queries, then keys, then values.

The values are copied out by the same launch, so that in the backward one kernel writes the whole
gradient of the projection: no slices to pad with zeros and add up. The maths is `qk_norm_rope`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .dispatch import choose
from .head_tiles import Turn
from .launch import empty, register, require
from .qk_norm_rope import backward, forward, qk_norm_rope_reference


def _heads(qkv: Tensor, dim: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the queries, keys and values as [T, A, D]."""
    require(qkv.dim() == 2, f"qkv must be [T, (Aq + 2 Ak) D], got {tuple(qkv.shape)}")
    width = qkv.shape[1]
    require(
        dim > 0 and key_heads > 0 and width % dim == 0 and width // dim > 2 * key_heads,
        f"{width} columns do not hold query heads and 2 x {key_heads} heads of {dim}",
    )
    heads = qkv.unflatten(1, (width // dim, dim))
    queries = width // dim - 2 * key_heads
    q, k, v = heads.split((queries, key_heads, key_heads), 1)
    return q, k, v


def _forward(qkv, q_weight, k_weight, cos, sin, positions, key_heads, eps):
    heads = _heads(qkv, q_weight.shape[-1], key_heads)
    return forward(*heads, q_weight, k_weight, Turn(cos, sin, positions), eps)


def _backward(q_grad, k_grad, v_grad, qkv, q_weight, k_weight, cos, sin, positions, key_heads, eps):
    out, dim = empty(*qkv.shape, like=qkv), q_weight.shape[-1]
    return out, *backward(
        (q_grad, k_grad, v_grad), _heads(qkv, dim, key_heads)[:2], _heads(out, dim, key_heads),
        q_weight, k_weight, Turn(cos, sin, positions), eps,
    )  # fmt: skip


_backward_op = register(
    "qk_norm_rope_packed_backward(Tensor q_grad, Tensor k_grad, Tensor v_grad, Tensor qkv,"
    " Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin, Tensor? positions,"
    " int key_heads, float eps) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=lambda q_grad, k_grad, v_grad, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:3]),
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.key_heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, *grads: Tensor) -> tuple:
    found = _backward_op(*grads, *ctx.saved_tensors, ctx.key_heads, ctx.eps)
    return *found, None, None, None, None, None


_op = register(
    "qk_norm_rope_packed(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin,"
    " Tensor? positions, int key_heads, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=lambda qkv, q_weight, k_weight, cos, sin, positions, key_heads, eps: tuple(
        x.new_empty(x.shape) for x in _heads(qkv, q_weight.shape[-1], key_heads)
    ),
    setup_context=_save,
    backward=_gradients,
)


@dataclass(frozen=True)
class AttentionHeads:
    """Queries [T, Aq, D] and keys [T, Ak, D], normed and turned; values [T, Ak, D] as they were."""

    q: Tensor
    k: Tensor
    v: Tensor


def qk_norm_rope_packed(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor,
    *, key_heads: int, cos: Tensor | None = None, sin: Tensor | None = None,
    positions: Tensor | None = None, eps: float = 1e-5,
) -> AttentionHeads:  # fmt: skip
    """`qk_norm_rope` on one projection of queries, keys and values; differentiable.

    Args:
        qkv: [T, (Aq + 2 Ak) D] float32, bfloat16 or float16, any strides; float64 runs the
            reference.
        q_weight, k_weight: [D], the dtype of qkv.
        key_heads: Ak.
        cos, sin, positions, eps: as for `qk_norm_rope`.

    Raises:
        ValueError: shapes or dtypes other than these, or an odd D.
    """
    if choose(qkv) == "reference":
        q, k, v = _heads(qkv, q_weight.shape[-1], key_heads)
        q, k = qk_norm_rope_reference(q, k, q_weight, k_weight, cos=cos, sin=sin,
                                      positions=positions, eps=eps)  # fmt: skip
        return AttentionHeads(q, k, v)
    return AttentionHeads(*_op(qkv, q_weight, k_weight, cos, sin, positions, key_heads, eps))
