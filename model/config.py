"""The architecture of one EXAONE-MoE model as a frozen, validated value, and the named presets."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
# far above any model; what lies beyond is a damaged file, and would overflow in tensor shapes
MAX_INTEGER, MAX_NUMBER, MAX_PARAMETERS = 2**31 - 1, 3.0e38, 2**50


class ConfigError(ValueError):
    """A configuration that contradicts itself or cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture of an EXAONE-MoE decoder with its multi-token-prediction (MTP) head.

    Attention windows are given per layer: `windows[i]` is the number of keys a query of layer `i`
    may see, itself included; 0 means global attention. Layers with a window use RoPE, global
    layers do not (a model without any windowed layer uses RoPE everywhere).

    `swiglu_limits[i]` clamps the SwiGLU of layer `i` (gate from above, up on both sides); 0 means
    no clamp. `mtp_windows` holds one window per physical MTP layer; `mtp_steps` is how often the
    MTP block is applied in training and how many drafts it was made for.

    Raises:
        ConfigError: if a field is out of range or two fields contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    windows: tuple[int, ...]
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    swiglu_limits: tuple[float, ...] = ()
    mtp_windows: tuple[int, ...] = (0,)
    mtp_steps: int = 1
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    max_position_embeddings: int = 262_144
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (53,)
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, kind, value = field.name, str(field.type), getattr(self, field.name)
            if kind.startswith("tuple"):
                if not isinstance(value, tuple | list):
                    raise ConfigError(f"{name} must be a list, got {value!r}")
                object.__setattr__(self, name, tuple(value))
                for entry in value:
                    _check_type(name, kind, entry)
            elif value is not None or not kind.endswith("None"):
                _check_type(name, kind, value)
        limits = tuple(float(x) for x in self.swiglu_limits)
        if not any(limits):
            # "no clamp" holds for any number of layers, so that dataclasses.replace may change it
            limits = (0.0,) * len(self.windows)
        object.__setattr__(self, "swiglu_limits", limits)
        self._check_ranges()
        total = self.parameter_counts()["total"]
        if total > MAX_PARAMETERS:
            raise ConfigError(f"these sizes make {total:,} parameters, at most 2^50 are possible")

    def _check_ranges(self) -> None:
        positive = (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads "
            "num_key_value_heads head_dim num_experts num_experts_per_tok "
            "max_position_embeddings routed_scaling_factor rms_norm_eps rope_theta"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.initializer_range < 0:
            raise ConfigError(f"initializer_range must be >= 0, got {self.initializer_range}")
        layers, mtp_layers = self.num_hidden_layers, len(self.mtp_windows)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        dense, limits = self.first_k_dense_replace, self.swiglu_limits
        rules = [
            (layers > 0, "the model needs at least one layer, got windows=()"),
            (
                all(w >= 0 for w in (*self.windows, *self.mtp_windows)),
                f"windows must be >= 0, got {min((*self.windows, *self.mtp_windows), default=0)}",
            ),
            (
                heads % kv_heads == 0,
                f"num_attention_heads ({heads}) must be a multiple of "
                f"num_key_value_heads ({kv_heads})",
            ),
            (self.head_dim % 2 == 0, f"head_dim must be even for RoPE, got {self.head_dim}"),
            (
                self.num_experts_per_tok <= self.num_experts,
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed num_experts "
                f"({self.num_experts})",
            ),
            (
                0 <= dense <= layers,
                f"first_k_dense_replace must lie in 0..{layers}, got {dense}",
            ),
            (
                self.num_shared_experts >= 0,
                f"num_shared_experts must be >= 0, got {self.num_shared_experts}",
            ),
            (
                len(limits) == layers,
                f"swiglu_limits must have one entry per layer ({layers}), got {len(limits)}",
            ),
            (
                all(x >= 0 for x in limits),
                f"swiglu_limits must be >= 0, got {min(limits, default=0)}",
            ),
            (
                self.mtp_steps >= 1 if mtp_layers else self.mtp_steps == 0,
                f"mtp_steps must be >= 1 with an MTP layer and 0 without, got {self.mtp_steps} "
                f"with {mtp_layers} layers",
            ),
        ]
        for holds, message in rules:
            if not holds:
                raise ConfigError(message)
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_ids):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"special token ids must lie in 0..{self.vocab_size - 1}, got {token}"
                )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.windows)

    @property
    def rope_layers(self) -> tuple[bool, ...]:
        """Which layers rotate q and k: the windowed ones, or all if no layer has a window."""
        return tuple(w > 0 or not any(self.windows) for w in self.windows)

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` is a mixture of experts (and not one dense SwiGLU)."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def preset(cls, name: str) -> Config:
        """The named preset. Raises ConfigError, listing the names, if there is none."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; presets are: {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @classmethod
    def from_hf(cls, source: dict[str, Any] | str | os.PathLike[str]) -> Config:
        """From a Hugging Face `config.json`: a parsed dict, the file, or the folder with it."""
        from .hf_config import from_hf

        return from_hf(source)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` contents that transformers (and `from_hf`) read back to this value."""
        from .hf_config import to_hf

        return to_hf(self)

    def parameter_counts(self) -> dict[str, int]:
        """Exact number of parameters per part; `main` excludes MTP, `total` is everything.

        `active` counts what one token of the main model multiplies with: all blocks with the
        chosen experts only, and the output head; not the embedding table.
        """
        hidden, sparse = self.hidden_size, self.num_hidden_layers - self.first_k_dense_replace
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads)
        attention = hidden * heads * self.head_dim + 2 * self.head_dim
        dense = 3 * hidden * self.intermediate_size
        expert = 3 * hidden * self.moe_intermediate_size
        head = 0 if self.tie_word_embeddings else self.vocab_size * hidden
        mtp_layer = attention + dense + 2 * hidden
        mtp_layers = len(self.mtp_windows)
        counts = {
            "embedding": self.vocab_size * hidden,
            "attention": self.num_hidden_layers * attention,
            "dense_mlp": self.first_k_dense_replace * dense,
            # the selection bias is part of the checkpoint, so it counts
            "router": sparse * (self.num_experts * hidden + self.num_experts),
            "routed_experts": sparse * self.num_experts * expert,
            "shared_experts": sparse * self.num_shared_experts * expert,
            "norms": (2 * self.num_hidden_layers + 1) * hidden,
            "lm_head": head,
        }
        main = sum(counts.values())
        mtp = mtp_layers * mtp_layer + 2 * hidden * hidden + 3 * hidden if mtp_layers else 0
        idle = sparse * (self.num_experts - self.num_experts_per_tok) * expert
        embedding = 0 if self.tie_word_embeddings else counts["embedding"]
        return counts | {
            "main": main,
            "mtp": mtp,
            "total": main + mtp,
            "active": main - idle - embedding,
        }


def _check_type(name: str, kind: str, value: object) -> None:
    """Raise unless `value` is of the type that begins or is inside the annotation `kind`."""
    if "bool" in kind:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {value!r}")
        return
    integer = "int" in kind
    limit = MAX_INTEGER if integer else MAX_NUMBER
    kinds = int if integer else int | float
    # written so that NaN is refused too
    if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= limit:
        what = "integer" if integer else "number"
        raise ConfigError(f"{name}: expected a finite {what} up to {limit:,}, got {value!r}")


PRESETS: dict[str, dict[str, Any]] = {
    "k-exaone-236b": {
        "vocab_size": 153_600,
        "hidden_size": 6144,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts": 128,
        "windows": (128, 128, 128, 0) * 12,
    },
    "k-exaone-2-750b": {
        "vocab_size": 153_600,
        "hidden_size": 6144,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts": 256,
        "windows": (0, 4096) + (128, 128, 128, 0) * 19,
        "first_k_dense_replace": 2,
        "swiglu_limits": (0.0,) * 62 + (7.0,) * 16,
        "mtp_steps": 4,
    },
    "mid": {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_experts": 32,
        "windows": (128, 128, 128, 0) * 3,
    },
    # bytes are tokens 0..255; the head's width stays a multiple of 32
    "mini": {
        "vocab_size": 288,
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 32,
        "windows": (64, 64, 64, 0) * 2,
        "bos_token_id": 256,
        "eos_token_ids": (257,),
        "pad_token_id": 258,
    },
}
