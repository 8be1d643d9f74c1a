"""The model against transformers' ExaoneMoeForCausalLM: an implementation nobody here wrote.

Top-k routing is discontinuous: where the last chosen and the first rejected expert score within
rounding of each other, two correct programs may choose differently. Such draws are set aside.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import configs, random_model, routing_margin, transformers_model

from kexaone import Config
from kexaone.model.cache import Cache

TOLERANCE = 1e-4
EXAMPLES = settings(max_examples=12, deadline=None)


def case(config: Config, seed: int, batch: int, length: int):
    model = random_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    assume(routing_margin(model, ids) > 1e-5)
    return model, transformers_model(model), ids


seeds = st.integers(0, 2**31)


@EXAMPLES
@given(configs(), seeds, st.integers(1, 3), st.integers(1, 40))
def test_full_forward(config, seed, batch, length):
    model, other, ids = case(config, seed, batch, length)
    with torch.no_grad():
        assert (model(ids) - other(ids).logits).abs().max() <= TOLERANCE


@EXAMPLES
@given(configs(), seeds, st.integers(1, 11))
def test_chunked_prefill(config, seed, chunk):
    model, other, ids = case(config, seed, 2, 40)
    cache = Cache(config, 2, like=model.lm_head.weight, chunk=chunk)
    with torch.no_grad():
        ours = torch.cat([model(part, cache=cache) for part in ids.split(chunk, 1)], 1)
        assert (ours - other(ids).logits).abs().max() <= TOLERANCE


# transformers' sliding cache of window 1 keeps every key instead of none
@EXAMPLES
@given(configs(smallest_window=2), seeds)
def test_decode_past_three_windows(config, seed):
    length = 3 * max(config.windows) + 12
    model, other, ids = case(config, seed, 2, length)
    cache = Cache(config, 2, like=model.lm_head.weight, chunk=4)
    state = None
    with torch.no_grad():
        for part in (ids[:, :4], *ids[:, 4:].split(1, 1)):
            theirs = other(part, past_key_values=state, use_cache=True)
            state = theirs.past_key_values
            assert (model(part, cache=cache) - theirs.logits).abs().max() <= TOLERANCE


@EXAMPLES
@given(configs(), seeds, st.integers(0, 20), st.booleans())
def test_padded_batches(config, seed, padding, left):
    model, other, ids = case(config, seed, 2, 24)
    mask = torch.ones_like(ids)
    mask[0, slice(0, padding) if left else slice(24 - padding, 24)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = other(ids, attention_mask=mask, position_ids=positions).logits
        ours = model(ids, attention_mask=mask)
    kept = mask.bool()
    assume(routing_margin(model, ids[:1][:, kept[0]]) > 1e-5)
    assert (ours - theirs)[kept].abs().max() <= TOLERANCE
    assert not ours[~kept].any()


@EXAMPLES
@given(configs(), seeds)
def test_gradients(config, seed):
    model, other, ids = case(config, seed, 2, 20)
    target = torch.roll(ids, 1, 1).flatten()
    for network, logits in ((model, model(ids)), (other, other(ids).logits)):
        network.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target).backward()
    theirs = dict(other.named_parameters())
    checked = 0
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            continue
        ours, reference = parameter.grad, theirs[name].grad
        if reference is None:
            reference = torch.zeros_like(parameter)
        error = (ours - reference).norm()
        # a gradient that is zero in exact arithmetic is left with float32 rounding of its terms
        assert error <= TOLERANCE * reference.norm() + 2**-23, name
        checked += 1
    assert checked == len(theirs)


def test_bfloat16_is_within_its_rounding():
    config = Config.preset("mini")
    model = random_model(config, std=0.05)
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.double()(ids)
        bias = model.model.layers[1].mlp.gate.e_score_correction_bias
        assert bias.dtype == torch.float64
        low = model.float().bfloat16()(ids)
    assert low.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    # 2^-8 is one rounding of bfloat16; about a hundred of them lie on the way through 8 layers
    assert (low.double() - exact).norm() / exact.norm() < 10 * 2**-8


@pytest.mark.parametrize("limit", [0.5, 7.0])
def test_swiglu_clamp_of_the_second_model(limit):
    from kexaone.model.layers import swiglu

    gate = torch.linspace(-9, 9, 37, dtype=torch.float64)
    up = torch.linspace(-8, 10, 37, dtype=torch.float64)
    expected = [
        min(g, limit) / (1 + torch.tensor(-min(g, limit)).exp().item()) * max(-limit, min(u, limit))
        for g, u in zip(gate.tolist(), up.tolist(), strict=True)
    ]
    assert torch.allclose(swiglu(gate, up, limit), torch.tensor(expected).double(), atol=1e-6)
