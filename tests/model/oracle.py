"""Random small models, and transformers' ExaoneMoe as an outside oracle with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

from kexaone import Config, KExaone
from kexaone.model.moe import MoE
from kexaone.model.sampling import Sampling

# how often a right distribution may look wrong to one statistical test
FALSE_ALARM = 1e-6


@st.composite
def configs(draw, smallest_window: int = 1) -> Config:
    kv_heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 5))
    experts = draw(st.integers(2, 9))
    window = draw(st.integers(smallest_window, 9))
    sliding = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    return Config(
        vocab_size=61,
        hidden_size=draw(st.sampled_from([16, 24, 40])),
        intermediate_size=draw(st.sampled_from([24, 32])),
        moe_intermediate_size=draw(st.sampled_from([8, 20])),
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 16])),
        num_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        num_shared_experts=draw(st.integers(1, 2)),
        first_k_dense_replace=draw(st.integers(0, layers)),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        norm_topk_prob=draw(st.booleans()),
        windows=tuple(window if s else 0 for s in sliding),
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        max_position_embeddings=4096,
        eos_token_ids=(),
        pad_token_id=None,  # transformers gives the padding row no gradient
    )


def routing_margin(model: KExaone, ids: torch.Tensor) -> float:
    """Smallest distance between the last chosen and the first rejected biased score."""
    margins = [1.0]

    def record(module, args, output):
        k = module.gate.top_k
        scores = output[1].scores_TE + module.gate.e_score_correction_bias
        ordered = scores.sort(-1, descending=True).values
        if k < ordered.shape[-1]:
            margins.append((ordered[:, k - 1] - ordered[:, k]).min().item())

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, MoE)]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return min(margins)


def transformers_model(model: KExaone) -> ExaoneMoeForCausalLM:
    """A transformers model that shares the values (not the memory) of `model`'s weights."""
    hf = model.config.to_hf()
    window = hf.pop("sliding_window")
    # its modeling code knows None (RoPE everywhere), its configuration refuses it
    config = ExaoneMoeConfig(**hf | {"sliding_window": window or 1})
    config._attn_implementation = "eager"
    other = ExaoneMoeForCausalLM(config).eval()
    for layer in other.model.layers:
        layer.self_attn.sliding_window = window
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")}
    missing, unexpected = other.load_state_dict(own, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return other


def random_model(config: Config, *, seed: int = 0, std: float = 0.1) -> KExaone:
    """Weights large enough that every part matters, norms and router bias away from their start."""
    generator = torch.Generator().manual_seed(seed)
    model = KExaone(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in name else std * noise)
    return model


def small_config(**changes: object) -> Config:
    """A config of a few thousand parameters that has every kind of layer."""
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "windows": (3, 4, 0),
        "max_position_embeddings": 4096,
        "eos_token_ids": (),
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return Config(**fields | changes)


def defined(logits: list[float], seen: list[bool], sampling: Sampling) -> tuple[np.ndarray, float]:
    """The distribution [V] by definition, and how far top_p is from the nearest sum beside it."""
    x = np.array(logits, dtype=np.float64) - sampling.presence_penalty * np.array(seen)
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if sampling.temperature == 0:
        return np.eye(len(x))[order[0]], 1.0
    kept = order[: sampling.top_k or None]
    weights = np.exp((x[kept] - x[kept[0]]) / sampling.temperature)
    weights /= weights.sum()
    before = np.concatenate(([0.0], np.cumsum(weights)[:-1]))
    if sampling.top_p < 1:
        weights[before >= sampling.top_p] = 0
    probabilities = np.zeros(len(x))
    probabilities[kept] = weights / weights.sum()
    return probabilities, float(np.abs(before - sampling.top_p).min())


def fit_probability(counts: Tensor, probabilities: Tensor) -> float:
    """Chance that draws from `probabilities` fit as badly as `counts`, by the G-test.

    G = 2 sum O ln(O / E) follows the chi-square distribution of (cells - 1) degrees of freedom
    where every E is large, so cells with E < 25 are pooled. A token that cannot occur and did has
    probability 0.
    """
    counts, probabilities = counts.double().flatten(), probabilities.double().flatten()
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities / probabilities.sum() * counts.sum()
    large = expected >= 25
    cells = [torch.cat((x[large], x[~large].sum(0, keepdim=True))) for x in (counts, expected)]
    observed, expected = (x[cells[1] > 0] for x in cells)
    # xlogy is 0 for an empty cell
    g = 2 * torch.special.xlogy(observed, observed / expected).sum()
    freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, g.clamp(min=0) / 2)) if freedom else 1.0
