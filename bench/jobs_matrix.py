"""Jobs of the ops that are bound by arithmetic or by reading weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import attention
from ..kernels.cross_entropy import linear_cross_entropy
from ..kernels.experts import moe_experts, moe_experts_reference
from ..kernels.grouping import group_by_expert
from ..kernels.linear_fp8 import linear_fp8
from ..kernels.linear_skinny import linear_skinny
from ..kernels.newton_schulz import newton_schulz, newton_schulz_reference
from ..kernels.quantize_tiles import quantize_fp8_blocks
from ..model.config import Config
from .registry import Job, drawn, job, nbytes


@job("linear_cross_entropy")
def linear_cross_entropy_job(cfg: Config, tokens: int) -> Job:
    """Loss and all gradients in one go, which is how ours computes them."""
    x, weight = drawn(tokens, cfg.hidden_size), drawn(cfg.vocab_size, cfg.hidden_size, seed=1)
    weight *= cfg.hidden_size**-0.5
    targets = torch.randint(0, cfg.vocab_size, (tokens,))

    def step(loss):  # type: ignore[no-untyped-def]
        def run(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
                value = loss(*leaves, targets)
                return value.detach(), *torch.autograd.grad(value, leaves)

        return run

    def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.mT).float(), targets)

    flops = 3 * 2 * tokens * cfg.hidden_size * cfg.vocab_size
    return Job(
        step(lambda *a: linear_cross_entropy(*a).loss),
        {"eager": step(eager), "inductor": step(torch.compile(eager))},
        [x, weight, targets],
        2 * nbytes(x, weight),
        flops=flops,
    )


@job("newton_schulz")
def newton_schulz_job(cfg: Config, tokens: int) -> Job:
    """The stacked gate and up projections of a few experts, float32 as the optimizer keeps them."""
    rows, columns, count = cfg.moe_intermediate_size, cfg.hidden_size, 4
    x = drawn(count, rows, columns, dtype=torch.float32)
    small, large = sorted((rows, columns))
    # per step two symmetric products at half cost and one full one
    flops = 5 * count * (2 * small * small * large * 3 // 2 + small**3)
    return Job(
        newton_schulz,
        {"eager": newton_schulz_reference, "inductor": torch.compile(newton_schulz_reference)},
        [x],
        2 * nbytes(x),
        flops=flops,
    )


def _attention_job(cfg: Config, tokens: int, window: int) -> Job:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    dim, heads, groups = cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads
    q = drawn(tokens, heads, dim)
    k, v = (drawn(tokens, groups, dim, seed=s) for s in (1, 2))
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    position = torch.arange(tokens)
    seen = position <= position[:, None]
    if window:
        seen &= position > position[:, None] - window

    def visible(b, h, i, j):  # type: ignore[no-untyped-def]
        return (j <= i) & (i - j < window) if window else j <= i

    mask = create_block_mask(visible, None, None, tokens, tokens, device="cpu")
    flex = torch.compile(flex_attention)

    def by_flex(*x: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in x)
        out: Any = flex(q, k, v, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    def by_sdpa(*x: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in x)
        mask, causal = (seen, False) if window else (None, True)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    pairs = int(seen.sum())
    return Job(
        lambda *x: attention(*x, cu_seqlens=starts, window=window).out,
        {"sdpa": by_sdpa, "flex_attention": by_flex},
        [q, k, v],
        nbytes(q, q, k, v),
        nbytes(q, q, q, k, v, k, v),
        flops=4 * pairs * heads * dim,
        # PyTorch refuses its gradient on CPUs
        forward_only=frozenset({"flex_attention"}),
    )


@job("attention_window")
def window_attention_job(cfg: Config, tokens: int) -> Job:
    return _attention_job(cfg, tokens, min(w for w in cfg.windows if w))


@job("attention_global")
def global_attention_job(cfg: Config, tokens: int) -> Job:
    return _attention_job(cfg, tokens, 0)


@job("moe_experts")
def moe_experts_job(cfg: Config, tokens: int) -> Job:
    """All experts of a layer under a uniform choice; the whole 236B layer takes 10 GB."""
    experts, width, top_k = cfg.num_experts, cfg.moe_intermediate_size, cfg.num_experts_per_tok
    x = drawn(tokens, cfg.hidden_size)
    gate_up = drawn(experts, 2 * width, cfg.hidden_size, seed=1) * cfg.hidden_size**-0.5
    down = drawn(experts, cfg.hidden_size, width, seed=2) * width**-0.5
    weights = torch.full((tokens, top_k), 1 / top_k)
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(3)).argsort(-1)
    plan = group_by_expert(ids[:, :top_k].contiguous(), experts=experts)
    rest = weights, plan.offsets, plan.order
    rows = tokens * top_k
    return Job(
        lambda x, gate_up, down: moe_experts(x, gate_up, down, *rest),
        {"eager": lambda x, gate_up, down: moe_experts_reference(x, gate_up, down, *rest)},
        [x, gate_up, down],
        nbytes(x, x, gate_up, down),
        2 * nbytes(x, x, gate_up, down),
        flops=2 * rows * width * cfg.hidden_size * 3,
    )


def _few_rows(cfg: Config, rows: int) -> tuple[Tensor, Tensor]:
    x = drawn(rows, cfg.hidden_size)
    return x, drawn(2 * cfg.intermediate_size, cfg.hidden_size, seed=1) * cfg.hidden_size**-0.5


@job("linear_skinny")
def linear_skinny_job(cfg: Config, tokens: int) -> Job:
    """At most 16 rows: the weights are read once."""
    x, weight = _few_rows(cfg, min(tokens, 16))
    return Job(linear_skinny, {"F.linear": F.linear}, [x, weight], nbytes(x, weight),
               flops=2 * len(x) * weight.numel())  # fmt: skip


@job("linear_fp8")
def linear_fp8_job(cfg: Config, tokens: int) -> Job:
    """The same in float8, against the bfloat16 layer that it replaces."""
    x, weight = _few_rows(cfg, min(tokens, 16))
    small = quantize_fp8_blocks(weight)
    return Job(
        lambda x: linear_fp8(x, small.values, small.scales),
        {"F.linear bf16": lambda x: F.linear(x, weight)},
        [x],
        nbytes(x) + weight.numel(),
        flops=2 * len(x) * weight.numel(),
    )
