"""The complete model: embedding, decoder blocks, output head and the multi-token-prediction block.

Parameter names are those that transformers gives an ExaoneMoe model in memory.

Shape letters: N packed tokens, B sequences, T tokens per padded sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import Attention
from .cache import Cache, LayerCache
from .config import Config
from .layers import RMSNorm, SwiGLU, rope_tables
from .moe import Experts, MoE, Router, Routing
from .packing import Packing
from .recompute import recomputed

if TYPE_CHECKING:
    from .generation import Generation


@dataclass(frozen=True)
class Features:
    """Final normed hidden states [N, H] and what each sparse layer's router decided."""

    hidden_NH: Tensor
    routings: tuple[Routing, ...]


def rope_of(packing: Packing, cfg: Config) -> tuple[Tensor, Tensor]:
    """cos and sin of the positions of packed tokens, [N, 1, D/2] each."""
    return packing.turns or rope_tables(packing.positions, cfg.head_dim, cfg.rope_theta)


class DecoderLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h)), the mlp dense or a mixture of experts."""

    def __init__(
        self, cfg: Config, *, window: int, rope: bool, sparse: bool, limit: float = 0.0
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, window=window, rope=rope)
        # the norm before the mlp, despite the name that checkpoints give it
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if sparse:
            self.mlp = MoE(cfg, limit=limit)
        else:
            self.mlp = SwiGLU(cfg.hidden_size, cfg.intermediate_size, limit=limit)

    def forward(
        self,
        x_NH: Tensor,
        packing: Packing,
        *,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        h = x_NH + self.self_attn(self.input_layernorm(x_NH), packing, rope=rope, cache=cache)
        normed = self.post_attention_layernorm(h)
        if isinstance(self.mlp, MoE):
            out, routing = self.mlp(normed)
            return h + out, routing
        return h + self.mlp(normed), None


class Decoder(nn.Module):
    """Embedding, blocks and final norm.

    `recompute` says what training keeps of each block: see `kexaone.model.recompute`.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.config = cfg
        self.recompute = "nothing"
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(
                cfg,
                window=window,
                rope=cfg.rope_layers[i],
                sparse=cfg.is_sparse(i),
                limit=cfg.swiglu_limits[i],
            )
            for i, window in enumerate(cfg.windows)
        )
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, ids_N: Tensor, packing: Packing, *, cache: Cache | None = None) -> Features:
        rope = rope_of(packing, self.config)
        x, routings = self.embed_tokens(ids_N), []
        # a cache changes in place, and only once
        policy = self.recompute if cache is None else "nothing"
        if policy != "nothing":
            # kept by the packing: a block that is computed again may change nothing outside it
            _ = packing.cu_seqlens
        for i, layer in enumerate(self.layers):
            held = cache.layers[i] if cache else None
            x, routing = recomputed(policy, layer, x, packing, rope=rope, cache=held)
            if routing is not None:
                routings.append(routing)
        return Features(self.norm(x), tuple(routings))


class MTP(nn.Module):
    """Multi-token prediction: from the hidden state of token i and token i+1, predict token i+2.

    Applied again on its own output it predicts one token further each time (DeepSeek-V3, arXiv
    2412.19437, section 2.2; here with a dense block). Embedding and head are the main model's.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.config = cfg
        self.pre_fc_norm_embedding = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.fc = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.layers = nn.ModuleList(
            DecoderLayer(cfg, window=w, rope=w > 0, sparse=False) for w in cfg.mtp_windows
        )
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(
        self,
        hidden_NH: Tensor,
        embedded_NH: Tensor,
        packing: Packing,
        *,
        step: int = 0,
        cache: Cache | None = None,
    ) -> Tensor:
        """The block's normed output [N, H]: input of the head, and of the next step."""
        halves = (self.pre_fc_norm_embedding(embedded_NH), self.pre_fc_norm_hidden(hidden_NH))
        x = self.fc(torch.cat(halves, dim=-1))
        rope = rope_of(packing, self.config)
        index = step % len(self.layers)
        layer_cache = cache.mtp_layers[index] if cache else None
        x, _ = self.layers[index](x, packing, rope=rope, cache=layer_cache)
        return self.norm(x)


