"""What people write: one function per pattern and variant, with inputs of drawn sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.contract import generator, normal


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32) if x.dtype != torch.float64 else x
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def other_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def library_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5)
    return (normed * (1.0 + weight.to(wide.dtype))).type_as(x)


NORMS = {"llama": llama_norm, "other": other_norm, "library": library_norm}


def residual_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return llama_norm(total, weight), total * 0.5


def mlp(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def packed_mlp(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return up * F.silu(gate)


def sliced_mlp(both: Tensor) -> Tensor:
    half = both.shape[-1] // 2
    return both[..., :half].sigmoid() * both[..., :half] * both[..., half:]


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope_tables(length: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    inverse = 1e4 ** -(torch.arange(0, dim, 2, device=like.device).float() / dim)
    angles = torch.arange(length, device=like.device)[None, :, None].float() * inverse
    both = torch.cat((angles, angles), dim=-1)
    return both.cos().to(like.dtype), both.sin().to(like.dtype)


def qk_norm(x_q: Tensor, x_k: Tensor, w_q: Tensor, w_k: Tensor, *, rope: bool, early: bool):
    """Queries and keys [B, T, A D] to normed, maybe rotated heads in one [B, Aq + Ak, T, D]."""
    batch, length, dim = *x_q.shape[:2], w_q.shape[0]
    q, k = (x.view(batch, length, -1, dim) for x in (x_q, x_k))
    if early:
        q, k = llama_norm(q.transpose(1, 2), w_q), llama_norm(k.transpose(1, 2), w_k)
    else:
        q, k = llama_norm(q, w_q).transpose(1, 2), llama_norm(k, w_k).transpose(1, 2)
    if rope:
        cos, sin = (t.unsqueeze(1) for t in rope_tables(length, dim, x_q))
        q, k = (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)
    return torch.cat((q, k), 1)


def causal_mask(queries: int, keys: int, window: int, style: str) -> Tensor:
    """One mask, written in several ways."""
    i = torch.arange(queries)[:, None] + (keys - queries)
    j = torch.arange(keys)[None, :]
    if style == "triangle":
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        return mask.triu(keys - queries - window + 1) if window else mask
    if style == "additive":
        hidden = (j > i) if not window else ~((j <= i) & (j > i - window))
        if window:
            return torch.where(~hidden, torch.zeros(()), torch.finfo(torch.float32).min)
        return torch.zeros(queries, keys).masked_fill(hidden, -torch.inf)
    mask = (i >= j)[None, None].expand(1, 1, queries, keys)
    return torch.logical_and(mask, (i - j < window)[None, None]) if window else mask


def masked_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int, style: str) -> Tensor:
    """Attention of heads [B, A, T, D], keys repeated for their groups."""
    repeats = q.shape[1] // k.shape[1]

    def repeat(x: Tensor) -> Tensor:
        batch, heads, length, dim = x.shape
        wide = x[:, :, None].expand(batch, heads, repeats, length, dim)
        return wide.reshape(batch, heads * repeats, length, dim)

    if style == "flag":
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)
    mask = causal_mask(q.shape[2], k.shape[2], window, style)
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, scale=0.3)


def router(x: Tensor, weight: Tensor, bias: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and ids [T, K]; chosen groups are all there are."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = F.linear(x.type(wide), weight.type(wide)).sigmoid()
    choice = scores + bias
    best = choice.view(-1, 1, choice.shape[-1]).topk(2, dim=-1)[0].sum(dim=-1)
    chosen = torch.topk(best, k=1, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(best)
    mask.scatter_(1, chosen, 1)
    mask = mask.unsqueeze(-1).expand(-1, 1, choice.shape[-1]).reshape(-1, choice.shape[-1])
    ids = torch.topk(choice.masked_fill(~mask.bool(), -torch.inf), k=top_k, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * 2.5, ids


def batched_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor):
    """Sum over each token's experts, a matrix per slot."""
    tokens, top_k = ids.shape
    rows, flat = x.repeat_interleave(top_k, dim=0), ids.reshape(-1)
    product = torch.bmm(gate_up[flat], rows.unsqueeze(-1)).squeeze(-1)
    gate, up = product.chunk(2, dim=-1)
    out = torch.bmm(down[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    out = out * weights.reshape(-1).unsqueeze(-1)
    return out.view(tokens, top_k, -1).sum(dim=1).to(x.dtype)


def expert_inputs(tokens: int, experts: int, top_k: int, dtype: torch.dtype, seed: int):
    width, hidden = 24, 32
    ids = torch.rand(tokens, experts, generator=generator(seed)).argsort(1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=generator(seed + 1))
    return [
        normal(tokens, hidden, seed=seed, dtype=dtype),
        (normal(experts, 2 * width, hidden, seed=seed + 1) / hidden**0.5).to(dtype),
        (normal(experts, hidden, width, seed=seed + 2) / width**0.5).to(dtype),
        weights, ids,
    ]  # fmt: skip


def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, shift: bool, reduction: str) -> Tensor:
    """Cross-entropy of a linear layer, as causal language models compute it."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if shift:
        logits, targets = logits[:, :-1].contiguous(), targets[:, 1:]
    flat = logits.view(-1, logits.shape[-1])
    return F.cross_entropy(flat, targets.reshape(-1), reduction=reduction)
