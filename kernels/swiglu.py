"""SwiGLU: silu(gate) * up, optionally clamped; forward, backward, and with a float8 output.

    g = min(gate, limit), u = clamp(up, -limit, limit)        (with a limit; rounded to x's dtype)
    y = cast(g / (1 + exp(-g))) * u                           float32 inside, two roundings

The cast to the input's dtype comes before the product, as in `F.silu(gate) * up`. Gradients, with
s = 1 / (1 + exp(-g)): dgate = dy * u * s * (1 + g * (1 - s)) and dup = dy * g * s, zero where the
clamp acted; g, u and s are computed again from the inputs, so nothing else is kept.

Method: Shazeer 2020 (arXiv 2002.05202). One program reads a tile of both halves wherever they lie,
so the halves of one projection [..., 2N] need no copy, nor does their gradient.

Shape letters: T rows, N columns of each half, G groups of 128 columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import arch_of
from .dispatch import choose
from .elementwise import configs, grid, group, tile
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .quantize import BLOCK as GROUP
from .quantize import QuantizedRows, quantize_reference, quantize_rows
from .tables import pick


def swiglu_reference(gate: Tensor, up: Tensor | None = None, *, limit: float = 0.0) -> Tensor:
    """silu(gate) * up, clamped with a limit > 0; without `up`, gate holds both halves."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    if limit > 0:
        # not clamp, whose gradient at the limit itself differs between versions of torch
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return F.silu(gate) * up


@triton.jit
def halves(gate, up, limit, CLAMP: tl.constexpr):
    """Both halves in float32 after the clamp, which lets NaN through."""
    g, u = gate.to(tl.float32), up.to(tl.float32)
    if CLAMP:
        most = limit.to(gate.dtype).to(tl.float32)
        g = tl.where(g > most, most, g)
        u = tl.where(u > most, most, tl.where(u < -most, -most, u))
    return g, u


@triton.jit
def activated(gate, up, limit, CLAMP: tl.constexpr):
    """silu(gate) * up in the dtype of gate, rounded as two operations."""
    g, u = halves(gate, up, limit, CLAMP)
    silu = (g / (1.0 + tl.exp(-g))).to(gate.dtype)
    return (silu.to(tl.float32) * u).to(gate.dtype)


@triton.jit
def gradients(grad, gate, up, limit, CLAMP: tl.constexpr):
    """float32 gradients of gate and up, from that of the product in float32."""
    g, u = halves(gate, up, limit, CLAMP)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    d_gate = grad * u * (sigmoid * (1.0 + g * (1.0 - sigmoid)))
    d_up = grad * (g * sigmoid)
    if CLAMP:
        d_gate = tl.where(gate.to(tl.float32) == g, d_gate, 0.0)
        d_up = tl.where(up.to(tl.float32) == u, d_up, 0.0)
    return d_gate, d_up


