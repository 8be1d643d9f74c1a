"""Tiny models of transformers' families with random weights, and what the passes find in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LAYERS = 3
COMMON = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """Class names, configuration, and replacements in inference (a training step adds its loss)."""

    config: str
    model: str
    options: dict[str, Any]
    found: dict[str, int]

    def build(self) -> nn.Module:
        import transformers

        config = getattr(transformers, self.config)(**COMMON | self.options)
        torch.manual_seed(0)
        return getattr(transformers, self.model)(config).eval()


FAMILIES = {
    "ExaoneMoe": Family(
        "ExaoneMoeConfig", "ExaoneMoeForCausalLM",
        SPARSE | {
            "num_experts": 8, "num_shared_experts": 1, "sliding_window": 8, "n_group": 1,
            "topk_group": 1, "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
            "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
        },
        {"embedding": 1,
         "rms_norm": 4 * LAYERS + 1, "qk_norm_rope": LAYERS, "add_rms_norm": 2 * LAYERS,
         "attention": LAYERS, "route": LAYERS - 1, "experts": LAYERS - 1, "swiglu": LAYERS},
    ),
    "Llama": Family(
        "LlamaConfig", "LlamaForCausalLM", {},
        {"embedding": 1,
         "rms_norm": 2 * LAYERS + 1, "add_rms_norm": 2 * LAYERS, "attention": LAYERS,
         "swiglu": LAYERS},
    ),
    "Qwen3-MoE": Family(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        SPARSE | {"num_experts": 8, "norm_topk_prob": True},
        {"embedding": 1,
         "rms_norm": 4 * LAYERS + 1, "qk_norm_rope": LAYERS, "add_rms_norm": 2 * LAYERS,
         "attention": LAYERS, "experts": LAYERS},
    ),
    "GLM-4-MoE": Family(
        "Glm4MoeConfig", "Glm4MoeForCausalLM",
        SPARSE | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
                  "use_qk_norm": True, "n_group": 1, "topk_group": 1},
        {"embedding": 1,
         "rms_norm": 4 * LAYERS + 1, "add_rms_norm": 2 * LAYERS, "attention": LAYERS,
         "route": LAYERS - 1, "experts": LAYERS - 1, "swiglu": LAYERS},
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        SPARSE | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
                  "n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
                  "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
                  "num_key_value_heads": 4, "head_dim": 8},
        {"embedding": 1,
         "rms_norm": 4 * LAYERS + 1, "add_rms_norm": 2 * LAYERS, "route": LAYERS - 1,
         "experts": LAYERS - 1, "swiglu": LAYERS},
    ),
    "Gemma-2": Family(
        "Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 8, "query_pre_attn_scalar": 16},
        {"embedding": 1,
         "rms_norm": 4 * LAYERS + 1, "add_rms_norm": 2 * LAYERS},
    ),
}  # fmt: skip
