"""Router of a mixture of experts: sigmoid scores, biased choice, unbiased weights.

    scores  = sigmoid(x @ weight^T)                     products and sums in float32
    ids     = the K experts with the largest scores + bias; of equal ones the lower index
    c_k     = scores[ids_k]
    weights = scaling * c_k / (sum over k of c_k + 1e-20)          (scaling * c_k, not normalised)

The bias takes part in the choice alone. Gradients reach x and weight through scores and weights:
dc_k = scaling / sum * (dweights_k - sum over j of dweights_j c_j / sum), dscores[ids_k] += dc_k and
dlogits = dscores * scores * (1 - scores), then two matrix products in float32.

Method: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2. One launch multiplies (`matmul_fp32.py`), one
adds its partial results, and selects: scores and indices are packed into one integer that is
larger where the score is, or the score is equal and the index lower, so that K maxima sort them.

Shape letters: T tokens, H hidden, E experts, K experts per token, S partial products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import Arch
from .dispatch import choose
from .lang import jit, tl, triton
from .launch import cdiv, empty, on, register, require, rows
from .matmul_fp32 import matmul_fp32, matmul_parts
from .tables import pick

MAX_TOP_K = 16


@dataclass(frozen=True)
class Routed:
    """Sigmoid scores [T, E] float32, expert ids [T, K] int64, weights [T, K] float32.

    Of float64 inputs, scores and weights are float64.
    """

    scores_TE: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class Config:
    """`rows` tokens per program."""

    rows: int
    num_warps: int


def configs(experts: int, arch: Arch) -> list[Config]:
    """Candidates for choosing among `experts` experts, the default first."""
    if arch.is_cpu:
        return [Config(rows, 4) for rows in (4, 1, 16)]
    return [Config(rows, warps) for rows in (4, 8, 2, 1) for warps in (4, 2, 1, 8)]


def select_reference(
    scores_TE: Tensor, bias_E: Tensor, *, top_k: int, scaling: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Ids and weights of given scores."""
    # a stable sort, because topk leaves the order of ties open
    biased = (scores_TE + bias_E).detach()
    ids = biased.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores_TE.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scaling


def route_reference(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor,
    *, top_k: int, scaling: float = 1.0, normalize: bool = True,
) -> Routed:  # fmt: skip
    """Scores in float32 (float64 of float64), then `select_reference`."""
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    scores = F.linear(x_TH.to(dtype), weight_EH.to(dtype)).sigmoid()
    ids, weights = select_reference(
        scores, bias_E, top_k=top_k, scaling=scaling, normalize=normalize
    )
    return Routed(scores, ids, weights)


@triton.jit
def _ordered(x):
    """int64 that compare as float32 x do; NaN above all, as in torch.sort."""
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit
def _select_kernel(
    parts_STE, bias_E, scores_TE, ids_TK, weights_TK, T, E, parts, scaling,
    NORMALIZE: tl.constexpr, K: tl.constexpr, KS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert, choice = tl.arange(0, BLOCK)[None, :], tl.arange(0, KS)[None, :]
    mask = (row < T) & (expert < E)
    logits = tl.zeros([ROWS, BLOCK], tl.float32)
    for part in range(parts):
        at = (part.to(tl.int64) * T + row) * E + expert
        logits += tl.load(parts_STE + at, mask=mask, other=0.0)
    scores = tl.sigmoid(logits)
    tl.store(scores_TE + row * E + expert, scores, mask=mask)
    biased = scores + tl.load(bias_E + expert, mask=expert < E, other=0.0).to(tl.float32)
    keys = (_ordered(biased) << 32) | (BLOCK - 1 - expert).to(tl.int64)
    keys = tl.where(expert < E, keys, -0x8000000000000000)
    ids = tl.zeros([ROWS, KS], tl.int32)
    for k in range(K):
        best = tl.max(keys, 1)[:, None]
        keys = tl.where(keys == best, -0x8000000000000000, keys)
        chosen = BLOCK - 1 - (best & 0xFFFFFFFF).to(tl.int32)
        ids = tl.where(choice == k, chosen, ids)
    weights = tl.where(choice < K, tl.gather(scores, ids, 1), 0.0)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 1)[:, None] + 1e-20)
    mask = (row < T) & (choice < K)
    tl.store(ids_TK + row * K + choice, ids.to(tl.int64), mask=mask)
    tl.store(weights_TK + row * K + choice, weights * scaling, mask=mask)