@jit(do_not_specialize=["T"])
def _forward_kernel(
    gate_TN, up_TN, out_TN, scales_TG, T, N, gate_stride, up_stride, limit,
    CLAMP: tl.constexpr, QUANTIZE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tile(N, ROWS, BLOCK)
    mask = (row < T) & (at < N)
    gate = tl.load(gate_TN + row * gate_stride + at, mask=mask, other=0.0)
    up = tl.load(up_TN + row * up_stride + at, mask=mask, other=0.0)
    y = activated(gate, up, limit, CLAMP)
    if QUANTIZE:
        values, scales = quantize_rows(y.to(tl.float32), ROWS, BLOCK, POWER_OF_TWO)
        tl.store(out_TN + row * N + at, values, mask=mask)
        count = tl.cdiv(N, 128)
        at_group = group(N, BLOCK)
        tl.store(scales_TG + row * count + at_group, scales, mask=(row < T) & (at_group < count))
    else:
        tl.store(out_TN + row * N + at, y, mask=mask)


@jit(do_not_specialize=["T"])
def _backward_kernel(
    grad_TN, gate_TN, up_TN, d_gate_TN, d_up_TN,
    T, N, grad_stride, gate_stride, up_stride, out_stride, limit,
    CLAMP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tile(N, ROWS, BLOCK)
    mask = (row < T) & (at < N)
    grad = tl.load(grad_TN + row * grad_stride + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_TN + row * gate_stride + at, mask=mask, other=0.0)
    up = tl.load(up_TN + row * up_stride + at, mask=mask, other=0.0)
    d_gate, d_up = gradients(grad, gate, up, limit, CLAMP)
    tl.store(d_gate_TN + row * out_stride + at, d_gate.to(gate.dtype), mask=mask)
    tl.store(d_up_TN + row * out_stride + at, d_up.to(gate.dtype), mask=mask)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both halves as [T, N] with unit column stride, views wherever the input allows."""
    if up is None:
        require(gate.dim() > 0 and gate.shape[-1] % 2 == 0,
                f"without up, gate must be [..., 2N], got {tuple(gate.shape)}")  # fmt: skip
        first, second = rows(gate).chunk(2, dim=-1)
        return first, second
    require(gate.dim() > 0 and up.shape == gate.shape and up.dtype == gate.dtype,
            "up must have the shape and dtype of gate")  # fmt: skip
    return rows(gate), rows(up)


def _forward(
    gate: Tensor, up: Tensor | None, limit: float, quantize: bool = False,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, and scales if quantized."""
    first, second = _halves(gate, up)
    count, columns = first.shape
    out = empty(count, columns, like=gate, dtype=torch.float8_e4m3fn if quantize else gate.dtype)
    groups = cdiv(columns, GROUP) if quantize else 0
    scales = empty(count, groups, like=gate, dtype=torch.float32)
    config = pick("swiglu", configs, columns, gate.device)
    if count and columns:
        with on(gate):
            _forward_kernel[grid(count, columns, config)](
                first, second, out, scales, count, columns,
                first.stride(0), second.stride(0), float(limit),
                CLAMP=limit > 0, QUANTIZE=quantize, POWER_OF_TWO=power_of_two,
                ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps,
            )  # fmt: skip
    shape = gate.shape[:-1]
    return out.view(*shape, columns), scales.view(*shape, groups)


def _backward(grad: Tensor, gate: Tensor, up: Tensor | None, limit: float) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; without `up` the first is that of both, the second empty."""
    first, second = _halves(gate, up)
    count, columns = first.shape
    grads = rows(grad)
    d_gate = empty(*gate.shape, like=gate)
    d_up = empty(*gate.shape, like=gate) if up is not None else empty(0, like=gate)
    config = pick("swiglu", configs, columns, gate.device)
    if not count or not columns:
        return d_gate, d_up
    d_first = d_gate.view(count, -1)
    d_second = d_first[:, columns:] if up is None else d_up
    with on(gate):
        _backward_kernel[grid(count, columns, config)](
            grads, first, second, d_first, d_second, count, columns,
            grads.stride(0), first.stride(0), second.stride(0), d_first.stride(0), float(limit),
            CLAMP=limit > 0, ROWS=config.rows, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
    return d_gate, d_up


def _forward_fp8(
    gate: Tensor, up: Tensor | None, limit: float, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    if arch_of(gate.device).fp8:
        return _forward(gate, up, limit, quantize=True, power_of_two=power_of_two)
    out, _ = _forward(gate, up, limit)
    quantized = quantize_reference(out, power_of_two=power_of_two)
    return quantized.values, quantized.scales


def _shape(gate: Tensor, up: Tensor | None) -> tuple[Any, ...]:
    return tuple(gate.shape) if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)


def _backward_fake(
    grad: Tensor, gate: Tensor, up: Tensor | None, limit: float
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def _fp8_fake(
    gate: Tensor, up: Tensor | None, limit: float, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    *batch, columns = _shape(gate, up)
    groups = (columns + GROUP - 1) // GROUP
    return (
        gate.new_empty((*batch, columns), dtype=torch.float8_e4m3fn),
        gate.new_empty((*batch, groups), dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.limit = inputs
    ctx.save_for_backward(gate, up)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    gate, up = ctx.saved_tensors
    d_gate, d_up = _swiglu_backward(grad, gate, up, ctx.limit)
    return d_gate, d_up if up is not None else None, None


_swiglu_backward = register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor? up, float limit) -> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_swiglu = register(
    "swiglu(Tensor gate, Tensor? up, float limit) -> Tensor",
    lambda gate, up, limit: _forward(gate, up, limit)[0],
    fake=lambda gate, up, limit: gate.new_empty(_shape(gate, up)),
    setup_context=_save,
    backward=_gradient,
)
_swiglu_fp8 = register(
    "swiglu_fp8(Tensor gate, Tensor? up, float limit, bool power_of_two) -> (Tensor, Tensor)",
    _forward_fp8,
    fake=_fp8_fake,
)


def swiglu(gate: Tensor, up: Tensor | None = None, *, limit: float = 0.0) -> Tensor:
    """silu(gate) * up, differentiable.

    Args:
        gate: [..., N] float32, bfloat16 or float16, any strides; float64 runs the reference.
            Without `up` it is [..., 2N] and holds both, gate first, as one projection gives them.
        up: the shape and dtype of gate.
        limit: if above zero, gate is first clamped from above and up on both sides.

    Returns:
        [..., N] in the dtype of gate, contiguous.

    Raises:
        ValueError: `up` differs from gate, or there is none and gate has no two halves.
    """
    if choose(gate) == "reference":
        return swiglu_reference(gate, up, limit=limit)
    return _swiglu(gate, up, float(limit))


@torch.no_grad()
def swiglu_fp8(
    gate: Tensor, up: Tensor | None = None, *, limit: float = 0.0, power_of_two: bool = False
) -> QuantizedRows:
    """quantize_fp8(swiglu(gate, up)) in one kernel, bit for bit; not differentiable."""
    if choose(gate) == "reference":
        out = swiglu_reference(gate, up, limit=limit)
        return quantize_reference(out, power_of_two=power_of_two)
    return QuantizedRows(*_swiglu_fp8(gate, up, float(limit), power_of_two))
