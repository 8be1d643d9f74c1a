"""One sliding and one global layer at the width of the 236B model, against transformers' layer.

Both layers read the same 9.7 GB of bfloat16 weights. The oracle computes the layer in float64, one
expert at a time, widening each weight when it is used. Our error may be twice that of transformers
plus one unit in the last place, over everything and for every token.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import ExaoneMoeConfig
from transformers.models.exaone_moe.modeling_exaone_moe import (
    ExaoneMoeDecoderLayer,
    ExaoneMoeRotaryEmbedding,
)

from kexaone import Config
from kexaone.model.layers import rope_tables
from kexaone.model.packing import Packing
from kexaone.model.transformer import DecoderLayer

CONFIG = Config.preset("k-exaone-236b")
TOKENS = 144  # more than the window, few enough for 128 experts of 38M weights on a CPU
LAYERS = {"sliding": 2, "global": 3}
# weights whose gradients are compared beside that of the input; the experts' would be 9.7 GB more
TRAINED = ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_norm.weight",
           "self_attn.k_norm.weight", "self_attn.k_proj.weight", "mlp.gate.weight")  # fmt: skip


def drawn_layer(index: int) -> DecoderLayer:
    """Random weights of the model's own deviation; norms and the router's bias off their start."""
    with torch.device("meta"):
        layer = DecoderLayer(CONFIG, window=CONFIG.windows[index], rope=CONFIG.rope_layers[index],
                             sparse=True, limit=0.0).bfloat16()  # fmt: skip
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(index)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if "norm" in name:
                tensor.normal_(1.0, 0.2)
            else:
                tensor.normal_(0.0, 0.1 if "bias" in name else 0.02)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in TRAINED)
    return layer


def transformers_layer(layer: DecoderLayer, index: int) -> ExaoneMoeDecoderLayer:
    """Transformers' layer on the memory of `layer`'s weights, not on a copy."""
    config = ExaoneMoeConfig(**CONFIG.to_hf())
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        other = ExaoneMoeDecoderLayer(config, index)
    other.load_state_dict(layer.state_dict(), assign=True)
    for name, parameter in other.named_parameters():
        assert parameter.data_ptr() == layer.get_parameter(name).data_ptr()
        parameter.requires_grad_(name in TRAINED)
    return other.eval()


def visible(window: int) -> Tensor:
    """Which keys each query sees."""
    token = torch.arange(TOKENS)
    seen = token <= token[:, None]
    return seen & (token > token[:, None] - window) if window else seen


def run_theirs(
    layer: ExaoneMoeDecoderLayer, x: Tensor, window: int, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Output with the experts `chosen`, weighted by its own scores, and what it would choose."""
    own = []

    def choose(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple:
        logits, _, choice = output
        own.append(choice)
        weights = logits.sigmoid().gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True) * CONFIG.routed_scaling_factor
        return logits, weights, chosen

    hook = layer.mlp.gate.register_forward_hook(choose)
    mask = torch.zeros(TOKENS, TOKENS, dtype=x.dtype).masked_fill(~visible(window), -math.inf)
    turn = ExaoneMoeRotaryEmbedding(ExaoneMoeConfig(**CONFIG.to_hf()))
    tables = turn(x, torch.arange(TOKENS)[None])
    out = layer(x[None], attention_mask=mask[None, None], position_embeddings=tables)[0]
    hook.remove()
    return out, own[0]


