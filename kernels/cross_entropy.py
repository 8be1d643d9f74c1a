"""Linear layer and cross-entropy in one op: the logits of all tokens never exist at once.

    logits = hidden @ weight^T                       [N, V]
    lse    = log sum_v exp(logits)                   float32
    loss_n = lse - logits[n, target_n] + z * lse^2   0 where target_n is `ignore_index`

Tokens are taken in chunks whose logits fit a fixed number of bytes. The products run on the
library's GEMM; one kernel per chunk turns its logits into losses and, in place, into gradients

    d loss_n / d logits = softmax * (1 + 2 z lse) - onehot(target_n)

so that a step costs three products and no recomputation. The z-loss is PaLM's (arXiv 2204.02311,
section 5); gradients taken in the forward pass are Liger's idea (arXiv 2410.10989), but with chunks
as large as the memory allows instead of a number that grows with V / H.

Shape letters: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .lang import jit, tl
from .launch import empty, on, register
from .tables import pick

CHUNK_BYTES = 256 << 20
"""Logits of one chunk take at most this much memory."""


@dataclass(frozen=True)
class Config:
    """Columns per step of the loss kernel."""

    block: int
    num_warps: int


def configs(vocabulary: int, arch: Arch) -> list[Config]:
    """Candidates for rows of `vocabulary` logits, the default first."""
    if arch.is_cpu:
        return [Config(block, 4) for block in (4096, 2048, 8192, 1024)]
    found = [Config(block, warps) for block in (4096, 2048, 8192) for warps in (8, 4, 16)]
    return [c for c in found if feasible(c, arch)]


def feasible(config: Config, arch: Arch) -> bool:
    """Whether each thread holds between 8 and 32 logits."""
    return 8 <= config.block / (config.num_warps * arch.warp_size) <= 32


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int, z_loss: float
) -> Tensor:
    """Loss of every token [N], float32 (float64 for float64)."""
    logits = F.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none")
    return loss + z_loss * (targets != ignore_index) * wide.logsumexp(-1).square()


@jit
def _loss_kernel(
    logits_NV, targets_N, scales_N, loss_N, V, stride, ignore_index, z_loss,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one token; with GRADIENT its logits become scale * d loss / d logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_NV += row * stride
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits_NV + at, mask=at < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # a lane that has seen only padding holds -inf, and -inf - -inf is NaN
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = higher
    largest = tl.max(top, 0)
    spread = tl.log(tl.sum(total * tl.exp(top - largest), 0))
    lse = largest + spread
    target = tl.load(targets_N + row)
    live = target != ignore_index
    known = (target >= 0) & (target < V)
    wanted = tl.load(logits_NV + target, mask=known, other=float("nan")).to(tl.float32)
    # large numbers are subtracted from each other first: small losses and gradients keep digits
    loss = (largest - wanted) + spread + z_loss * lse * lse
    tl.store(loss_N + row, tl.where(live, loss, 0.0))
    if GRADIENT:
        scale = tl.where(live, tl.load(scales_N + row), 0.0)
        slope = 1.0 + 2.0 * z_loss * lse
        tl.debug_barrier()
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits_NV + at, mask=at < V, other=0.0).to(tl.float32)
            gradient = tl.exp((x - largest) - spread) * slope - tl.where(at == target, 1.0, 0.0)
            # not a product with zero: the logits of an ignored token may be infinite
            gradient = tl.where(scale == 0.0, 0.0, gradient * scale)
            tl.store(logits_NV + at, gradient.to(logits_NV.dtype.element_ty), mask=at < V)


def _losses(
    logits: Tensor, targets: Tensor, scales: Tensor | None, loss: Tensor,
    *, ignore_index: int, z_loss: float,
) -> None:  # fmt: skip
    """Launch the kernel on one chunk: fills `loss`, and `logits` with gradients if `scales`."""
    config = pick("linear_cross_entropy", configs, logits.shape[1], logits.device)
    with on(logits):
        _loss_kernel[(len(logits),)](
            logits, targets.contiguous(), loss if scales is None else scales, loss,
            logits.shape[1], logits.stride(0), ignore_index, z_loss,
            GRADIENT=scales is not None, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    """Losses only."""
    loss = empty(len(hidden), like=hidden, dtype=torch.float32)
    for part in _chunks(hidden, weight):
        _losses(hidden[part] @ weight.mT, targets[part], None, loss[part],
                ignore_index=ignore_index, z_loss=z_loss)  # fmt: skip
    return loss


def _forward_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, scales: Tensor,
    ignore_index: int, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses, and the gradients of sum(scales * losses) for hidden and weight."""
    loss = empty(len(hidden), like=hidden, dtype=torch.float32)
    d_hidden = empty(*hidden.shape, like=hidden)
    parts = _chunks(hidden, weight)
    # sums over several chunks are kept in float32
    wide = torch.float32 if len(parts) > 1 else weight.dtype
    d_weight = torch.zeros_like(weight, dtype=wide) if len(parts) != 1 else weight
    for part in parts:
        logits = hidden[part] @ weight.mT
        _losses(logits, targets[part], scales[part], loss[part],
                ignore_index=ignore_index, z_loss=z_loss)  # fmt: skip
        torch.mm(logits, weight, out=d_hidden[part])
        share = logits.mT @ hidden[part]
        d_weight = share if len(parts) == 1 else d_weight.add_(share)
    return loss, d_hidden, d_weight.to(weight.dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Token ranges whose logits take at most CHUNK_BYTES each."""
    size = max(16, CHUNK_BYTES // max(1, len(weight) * hidden.element_size()))
    return [slice(at, at + size) for at in range(0, len(hidden), size)]


def _fake_gradients(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _scaled(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    """The gradients were taken in the forward pass, for an output gradient of 1."""
    d_hidden, d_weight = ctx.saved_tensors
    scale = grad.to(d_hidden.dtype)
    return d_hidden * scale, d_weight * scale, None, None, None, None


def _recomputed(ctx: Any, grad: Tensor) -> tuple:
    hidden, weight, targets = ctx.saved_tensors
    _, d_hidden, d_weight = _gradients(hidden, weight, targets, grad.contiguous(), *ctx.options)
    return d_hidden, d_weight, None, None, None


def _save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor targets"
_OPTIONS = "int ignore_index, float z_loss"
_gradients = register(
    f"linear_cross_entropy_gradients({_ARGUMENTS}, Tensor scales, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _forward_backward,
    fake=_fake_gradients,
)
_tokens = register(
    f"linear_cross_entropy_tokens({_ARGUMENTS}, {_OPTIONS}) -> Tensor",
    _forward,
    fake=lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=torch.float32),
    setup_context=_save_inputs,
    backward=_recomputed,
)


def _total(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, d_hidden, d_weight = _forward_backward(*inputs)
    return (loss * inputs[3]).sum(), loss, d_hidden, d_weight


_sum = register(
    f"linear_cross_entropy({_ARGUMENTS}, Tensor scales, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _total,
    fake=lambda hidden, weight, *_: (
        hidden.new_empty((), dtype=torch.float32),
        *_fake_gradients(hidden, weight),
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[2:]),
    backward=_scaled,
)


@dataclass(frozen=True)
class CrossEntropy:
    """`loss`, a float32 scalar that carries the gradient, and `tokens` [N], which does not."""

    loss: Tensor
    tokens: Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor,
    *, token_weights: Tensor | None = None, ignore_index: int = -100, z_loss: float = 0.0,
) -> CrossEntropy:  # fmt: skip
    """Mean cross-entropy of `hidden @ weight^T`, differentiable in hidden and weight.

    The gradients are computed with the loss, in three products; in float16 what falls under 6e-8
    before the loss is scaled is lost there, which `linear_cross_entropy_tokens` avoids. Several
    heads that share `weight` are one call on their concatenated tokens with `token_weights`.

    Args:
        hidden: [N, H] float32, bfloat16 or float16; float64 runs the reference.
        weight: [V, H], the dtype of hidden.
        targets: int64 [N]; `ignore_index` where a token has none. Any other value outside 0..V-1
            makes the loss NaN.
        token_weights: float32 [N]; the mean is weighted by them. None: all ones.
        z_loss: factor of the squared log-sum-exp.

    Returns:
        The mean over tokens that have a target (0 if none has), and every token's loss.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(hidden, weight, targets)
    live = targets != ignore_index
    scales = live.float() if token_weights is None else token_weights.float() * live
    scales = scales / scales.sum().clamp(min=torch.finfo(torch.float32).tiny)
    if choose(hidden) != "reference" and (hidden.requires_grad or weight.requires_grad):
        loss, tokens, _, _ = _sum(hidden, weight, targets, scales, ignore_index, z_loss)
        return CrossEntropy(loss, tokens.detach())
    tokens = linear_cross_entropy_tokens(
        hidden, weight, targets, ignore_index=ignore_index, z_loss=z_loss
    )
    return CrossEntropy((tokens * scales).sum(), tokens.detach())


def linear_cross_entropy_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Every token's loss, float32 [N], differentiable: the backward pass computes logits again.

    Arguments and errors as for `linear_cross_entropy`.
    """
    _check(hidden, weight, targets)
    if choose(hidden) == "reference":
        return linear_cross_entropy_reference(
            hidden, weight, targets, ignore_index=ignore_index, z_loss=z_loss
        )
    return _tokens(hidden, weight, targets, ignore_index, z_loss)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    # messages only on failure: under torch.compile a formatted size is a constant of the graph
    if not fits or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden [N, H] and weight [V, H] must have one dtype, got {hidden.dtype} "
            f"{tuple(hidden.shape)} and {weight.dtype} {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 [{len(hidden)}], got {targets.dtype} {tuple(targets.shape)}"
        )