class KExaone(nn.Module):
    """K-EXAONE, a mixture-of-experts language model, in plain PyTorch.

    `KExaone(cfg)` has freshly drawn weights; `KExaone.from_pretrained(folder)` loads them.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.config = cfg
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.mtp = MTP(cfg) if cfg.mtp_windows else None
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(self._draw)

    def _draw(self, module: nn.Module) -> None:
        """Every matrix is normal with the configured deviation; norms stay one."""
        if isinstance(module, nn.Linear | nn.Embedding | Router | Experts):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        lengths: list[int] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Next-token logits.

        Args:
            input_ids: int64 [B, T], or [N] for packed sequences.
            attention_mask: [B, T], nonzero where a token is real; padding on either side. Padding
                costs no work and gets zero logits. Reading it waits for the device.
            lengths: tokens per sequence of a packed [N] input; they must add up to N.
            cache: state to continue from; it is advanced by the new tokens.

        Returns:
            [B, T, V] or [N, V], in the model's dtype.

        Raises:
            ValueError: on shapes that do not fit, an empty input, or a context beyond
                `max_position_embeddings`.
        """
        packing, real = self._packing(input_ids, attention_mask, lengths, cache)
        ids_N = input_ids.flatten() if real is None else input_ids[real]
        hidden = self.features(ids_N, packing, cache=cache).hidden_NH
        logits = self.lm_head(hidden)
        if real is not None:
            return logits.new_zeros(*input_ids.shape, logits.shape[-1]).index_put(
                real.nonzero(as_tuple=True), logits
            )
        return logits.view(*input_ids.shape, -1)

    def features(self, ids_N: Tensor, packing: Packing, *, cache: Cache | None = None) -> Features:
        """Hidden states of packed tokens; advances the cache."""
        features = self.model(ids_N, packing, cache=cache)
        if cache is not None:
            cache.lengths[:] = packing.ends
        return features

    def predict_further(
        self,
        hidden_NH: Tensor,
        next_ids_N: Tensor,
        packing: Packing,
        *,
        step: int = 0,
        cache: Cache | None = None,
    ) -> Tensor:
        """MTP hidden states [N, H] of tokens with successors `next_ids_N`; advances the cache."""
        if self.mtp is None:
            raise ValueError("this model has no MTP block (mtp_windows is empty)")
        embedded = self.model.embed_tokens(next_ids_N)
        hidden = self.mtp(hidden_NH, embedded, packing, step=step, cache=cache)
        if cache is not None:
            cache.mtp_lengths[:] = packing.ends
        return hidden

    def _packing(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        lengths: list[int] | None,
        cache: Cache | None,
    ) -> tuple[Packing, Tensor | None]:
        """The packing of an input, and the mask of its real tokens if some are padding."""
        if input_ids.dim() not in (1, 2) or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be a non-empty [B, T] or [N], got {input_ids.shape}")
        real = None
        if input_ids.dim() == 1:
            if attention_mask is not None:
                raise ValueError("a packed input takes lengths, not an attention_mask")
            counts = list(lengths or [len(input_ids)])
            if sum(counts) != len(input_ids):
                raise ValueError(f"lengths add up to {sum(counts)}, input has {len(input_ids)}")
        elif lengths is not None:
            raise ValueError(f"lengths go with a packed [N] input, got {tuple(input_ids.shape)}")
        elif attention_mask is None and cache is None:
            batch, length = input_ids.shape
            self._check_context(length)
            # counts on the host would be part of a compiled graph
            return Packing.rectangle(batch, length, device=input_ids.device), None
        elif attention_mask is None:
            counts = [input_ids.shape[1]] * len(input_ids)
        else:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask {tuple(attention_mask.shape)} must have the shape of "
                    f"input_ids {tuple(input_ids.shape)}"
                )
            real = attention_mask != 0
            counts = real.sum(1).tolist()
            if not any(counts):
                raise ValueError("attention_mask hides every token")
        if cache is not None:
            return cache.packing(counts), real
        self._check_context(max(counts))
        return Packing.of(counts, starts=None, device=input_ids.device), real

    def _check_context(self, longest: int) -> None:
        most = self.config.max_position_embeddings
        if longest > most:
            raise ValueError(f"context of {longest} tokens exceeds the model's {most}")

    def generate(
        self, input_ids: Tensor | list[list[int]], *, max_new_tokens: int = 64, **options: Any
    ) -> Generation:
        """Continue each prompt; see `kexaone.model.generation.generate` for the options."""
        from .generation import generate

        return generate(self, input_ids, max_new_tokens=max_new_tokens, **options)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> KExaone:
        """Load a folder of safetensors; see `kexaone.model.checkpoint.load` for the options."""
        from .checkpoint import load

        return load(folder, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Save as a folder that transformers loads too; see `kexaone.model.checkpoint.save`."""
        from .checkpoint import save

        save(self, folder, **options)