class Oracle:
    """The layer in float64, from its definition. `wide` holds the trained weights in float64."""

    def __init__(self, layer: DecoderLayer, window: int, *, turned: bool) -> None:
        self.layer, self.window, self.turned = layer, window, turned
        self.wide = {n: layer.get_parameter(n).detach().double().requires_grad_() for n in TRAINED}

    def weight(self, name: str) -> Tensor:
        name = f"{name}.weight"
        return self.wide[name] if name in self.wide else self.layer.get_parameter(name).double()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return checkpoint(lambda x: F.linear(x, self.weight(name)), x, use_reentrant=False)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight(name), CONFIG.rms_norm_eps)

    def turn(self, x: Tensor) -> Tensor:
        half = CONFIG.head_dim // 2
        rate = CONFIG.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (torch.arange(TOKENS, dtype=torch.float64)[:, None] * rate)[:, None]
        first, second = x.chunk(2, -1)
        return torch.cat((first * angle.cos() - second * angle.sin(),
                          second * angle.cos() + first * angle.sin()), -1)  # fmt: skip

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (self.linear(x, f"self_attn.{n}_proj").unflatten(1, (-1, CONFIG.head_dim))
                   for n in "qkv")  # fmt: skip
        q, k = self.norm(q, "self_attn.q_norm"), self.norm(k, "self_attn.k_norm")
        if self.turned:
            q, k = self.turn(q), self.turn(k)
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for t in (k, v))
        scores = q.transpose(0, 1) @ k.mT / math.sqrt(CONFIG.head_dim)
        out = scores.masked_fill(~visible(self.window), -math.inf).softmax(-1) @ v
        return self.linear(out.transpose(0, 1).flatten(1), "self_attn.o_proj")

    def expert(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            gate, up = F.linear(x, gate_up.double()).chunk(2, -1)
            return F.linear(F.silu(gate) * up, down.double())

        return checkpoint(run, x, use_reentrant=False)

    def experts(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The routed experts, with the choice given: at near ties rounding decides it."""
        scores = F.linear(x, self.weight("mlp.gate")).sigmoid()
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True) * CONFIG.routed_scaling_factor
        own, out = self.layer.mlp.experts, torch.zeros_like(x)
        for e in chosen.unique().tolist():
            token, slot = (chosen == e).nonzero(as_tuple=True)
            y = self.expert(x[token], own.gate_up_proj[e], own.down_proj[e])
            out = out.index_add(0, token, y * weights[token, slot, None])
        return out

    def __call__(self, x: Tensor, chosen: Tensor) -> Tensor:
        h = x + self.attention(self.norm(x, "input_layernorm"))
        normed = self.norm(h, "post_attention_layernorm")
        gate, up = (self.linear(normed, f"mlp.shared_experts.{n}_proj") for n in ("gate", "up"))
        shared = self.linear(F.silu(gate) * up, "mlp.shared_experts.down_proj")
        return h + self.experts(normed, chosen) + shared


def gradients(out: Tensor, x: Tensor, weights: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [t.detach() for t in torch.autograd.grad(out, [x, *weights], grad.to(out.dtype))]


def meets(ours: Tensor, theirs: Tensor, exact: Tensor, name: str) -> None:
    """The contract over all, and for activations per token."""
    error, naive, largest = (
        t.abs().reshape(TOKENS if name in ("output", "input") else 1, -1).amax(1)
        for t in (ours.double() - exact, theirs.double() - exact, exact)
    )
    ulp = torch.exp2(torch.floor(torch.log2(largest))) * torch.finfo(ours.dtype).eps
    assert torch.isfinite(ours).all() and error.max() <= 2 * naive.max() + ulp.max(), name
    assert (error <= 2 * naive + ulp).all(), f"{name}: row {(error - 2 * naive - ulp).argmax()}"


def memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.slow
@pytest.mark.skipif(memory() < 13 << 30, reason="takes 11.1 GiB")
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_of_the_236b_model(kind: str) -> None:
    index, window = LAYERS[kind], CONFIG.windows[LAYERS[kind]]
    layer = drawn_layer(index)
    other = transformers_layer(layer, index)
    x = torch.randn(TOKENS, CONFIG.hidden_size).bfloat16().requires_grad_()
    grad = torch.randn(TOKENS, CONFIG.hidden_size).bfloat16()
    packing = Packing.of([TOKENS], starts=None, device=x.device)
    tables = rope_tables(packing.positions, CONFIG.head_dim, CONFIG.rope_theta)
    ours, routing = layer(x, packing, rope=tables)
    theirs, their_choice = run_theirs(other, x, window, routing.ids_TK)
    # the 8th and the 9th of 128 scores are within bfloat16 rounding of each other in few tokens
    same = (routing.ids_TK.sort(1).values == their_choice.sort(1).values).all(1)
    assert same.float().mean() > 0.9
    oracle = Oracle(layer, window, turned=CONFIG.rope_layers[index])
    wide = x.detach().double().requires_grad_()
    exact = oracle(wide, routing.ids_TK)
    found, naive, expected = (
        [out.detach(), *gradients(out, inputs, weights, grad)]
        for out, inputs, weights in (
            (ours, x, [layer.get_parameter(n) for n in TRAINED]),
            (theirs, x, [other.get_parameter(n) for n in TRAINED]),
            (exact, wide, list(oracle.wide.values())),
        )
    )
    names = ("output", "input", *TRAINED)
    for name, mine, other_one, right in zip(names, found, naive, expected, strict=True):
        meets(mine, other_one, right, name)
