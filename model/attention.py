"""Grouped-query attention with per-head QK-norm, sliding windows and packed sequences.

A query at position i sees key j iff j <= i and, with window w, j > i - w: w keys, itself included.

Shape letters: N packed tokens, B sequences, L length, A heads, D head dimension, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels.dispatch import choose
from .cache import CacheView, LayerCache
from .config import Config
from .layers import RMSNorm, apply_rope
from .packing import Packing

# queries are taken in groups whose mask stays under this many elements
MASK_ELEMENTS = 1 << 24


def global_attention(q_NAD: Tensor, k_NAD: Tensor, v_NAD: Tensor, packing: Packing) -> Tensor:
    """Causal attention within each packed sequence, [N, A, D].

    Padding stands after each sequence, so the causal mask already hides it.
    """
    if choose(q_NAD) == "triton":
        return ops.attention(q_NAD, k_NAD, v_NAD, cu_seqlens=packing.cu_seqlens).out
    q, k, v = (packing.pad(x).transpose(1, 2) for x in (q_NAD, k_NAD, v_NAD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return packing.unpad(out.transpose(1, 2))


def window_attention(
    q_NAD: Tensor, k_NAD: Tensor, v_NAD: Tensor, packing: Packing, *, window: int
) -> Tensor:
    """Causal attention over the last `window` keys of each packed sequence, [N, A, D].

    Cuts the whole pack into blocks of `window` tokens: a block's queries can only see keys of
    their own block and the one before, so work and memory are linear in N. Sequence boundaries
    need not fall on block boundaries; the mask keeps sequences apart.
    """
    if choose(q_NAD) == "triton":
        at = packing.cu_seqlens
        return ops.attention(q_NAD, k_NAD, v_NAD, cu_seqlens=at, window=window).out
    total = packing.total
    block = min(window, total)
    padding = -total % block
    rows = F.pad(packing.rows, (0, padding), value=-1).view(-1, block)
    q, k, v = (
        F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(0, (-1, block)) for x in (q_NAD, k_NAD, v_NAD)
    )

    def with_previous(x: Tensor, fill: int = 0) -> Tensor:
        before = torch.cat((torch.full_like(x[:1], fill), x[:-1]))
        return torch.cat((before, x), dim=1)

    query = torch.arange(block, 2 * block, device=q.device)[:, None]
    key = torch.arange(2 * block, device=q.device)
    near = (key <= query) & (key > query - window)
    # -2 marks the block before the first: no row has that number
    same = rows[:, :, None] == with_previous(rows, -2)[:, None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        with_previous(k).transpose(1, 2),
        with_previous(v).transpose(1, 2),
        attn_mask=(near & same).unsqueeze(1),
        enable_gqa=True,
    )
    return out.transpose(1, 2).flatten(0, 1)[:total]


def cached_attention(q_NAD: Tensor, view: CacheView, packing: Packing, *, window: int) -> Tensor:
    """Attention of new tokens over a cache that already holds them, [N, A, D]."""
    recorded = torch.is_grad_enabled() and (q_NAD.requires_grad or view.keys.requires_grad)
    if choose(q_NAD) == "triton" and not recorded:
        return ops.attention_decode(
            q_NAD, view.keys, view.values, lengths=packing.held, cu_seqlens=packing.cu_seqlens,
            longest=packing.longest, window=window,
        ).out  # fmt: skip
    q = packing.pad(q_NAD).transpose(1, 2)
    positions = packing.pad(packing.positions)[:, :, None]
    batch, slots = view.positions.shape
    held = view.positions[:, None, :]
    step = max(1, MASK_ELEMENTS // max(1, batch * slots))
    parts = []
    for query, position in zip(q.split(step, 2), positions.split(step, 1), strict=True):
        mask = (held >= 0) & (held <= position)
        if window:
            mask &= held > position - window
        if not packing.uniform:
            # a padding query may see nothing at all, and softmax over nothing is NaN
            mask |= ~mask.any(-1, keepdim=True)
        parts.append(
            F.scaled_dot_product_attention(
                query, view.keys, view.values, attn_mask=mask.unsqueeze(1), enable_gqa=True
            )
        )
    return packing.unpad(torch.cat(parts, 2).transpose(1, 2))


class Attention(nn.Module):
    """Projections, QK-norm on every layer, RoPE where the layer has it, attention, output."""

    def __init__(self, cfg: Config, *, window: int, rope: bool) -> None:
        super().__init__()
        self.head_dim, self.window, self.rope = cfg.head_dim, window, rope
        queries = cfg.num_attention_heads * cfg.head_dim
        keys = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, cfg.hidden_size, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)

    def forward(
        self,
        x_NH: Tensor,
        packing: Packing,
        *,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
    ) -> Tensor:
        heads = (len(x_NH), -1, self.head_dim)
        q, k = self.q_proj(x_NH).view(heads), self.k_proj(x_NH).view(heads)
        v = self.v_proj(x_NH).view(heads)
        # without gradients one kernel norms, turns and writes the cache
        if cache is not None and choose(q) != "reference" and not torch.is_grad_enabled():
            q, view = self._append(q, k, v, packing, rope, cache)
        else:
            q, k = self._norm_rope(q, k, rope)
            view = None if cache is None else cache.append(k, v, packing)
        if view is not None:
            out = cached_attention(q, view, packing, window=self.window)
        elif self.window:
            out = window_attention(q, k, v, packing, window=self.window)
        else:
            out = global_attention(q, k, v, packing)
        return self.o_proj(out.flatten(1))

    def _norm_rope(
        self, q_NAD: Tensor, k_NAD: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if choose(q_NAD) == "reference":
            q_NAD, k_NAD = self.q_norm(q_NAD), self.k_norm(k_NAD)
            if self.rope:
                q_NAD, k_NAD = apply_rope(q_NAD, *rope), apply_rope(k_NAD, *rope)
            return q_NAD, k_NAD
        cos, sin = self._tables(rope)
        normed = ops.qk_norm_rope(
            q_NAD, k_NAD, *self._weights(q_NAD), cos=cos, sin=sin, eps=self.q_norm.eps
        )
        return normed.q, normed.k

    def _append(
        self,
        q_NAD: Tensor,
        k_NAD: Tensor,
        v_NAD: Tensor,
        packing: Packing,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache,
    ) -> tuple[Tensor, CacheView]:
        """Normed, turned queries and the cache with the new tokens in it."""
        cache.make_room(packing)
        cos, sin = self._tables(rope)
        q_NAD = ops.qk_norm_rope_cache(
            q_NAD, k_NAD, v_NAD, *self._weights(q_NAD), cache.keys, cache.values,
            packing.rows, packing.positions, cos=cos, sin=sin, eps=self.q_norm.eps,
        )  # fmt: skip
        return q_NAD, cache.view(packing)

    def _tables(self, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return (rope[0].squeeze(1), rope[1].squeeze(1)) if self.rope else (None, None)

    def _weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Norm weights in the dtype of the heads, which autocast may have lowered."""
        return self.q_norm.weight.to(like.dtype), self.k_norm.weight.to(like.dtype)
