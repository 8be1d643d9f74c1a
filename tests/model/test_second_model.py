"""What the second model adds: windows that differ by layer, clamped SwiGLU, repeated MTP.

transformers ignores these fields, so the oracle here is written out: one token at a time, plain
sums in float64 over all keys a token may see.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_model, routing_margin, small_config
from torch import Tensor

from kexaone import Config, KExaone, impl
from kexaone.model.cache import Cache
from kexaone.model.fp8 import quantize
from kexaone.model.moe import Experts, Routing
from kexaone.model.packing import Packing

SMALL = small_config(
    windows=(0, 7, 3, 3, 0),
    first_k_dense_replace=2,
    swiglu_limits=(0.0, 0.3, 0.0, 0.2, 0.4),
    mtp_windows=(0,),
    mtp_steps=4,
)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + SMALL.rms_norm_eps).sqrt() * weight


def rotated(x: Tensor, position: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = position * SMALL.rope_theta ** (-2 * i / x.shape[-1])
        c, s = math.cos(angle), math.sin(angle)
        out[..., i] = x[..., i] * c - x[..., i + half] * s
        out[..., i + half] = x[..., i + half] * c + x[..., i] * s
    return out


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float) -> Tensor:
    g, u = gate @ x, up @ x
    if limit:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return down @ (g * torch.sigmoid(g) * u)


def attended(w: dict[str, Tensor], prefix: str, xs: list[Tensor], window: int, rope: bool):
    heads, size = SMALL.num_attention_heads, SMALL.head_dim
    group = heads // SMALL.num_key_value_heads
    rows = []
    for position, x in enumerate(xs):
        q, k, v = ((w[f"{prefix}.{n}_proj.weight"] @ x).view(-1, size) for n in "qkv")
        q, k = norm(q, w[f"{prefix}.q_norm.weight"]), norm(k, w[f"{prefix}.k_norm.weight"])
        if rope:
            q, k = rotated(q, position), rotated(k, position)
        rows.append((q, k, v))
    outputs = []
    for i, (q, _, _) in enumerate(rows):
        first = max(0, i - window + 1) if window else 0
        out = []
        for a in range(heads):
            seen = rows[first : i + 1]
            scores = torch.stack([q[a] @ k[a // group] for _, k, _ in seen]) / math.sqrt(size)
            values = torch.stack([v[a // group] for _, _, v in seen])
            out.append(scores.softmax(0) @ values)
        outputs.append(w[f"{prefix}.o_proj.weight"] @ torch.cat(out))
    return outputs


def mixed(w: dict[str, Tensor], prefix: str, x: Tensor, limit: float) -> Tensor:
    scores = torch.sigmoid(w[f"{prefix}.gate.weight"] @ x)
    biased = scores + w[f"{prefix}.gate.e_score_correction_bias"]
    chosen = biased.argsort(descending=True, stable=True)[: SMALL.num_experts_per_tok].tolist()
    total = sum(scores[e] for e in chosen)
    shared = (w[f"{prefix}.shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down"))
    out = gated(x, *shared, limit)
    for e in chosen:
        gate, up = w[f"{prefix}.experts.gate_up_proj"][e].chunk(2)
        expert = gated(x, gate, up, w[f"{prefix}.experts.down_proj"][e], limit)
        out = out + SMALL.routed_scaling_factor * scores[e] / total * expert
    return out


def block(w: dict[str, Tensor], prefix: str, xs: list[Tensor], window: int, limit: float):
    normed = [norm(x, w[f"{prefix}.input_layernorm.weight"]) for x in xs]
    added = attended(w, f"{prefix}.self_attn", normed, window, rope=window > 0)
    xs = [x + y for x, y in zip(xs, added, strict=True)]
    outputs = []
    for x in xs:
        normed_x = norm(x, w[f"{prefix}.post_attention_layernorm.weight"])
        if f"{prefix}.mlp.gate.weight" in w:
            outputs.append(x + mixed(w, f"{prefix}.mlp", normed_x, limit))
        else:
            dense = (w[f"{prefix}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            outputs.append(x + gated(normed_x, *dense, limit))
    return outputs


def hidden_states(model: KExaone, ids: list[int]) -> Tensor:
    w = model.state_dict()
    xs = [w["model.embed_tokens.weight"][t] for t in ids]
    for i, (window, limit) in enumerate(zip(SMALL.windows, SMALL.swiglu_limits, strict=True)):
        xs = block(w, f"model.layers.{i}", xs, window, limit)
    return torch.stack([norm(x, w["model.norm.weight"]) for x in xs])


def drafted(model: KExaone, hidden: Tensor, ids: list[int]) -> Tensor:
    w = model.state_dict()
    xs = []
    for h, t in zip(hidden, ids, strict=True):
        e = norm(w["model.embed_tokens.weight"][t], w["mtp.pre_fc_norm_embedding.weight"])
        g = norm(h, w["mtp.pre_fc_norm_hidden.weight"])
        xs.append(w["mtp.fc.weight"] @ torch.cat((e, g)))
    xs = block(w, "mtp.layers.0", xs, 0, 0.0)
    return torch.stack([norm(x, w["mtp.norm.weight"]) for x in xs])


def close(ours: Tensor, theirs: Tensor) -> bool:
    # sums of at most a few dozen terms of size one, in float64; the angles are kept in float32
    return bool((ours - theirs).abs().max() < 1e-5)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.integers(8, 24), st.integers(1, 9))
def test_all_layers_against_plain_loops(seed, length, chunk):
    model = random_model(SMALL, seed=seed, std=0.3).double()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SMALL.vocab_size, (1, length), generator=generator)
    cache = Cache(SMALL, 1, like=model.lm_head.weight.detach(), chunk=chunk)
    with torch.no_grad():
        expected = hidden_states(model, ids[0].tolist()) @ model.lm_head.weight.T
        assert close(model(ids)[0], expected)
        parts = [model(part, cache=cache)[0] for part in ids.split(chunk, 1)]
        assert close(torch.cat(parts), expected)


@pytest.mark.parametrize("kind", ["reference", "triton"])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_and_plain_code_agree_in_float32(kind, seed):
    """The model in float64, which runs plain code, is held to the loops by the test above."""
    model = random_model(SMALL, seed=seed, std=0.3)
    exact = copy.deepcopy(model).double()
    ids = torch.randint(0, SMALL.vocab_size, (1, 20), generator=torch.Generator().manual_seed(seed))
    # an expert chosen otherwise would be no rounding error
    assert routing_margin(exact, ids) > 1e-5
    cache = Cache(SMALL, 1, like=model.lm_head.weight.detach(), chunk=6)
    with torch.no_grad(), impl(kind):
        expected, whole = exact(ids)[0], model(ids)[0]
        parts = torch.cat([model(part, cache=cache)[0] for part in ids.split(6, 1)])
    # sums of some dozen terms, five layers of about ten products each, condition of the norms
    bound = 2**-24 * 1000 * expected.abs().max()
    assert (whole - expected).abs().max() < bound
    assert (parts - expected).abs().max() < bound


@pytest.mark.parametrize("float8", [False, True])
def test_kernels_clamp_the_experts(float8):
    """Float32, or float8 weights: the kernels agree with plain code, and the clamp matters."""
    torch.manual_seed(0)
    experts = Experts(SMALL, limit=0.3).requires_grad_(False)
    for name in ("gate_up_proj", "down_proj"):
        weight = torch.randn(getattr(experts, name).shape) / 2
        if float8:
            found = quantize(weight)
            setattr(experts, f"{name}_scale", found.scale)
            weight = found.values
        setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))
    x, scores = torch.randn(12, SMALL.hidden_size), torch.rand(12, SMALL.num_experts)
    ids = scores.topk(2).indices
    routing = Routing(scores, ids, scores.gather(1, ids))
    with torch.no_grad(), impl("reference"):
        expected = experts(x, routing)
    with torch.no_grad(), impl("triton"):
        # float32 sums of 16 and of 8 terms
        torch.testing.assert_close(experts(x, routing), expected, rtol=2**-18, atol=2**-18)
        experts.limit = 0.0
        assert (experts(x, routing) - expected).abs().max() > 0.1


def test_the_draft_block_reads_its_own_output():
    model = random_model(SMALL, std=0.3).double()
    ids = torch.randint(0, SMALL.vocab_size, (12,), generator=torch.Generator().manual_seed(3))
    packing = Packing.of([12], starts=None, device=ids.device)
    ours = theirs = None
    with torch.no_grad():
        for step in range(SMALL.mtp_steps):
            count = 11 - step
            if ours is None or theirs is None:
                ours = model.features(ids, packing).hidden_NH
                theirs = hidden_states(model, ids.tolist())
            packing = Packing.of([count], starts=None, device=ids.device)
            followers = ids[1 + step : 1 + step + count]
            ours = model.predict_further(ours[:count], followers, packing, step=step)
            theirs = drafted(model, theirs[:count], followers.tolist())
            assert close(ours, theirs)


@pytest.mark.parametrize("layer", [i for i, limit in enumerate(SMALL.swiglu_limits) if limit])
def test_the_oracle_would_notice_a_missing_clamp(layer):
    limits = list(SMALL.swiglu_limits)
    limits[layer] = 0.0
    ids = torch.arange(20)[None]
    outputs = []
    for config in (SMALL, dataclasses.replace(SMALL, swiglu_limits=tuple(limits))):
        with torch.no_grad():
            outputs.append(random_model(config, std=0.3).double()(ids)[0])
    assert not close(*outputs)


def test_the_preset_is_what_is_tested_here():
    preset = Config.preset("k-exaone-2-750b")
    assert preset.windows[:6] == (0, 4096, 128, 128, 128, 0) and len(preset.windows) == 78
    assert preset.swiglu_limits == (0.0,) * 62 + (7.0,) * 16
    assert (preset.mtp_windows, preset.mtp_steps, preset.first_k_dense_replace) == ((0,), 4, 2)
