"""transformers' own places for other implementations: `attn_implementation="kexaone"` and
`experts_implementation="kexaone"`, after `kexaone.register_with_transformers()`.

These work without torch.compile, and where a compiler cannot: padded batches, whose mask depends
on data, and experts computed in a loop. A padding mask becomes boundaries of packed sequences on
the device: each row of a batch is cut into the padding before, the text, and the padding after,
which attend to themselves.

Shape letters: B rows, T queries per row, S keys per row, A heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .attention import packed
from .experts import routed_experts

NAME = "kexaone"


def register_with_transformers() -> None:
    """Make "kexaone" a value of transformers' `attn_implementation` and `experts_implementation`.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:  # fmt: skip
    """What transformers hands to `attention`: the padding mask [B, S] itself, or None."""
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention of query [B, A, T, D] and key, value [B, G, S, D], as transformers calls it.

    Args:
        attention_mask: [B, S], nonzero where there is text, which must be in one piece per row.
            Outputs of padding are finite and meaningless.
        options: `sliding_window`, `s_aux` (sinks), and `cu_seq_lens_q` for rows that hold several
            sequences.

    Returns:
        [B, T, A, D], and None for the weights, which are not computed.

    Raises:
        ValueError: dropout, a soft cap, or a module that is not causal.
    """
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if dropout or options.get("softcap") or not causal:
        raise ValueError("kexaone attention is causal, without dropout and soft cap")
    batch, heads, length, dim = query.shape
    starts = starts_k = options.get("cu_seq_lens_q")
    if starts is None:
        starts, starts_k = _boundaries(query, key.shape[2], attention_mask)
    out = ops.attention(
        packed(query), packed(key), packed(value), cu_seqlens=starts, cu_seqlens_k=starts_k,
        window=options.get("sliding_window") or 0, scale=scaling, sinks=options.get("s_aux"),
    ).out  # fmt: skip
    return out.view(batch, length, heads, dim), None


def _boundaries(query: Tensor, keys: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the packed sequences of queries and of keys start, int32."""
    batch, _, length, _ = query.shape
    row = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    if mask is None:
        return row * length, row * keys
    real = mask.to(torch.int32)
    end = keys - real.flip(1).argmax(1)
    cuts = torch.stack([torch.zeros_like(end), real.argmax(1), end], 1)
    cuts_q = (cuts - (keys - length)).clamp(min=0)
    both = (cuts_q + row[:-1, None] * length, cuts + row[:-1, None] * keys)
    last = (row[-1:] * length, row[-1:] * keys)
    starts, starts_k = (torch.cat([c.flatten(), e]).int() for c, e in zip(both, last, strict=True))
    return starts, starts_k


def experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Routed experts of transformers' fused modules, [T, H]; what we have no kernel for runs as
    transformers' grouped products."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not fits(module):
        grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return grouped(module, hidden_states, top_k_index, top_k_weights)
    return routed_experts(
        hidden_states, module.gate_up_proj, module.down_proj, top_k_weights, top_k_index
    )


def fits(module: Any) -> bool:
    """Whether a module's experts are down(silu(gate(x)) * up(x)) of stacked [gate; up] weights."""
    from transformers.integrations import moe

    unlike = ("has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
    plain = not any(getattr(module, name, False) for name in unlike)
    layout = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    gate = getattr(type(module), "_apply_gate", None)
    usual = gate is getattr(moe, "_default_apply_gate", None)
    activation = type(getattr(module, "act_fn", None)).__name__ in ("SiLUActivation", "SiLU")
    return bool(plain and layout and usual and activation)


def replace_loops(model: Any) -> None:
    """Let a transformers model that loops over its experts, which ends a graph, use ours."""
    config = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None) == "eager":
        register_with_transformers()
        model.set_experts_implementation(NAME)
