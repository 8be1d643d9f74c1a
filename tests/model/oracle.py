"""transformers' ExaoneMoe as an outside oracle, with the same weights as ours."""

from __future__ import annotations

import torch
from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

from kexaone import Config, KExaone


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