@jit
def _select_backward_kernel(
    d_scores_TE, d_weights_TK, scores_TE, ids_TK, d_logits_TE, T, E, scaling,
    NORMALIZE: tl.constexpr, K: tl.constexpr, KS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert, choice = tl.arange(0, BLOCK)[None, :], tl.arange(0, KS)[None, :]
    mask = (row < T) & (choice < K)
    ids = tl.load(ids_TK + row * K + choice, mask=mask, other=0)
    grad = tl.load(d_weights_TK + row * K + choice, mask=mask, other=0.0) * scaling
    if NORMALIZE:
        share = tl.load(scores_TE + row * E + ids, mask=mask, other=0.0)
        total = tl.sum(share, 1)[:, None] + 1e-20
        grad = (grad - tl.sum(grad * share / total, 1)[:, None]) / total
    mask = (row < T) & (expert < E)
    scores = tl.load(scores_TE + row * E + expert, mask=mask, other=0.0)
    d_scores = tl.load(d_scores_TE + row * E + expert, mask=mask, other=0.0)
    for k in range(K):
        chosen = tl.sum(tl.where(choice == k, ids, 0), 1)[:, None]
        d_chosen = tl.sum(tl.where(choice == k, grad, 0.0), 1)[:, None]
        d_scores += tl.where(expert == chosen, d_chosen, 0.0)
    tl.store(d_logits_TE + row * E + expert, d_scores * scores * (1 - scores), mask=mask)


def _sizes(experts: int, top_k: int) -> dict[str, int]:
    """The compile-time sizes of both kernels."""
    block = max(16, triton.next_power_of_2(experts))
    return {"K": top_k, "KS": triton.next_power_of_2(top_k), "BLOCK": block}


def _route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, scaling: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = x.shape[0], len(weight)
    require(
        x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1],
        f"x must be [T, H] and weight [E, H], got {tuple(x.shape)} and {tuple(weight.shape)}",
    )
    require(bias.shape == (experts,), f"bias must be [{experts}], got {tuple(bias.shape)}")
    most = min(experts, MAX_TOP_K)
    require(1 <= top_k <= most, f"top_k must be from 1 to {most}, got {top_k}")
    x = rows(x)
    parts = matmul_parts(x, weight.t())
    scores = empty(tokens, experts, like=x, dtype=torch.float32)
    ids = empty(tokens, top_k, like=x, dtype=torch.int64)
    weights = empty(tokens, top_k, like=x, dtype=torch.float32)
    config = pick("route", configs, experts, x.device)
    if tokens:
        with on(x):
            _select_kernel[(cdiv(tokens, config.rows),)](
                parts, bias.contiguous(), scores, ids, weights, tokens, experts, len(parts),
                scaling, NORMALIZE=normalize, ROWS=config.rows, **_sizes(experts, top_k),
                num_warps=config.num_warps,
            )  # fmt: skip
    return scores, ids, weights


def _route_backward(
    d_scores: Tensor, d_weights: Tensor, x: Tensor, weight: Tensor, scores: Tensor, ids: Tensor,
    scaling: float, normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, (tokens, experts) = rows(x), scores.shape
    d_logits = empty(tokens, experts, like=x, dtype=torch.float32)
    config = pick("route", configs, experts, x.device)
    if tokens:
        with on(x):
            _select_backward_kernel[(cdiv(tokens, config.rows),)](
                d_scores.contiguous(), d_weights.contiguous(), scores.contiguous(),
                ids.contiguous(), d_logits, tokens, experts, scaling, NORMALIZE=normalize,
                ROWS=config.rows, **_sizes(experts, ids.shape[1]), num_warps=config.num_warps,
            )  # fmt: skip
    return matmul_fp32(d_logits, weight, x.dtype), matmul_fp32(d_logits.t(), x, weight.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, *_: Any) -> tuple:
    tokens, experts = x.shape[0], weight.shape[0]
    return (
        x.new_empty(tokens, experts, dtype=torch.float32),
        x.new_empty(tokens, top_k, dtype=torch.int64),
        x.new_empty(tokens, top_k, dtype=torch.float32),
    )


_backward_op = register(
    "route_backward(Tensor d_scores, Tensor d_weights, Tensor x, Tensor weight, Tensor scores,"
    " Tensor ids, float scaling, bool normalize) -> (Tensor, Tensor)",
    _route_backward,
    fake=lambda d_scores, d_weights, x, weight, *_: (
        x.new_empty(x.shape), weight.new_empty(weight.shape)
    ),
)  # fmt: skip


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, _, ctx.scaling, ctx.normalize = inputs
    scores, ids, _ = output
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(x, weight, scores, ids)


def _gradient(ctx: Any, d_scores: Tensor, _: Tensor, d_weights: Tensor) -> tuple:
    found = _backward_op(d_scores, d_weights, *ctx.saved_tensors, ctx.scaling, ctx.normalize)
    return *found, None, None, None, None


_op = register(
    "route(Tensor x, Tensor weight, Tensor bias, int top_k, float scaling, bool normalize)"
    " -> (Tensor, Tensor, Tensor)",
    _route,
    fake=_fake,
    setup_context=_save,
    backward=_gradient,
)


def route(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor,
    *, top_k: int, scaling: float = 1.0, normalize: bool = True,
) -> Routed:  # fmt: skip
    """Scores every expert for every token and chooses `top_k`; differentiable in x and weight.

    A few tokens on a CPU run the reference, which is launched faster (`dispatch.LAUNCH_BOUND`).

    Args:
        x_TH: [T, H] float32, bfloat16 or float16, any strides; float64 runs the reference.
        weight_EH: [E, H], any of these dtypes.
        bias_E: [E], added for the choice alone; no gradient.
        top_k: K, from 1 to the lesser of E and 16.
        scaling: factor of the weights.
        normalize: divide a token's weights by their sum first.

    Raises:
        ValueError: the shapes do not fit, or top_k is out of range.
    """
    if choose(x_TH, work=x_TH.numel() * weight_EH.shape[0]) == "reference":
        return route_reference(
            x_TH, weight_EH, bias_E, top_k=top_k, scaling=scaling, normalize=normalize
        )
    return Routed(*_op(x_TH, weight_EH, bias_E, top_k, scaling, normalize))
