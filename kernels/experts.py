"""All routed experts of a layer, from tokens to their weighted sum; forward and backward.

    z[m] = x[order[m] // K] gate_up[e]^T               a grouped product, read where tokens lie
    h[m] = silu(gate) * up, (gate, up) = z[m]          in its epilogue; clamped as in `swiglu.py`
    y[order[m]] = h[m] down[e]^T                       a grouped product, written by token
    out[t] = cast(sum over k of weights[t, k] y[t K + k])        float32, in the order of k

Training keeps z alone: h is computed again, and y is not needed, because
dweights[t, k] = <dout[t], y> = <dout[t] down[e], h>, a by-product of the gradient of h. Its kernel
also leaves dz and weights * h, the operands of the other gradients. Method: SonicMoE (arXiv
2512.14080). Rows gate and up of a weight are multiplied in turns, so that a thread holds both
halves of a pair. Tokens' rows are summed by token: nothing is added across programs.

Shape letters: T tokens, K experts per token, M = T K sorted rows, E experts, H hidden, D width,
N = 2 D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import choose
from .expert_tiles import dense, find_tile, heavy_configs, plan, product, source_rows
from .expert_weights import weight_gradient
from .grouped_gemm import check_groups, grouped_gemm_reference, multiply, sum_choices
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .swiglu import activated, gradients, swiglu_reference


def moe_experts_reference(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, order: Tensor,
    *, limit: float = 0.0,
) -> Tensor:  # fmt: skip
    """Expert by expert, in the dtype of x; the weighted sum at least in float32."""
    z = grouped_gemm_reference(x, gate_up, offsets, order=order, top_k=weights.shape[1])
    y = grouped_gemm_reference(swiglu_reference(z, limit=limit), down, offsets)
    by_token = y.index_select(0, order.argsort()).unflatten(0, weights.shape)
    return (by_token * weights.unsqueeze(-1)).sum(1).to(x.dtype)


@triton.jit
def _gated_tile(
    x_TH, w_NH, z_MN, h_MD, order_M, row, end, column, D, H, top_k, x_stride, n_stride, k_stride,
    limit, KEEP: tl.constexpr, CLAMP: tl.constexpr, TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if BLOCK_M > LEAST_M and end - row <= BLOCK_M // 2:
        _gated_tile(x_TH, w_NH, z_MN, h_MD, order_M, row, end, column, D, H, top_k, x_stride,
                    n_stride, k_stride, limit, KEEP, CLAMP, TRANSPOSED, WHOLE,
                    BLOCK_M // 2 if BLOCK_M > LEAST_M else LEAST_M, LEAST_M, BLOCK_N,
                    BLOCK_K)  # fmt: skip
    else:
        m, source = source_rows(order_M, row, end, top_k, True, BLOCK_M)
        pair = column + tl.arange(0, BLOCK_N)
        n = tl.minimum(pair // 2, D - 1) + pair % 2 * D
        total = product(x_TH, w_NH, source, n, H, x_stride, n_stride, k_stride, TRANSPOSED,
                        BLOCK_M, BLOCK_N, BLOCK_K, WHOLE)  # fmt: skip
        pairs = tl.reshape(total, [BLOCK_M, BLOCK_N // 2, 2]).to(h_MD.dtype.element_ty)
        gate, up = tl.split(pairs)
        i = (column // 2 + tl.arange(0, BLOCK_N // 2))[None, :]
        live = (row + tl.arange(0, BLOCK_M) < end)[:, None] & (i < D)
        at = m.to(tl.int64)[:, None] * D
        if KEEP:
            tl.store(z_MN + 2 * at + i, gate, mask=live)
            tl.store(z_MN + 2 * at + D + i, up, mask=live)
        tl.store(h_MD + at + i, activated(gate, up, limit, CLAMP), mask=live)


@jit(do_not_specialize=["E", "top_k"])
def _gated_kernel(
    x_TH, w_ENH, z_MN, h_MD, order_M, offsets_E, D, H, E, top_k, x_stride, e_stride, n_stride,
    k_stride, limit, KEEP: tl.constexpr, CLAMP: tl.constexpr, TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    expert, row, end, column = find_tile(offsets_E, 2 * D, E, BLOCK_M, BLOCK_N, GROUP, EXPERTS)
    if row < end:
        _gated_tile(x_TH, w_ENH + expert * e_stride, z_MN, h_MD, order_M, row, end, column, D, H,
                    top_k, x_stride, n_stride, k_stride, limit, KEEP, CLAMP, TRANSPOSED, WHOLE,
                    BLOCK_M, LEAST_M, BLOCK_N, BLOCK_K)  # fmt: skip


@triton.jit
def store_gated_gradient(
    total, z_MN, dz_MN, scaled_MD, weights_M, partial_PM, order_M, m, live_M, column, M, D, limit,
    CLAMP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the gradient of y, times down: dz, weights * h, and this tile's share of dweights."""
    i = column + tl.arange(0, BLOCK_N)
    slot = tl.load(order_M + m)
    weight = tl.load(weights_M + slot)[:, None]
    live = live_M[:, None] & (i < D)[None, :]
    at = m.to(tl.int64)[:, None] * D + i[None, :]
    first = m.to(tl.int64)[:, None] * (2 * D) + i[None, :]
    gate = tl.load(z_MN + first, mask=live, other=0.0)
    up = tl.load(z_MN + D + first, mask=live, other=0.0)
    h = activated(gate, up, limit, CLAMP).to(tl.float32)
    share = tl.sum(tl.where(live, total * h, 0.0), 1)
    tl.store(partial_PM + (column // BLOCK_N).to(tl.int64) * M + slot, share, mask=live_M)
    tl.store(scaled_MD + at, (h * weight).to(scaled_MD.dtype.element_ty), mask=live)
    d_gate, d_up = gradients(total * weight, gate, up, limit, CLAMP)
    tl.store(dz_MN + first, d_gate.to(dz_MN.dtype.element_ty), mask=live)
    tl.store(dz_MN + D + first, d_up.to(dz_MN.dtype.element_ty), mask=live)


@triton.jit
def _gated_backward_tile(
    grad_TH, w_DH, z_MN, dz_MN, scaled_MD, weights_M, partial_PM, order_M, row, end, column, M, D,
    H, top_k, x_stride, n_stride, k_stride, limit, CLAMP: tl.constexpr, TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    if BLOCK_M > LEAST_M and end - row <= BLOCK_M // 2:
        _gated_backward_tile(
            grad_TH, w_DH, z_MN, dz_MN, scaled_MD, weights_M, partial_PM, order_M, row, end, column,
            M, D, H, top_k, x_stride, n_stride, k_stride, limit, CLAMP, TRANSPOSED, WHOLE,
            BLOCK_M // 2 if BLOCK_M > LEAST_M else LEAST_M, LEAST_M, BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        m, source = source_rows(order_M, row, end, top_k, True, BLOCK_M)
        i = column + tl.arange(0, BLOCK_N)
        total = product(grad_TH, w_DH, source, i if WHOLE else tl.minimum(i, D - 1), H, x_stride,
                        n_stride, k_stride, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K,
                        WHOLE)  # fmt: skip
        store_gated_gradient(total, z_MN, dz_MN, scaled_MD, weights_M, partial_PM, order_M, m,
                             row + tl.arange(0, BLOCK_M) < end, column, M, D, limit, CLAMP,
                             BLOCK_N)  # fmt: skip


@jit(do_not_specialize=["M", "E", "top_k"])
def _gated_backward_kernel(
    grad_TH, w_EDH, z_MN, dz_MN, scaled_MD, weights_M, partial_PM, order_M, offsets_E, M, D, H, E,
    top_k, x_stride, e_stride, n_stride, k_stride, limit, CLAMP: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, LEAST_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """dz, weights * h, and this tile's share of dweights."""
    expert, row, end, column = find_tile(offsets_E, D, E, BLOCK_M, BLOCK_N, GROUP, EXPERTS)
    if row < end:
        _gated_backward_tile(
            grad_TH, w_EDH + expert * e_stride, z_MN, dz_MN, scaled_MD, weights_M, partial_PM,
            order_M, row, end, column, M, D, H, top_k, x_stride, n_stride, k_stride, limit, CLAMP,
            TRANSPOSED, WHOLE, BLOCK_M, LEAST_M, BLOCK_N, BLOCK_K)  # fmt: skip


def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, order: Tensor,
    limit: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and z if it is to be kept."""
    check_experts(x, gate_up, down, weights, offsets, order)
    experts, width, hidden = gate_up.shape
    x, gate_up, count, top_k = rows(x), dense(gate_up), len(order), weights.shape[1]
    z, h = empty(count if keep else 0, width, like=x), empty(count, width // 2, like=x)
    if h.numel():
        planned = plan("grouped_gemm_gated", count, gate_up)
        with on(x):
            _gated_kernel[planned.grid](
                x, gate_up, z, h, order, offsets, width // 2, hidden, experts, top_k,
                x.stride(0), *gate_up.stride(), float(limit), KEEP=keep, CLAMP=limit > 0,
                **planned.constants,
            )  # fmt: skip
    y = multiply(h, down, offsets, order, top_k, scatter=True)
    return sum_choices(y, top_k, weights), z


def _backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor,
    order: Tensor, z: Tensor, limit: float, wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate_up and down, empty if not wanted, and of the weights."""
    experts, hidden, width = down.shape
    grad, count, top_k = rows(grad), len(order), weights.shape[1]
    turned = dense(down.transpose(1, 2))
    planned = plan("grouped_gemm_gated_backward", count, turned, heavy_configs)
    dz, scaled = empty(count, 2 * width, like=x), empty(count, width, like=x)
    partial = empty(cdiv(width, planned.config.columns), count, like=weights)
    if scaled.numel():
        with on(x):
            _gated_backward_kernel[planned.grid](
                grad, turned, z, dz, scaled, weights.contiguous(), partial, order, offsets,
                count, width, hidden, experts, top_k, grad.stride(0), *turned.stride(),
                float(limit), CLAMP=limit > 0, **planned.constants,
            )  # fmt: skip
    d_x, d_gate_up, d_down = (empty(0, like=t) for t in (x, gate_up, down))
    if wanted[0]:
        by_slot = multiply(dz, gate_up.transpose(1, 2), offsets, order, top_k, scatter=True)
        d_x = sum_choices(by_slot, top_k)
    if wanted[1]:
        d_gate_up = weight_gradient(dz, x, gate_up, offsets, order=order, top_k=top_k)
    if wanted[2]:
        d_down = weight_gradient(grad, scaled, down, offsets, grad_order=order, top_k=top_k)
    return d_x, d_gate_up, d_down, partial.sum(0).view(weights.shape)


_experts_backward = register(
    "moe_experts_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor weights, "
    "Tensor offsets, Tensor order, Tensor z, float limit, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=lambda grad, x, gate_up, down, weights, offsets, order, z, limit, wanted: (
        *(t.new_empty(t.shape if w else 0)
          for t, w in zip((x, gate_up, down), wanted, strict=True)),
        weights.new_empty(weights.shape),
    ),
)  # fmt: skip


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.limit, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    wanted = list(ctx.needs_input_grad[:3])
    found = _experts_backward(grad, *ctx.saved_tensors, ctx.limit, wanted)
    pairs = zip(found, (*wanted, True), strict=True)
    return *(g if w else None for g, w in pairs), None, None, None, None


_experts = register(
    "moe_experts(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor offsets, "
    "Tensor order, float limit, bool keep) -> (Tensor, Tensor)",
    _forward,
    fake=lambda x, gate_up, down, weights, offsets, order, limit, keep: (
        x.new_empty(x.shape),
        x.new_empty(order.shape[0] if keep else 0, gate_up.shape[1]),
    ),
    setup_context=_save,
    backward=_gradient,
)


def check_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, order: Tensor
) -> None:
    """Raises ValueError unless shapes and dtypes fit."""
    check_groups(x, gate_up, offsets, order)
    experts, width, hidden = gate_up.shape
    require(down.shape == (experts, hidden, width // 2) and down.dtype == x.dtype,
            f"down must be {x.dtype} {[experts, hidden, width // 2]}, got {down.dtype} "
            f"{list(down.shape)}")  # fmt: skip
    require(weights.dim() == 2 and len(weights) == len(x) and weights.numel() == len(order),
            f"weights must be [T, K] for {len(x)} tokens and {len(order)} rows, got "
            f"{list(weights.shape)}")  # fmt: skip


def moe_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, order: Tensor,
    *, limit: float = 0.0,
) -> Tensor:  # fmt: skip
    """Sum over each token's experts of weight * down(silu(gate(x)) * up(x)); differentiable.

    Args:
        x: [T, H] float32, bfloat16 or float16; float64 runs the reference.
        gate_up: [E, 2D, H] in the dtype of x, gate rows first.
        down: [E, H, D] in the dtype of x.
        weights: float32 [T, K]; they multiply after `down`.
        offsets: int32 [E + 1], expert e's sorted rows; 0 first and T * K last.
        order: int32 [T * K], the slot t * K + k of each sorted row (`Permutation`).
        limit: if positive, gate is clamped from above and up on both sides.

    Returns:
        [T, H] in the dtype of x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if choose(x) == "reference":
        return moe_experts_reference(x, gate_up, down, weights, offsets, order, limit=limit)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down, weights))
    return _experts(x, gate_up, down, weights, offsets, order, limit, keep)[0]
