"""Sampling against plain numpy definitions, transformers' filters and exact distributions.

Statistical tests fail by chance once in a million draws of the seed, and their seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import FALSE_ALARM, defined, fit_probability
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kexaone.model.sampling import Sampling, draw, exponential_noise, fixed_seed, noise_key

DRAWS = 100_000
EXTREMES = (5e-324, 1e-46, 1e-38, 1e-10, 1e10, 1e38, 1e308)

# few different values, so that ties are the rule
tied_logits = st.lists(st.integers(-3, 3).map(lambda n: n / 2), min_size=1, max_size=9)
temperatures = st.sampled_from([0.1, 0.5, 1.0, 1.7])


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([noise_key(seed, 0, i) for i in range(count)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    tied_logits,
    st.data(),
    st.one_of(st.just(0.0), temperatures),
    st.integers(0, 11),
    st.sampled_from([1e-6, 0.1, 0.5, 0.75, 0.999, 1.0]),
    st.sampled_from([-1.5, 0.0, 0.5, 4.0]),
)
def test_probabilities_are_those_of_the_definition(logits, data, temperature, k, p, penalty):
    seen = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p, presence_penalty=penalty)
    expected, margin = defined(logits, seen, sampling)
    # float32 cannot tell on which side of top_p a sum lies that comes this close to it
    assume(margin > 1e-6)
    found = sampling.probabilities(torch.tensor(logits), torch.tensor(seen))
    assert found.dtype == torch.float32
    # a handful of float32 roundings of numbers below 1
    assert np.abs(found.double().numpy() - expected).max() <= 2**-20
    assert ((found > 0).numpy() == (expected > 0)).all()


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    temperatures,
    st.integers(1, 12),
    st.floats(0.05, 0.99),
)
def test_filters_agree_with_transformers(logits, temperature, k, p):
    _, margin = defined(
        logits, [False] * len(logits), Sampling(temperature=temperature, top_k=k, top_p=p)
    )
    assume(margin > 1e-5)
    scores = torch.tensor([logits])
    scaled = scores / temperature
    # among equals transformers keeps all, or another than the first
    assume(len(set(scaled.softmax(-1)[0].tolist())) == len(logits))
    for warper in (
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(min(k, len(logits))),
        TopPLogitsWarper(p),
    ):
        scores = warper(None, scores)
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p)
    found = sampling.probabilities(torch.tensor([logits]))
    # its quotients, from which no peak was taken, are rounded at their own size; a softmax passes
    # on half of the largest error
    rounding = torch.finfo(torch.float32).eps / 2 * scaled.abs().max() / 2
    assert (found - scores.softmax(-1)).abs().max() <= 2**-20 + rounding


@pytest.mark.parametrize("size", [4, 33, 1000, 20_000])
@pytest.mark.parametrize("limit", ["top_k", "top_p"])
def test_among_equals_the_lower_index_stays(size, limit):
    """Equal logits at scattered places; what else there is lies far below."""
    logits = torch.full((2, size), -50.0)
    places = torch.randperm(size, generator=generator())[: min(size, 4096)].sort().values
    logits[:, places] = 2.0
    # two and a half shares of the mass are reached by the third token
    value = 3 if limit == "top_k" else 2.5 / len(places)
    found = Sampling(temperature=1.0, **{limit: value}).probabilities(logits)
    expected = torch.zeros(2, size)
    expected[:, places[:3]] = 1 / 3
    torch.testing.assert_close(found, expected)


def test_greedy_takes_the_lowest_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, -1.0, -2.0, 0.5]])
    found = Sampling().probabilities(logits)
    assert torch.equal(found, torch.eye(4)[[1, 0, 3]])
    assert draw(found, keys(3)).tolist() == [1, 0, 3]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}])
def test_limits_of_sampling_are_greedy(options):
    logits = torch.randn(50, 20, generator=generator())
    found = Sampling(**{"temperature": 1.0} | options).probabilities(logits)
    assert torch.equal(found, Sampling().probabilities(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", EXTREMES)
@pytest.mark.parametrize("top_p", [1e-308, 5e-324, 1e-46, 0.5, 1.0])
def test_extreme_settings_stay_distributions(dtype, temperature, top_p):
    logits = torch.tensor([[60.0, 60.0, -60.0], [0.0, 1e-4, 2e-4], [5.0, -torch.inf, 1.0]])
    found = Sampling(temperature=temperature, top_p=top_p, top_k=2).probabilities(logits.to(dtype))
    assert found.dtype == torch.float32 and (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(3))
    assert found[0, 2] == 0 and found[2, 1] == 0
    # a temperature next to zero leaves only the peaks, and a huge one makes the kept tokens equal
    if top_p == 1.0 and (temperature < 1e-9 or temperature > 1e9):
        pair = torch.tensor([0.5, 0.5])
        torch.testing.assert_close(found[0, :2], pair)
        if temperature > 1e9:
            torch.testing.assert_close(found[2, [0, 2]], pair)
        else:
            assert found[2, 0] == 1


@pytest.mark.parametrize("penalty", [3.4e38, -3.4e38])
@pytest.mark.parametrize("seen", [[True, False, True], [True, True, True], [False, False, False]])
def test_extreme_penalties_stay_distributions(penalty, seen):
    logits, mask = torch.tensor([1.0, 2.0, 1.5]), torch.tensor(seen)
    found = Sampling(temperature=1.0, presence_penalty=penalty).probabilities(logits, mask)
    assert abs(float(found.sum()) - 1) <= 2**-20
    if mask.any() and not mask.all():
        assert not found[mask if penalty > 0 else ~mask].any()


def test_penalty_counts_a_token_once_and_needs_no_history():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    sampling = Sampling(presence_penalty=1.5)
    assert sampling.probabilities(logits).argmax() == 0
    assert sampling.probabilities(logits, torch.tensor([[True, False, False]])).argmax() == 1
    assert sampling.probabilities(logits, torch.tensor([[True, True, False]])).argmax() == 0
    reward = Sampling(presence_penalty=-1.5)
    assert reward.probabilities(logits, torch.tensor([[False, True, False]])).argmax() == 1


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 3, 7), (0, 7), (4, 1)])
def test_any_batch_shape_row_by_row_and_nothing_is_written_to_the_input(shape):
    logits = torch.randn(shape, generator=generator())
    seen = torch.rand(shape, generator=generator()) < 0.5
    before = logits.clone(), seen.clone()
    for temperature in (0.0, 0.9):
        sampling = Sampling(temperature=temperature, top_k=4, top_p=0.8, presence_penalty=1.0)
        found = sampling.probabilities(logits, seen)
        assert found.shape == logits.shape
        rows = zip(*(x.reshape(-1, shape[-1]) for x in (found, logits, seen)), strict=True)
        for row, x, s in rows:
            torch.testing.assert_close(row, sampling.probabilities(x, s))
    assert torch.equal(logits, before[0]) and torch.equal(seen, before[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0, got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"presence_penalty": math.inf}, "presence_penalty must be finite"),
        ({"presence_penalty": math.nan}, "presence_penalty must be finite"),
        ({"presence_penalty": -1e39}, "presence_penalty must be finite"),
        ({"seed": -1}, r"seed must lie in 0\.\.2\^63-1, got -1"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_values_out_of_range(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        Sampling(**options)
    assert "\n" not in str(caught.value)


def test_seeds():
    uniform = torch.full((64, 8), 1 / 8)
    same = [draw(uniform, keys(64, 3)) for _ in range(2)]
    other = draw(uniform, keys(64, 4))
    # two independent draws agree with probability 8^-64
    assert torch.equal(*same) and not torch.equal(same[0], other)
    assert fixed_seed(Sampling(seed=3)) == 3
    fresh = {fixed_seed(Sampling(seed=None)) for _ in range(9)}
    assert len(fresh) == 9 and all(0 <= seed < 2**63 for seed in fresh)


def test_a_draw_depends_on_its_row_and_key_alone():
    probabilities = torch.rand(40, 300, generator=generator()).softmax(-1)
    together = draw(probabilities, keys(40))
    order = torch.randperm(40, generator=generator())
    assert torch.equal(draw(probabilities[order], keys(40)[order]), together[order])
    assert draw(probabilities[7:8], keys(40)[7:8]) == together[7]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 2**31))
def test_noise_is_splitmix64(seed, stream, index):
    """Against a definition in Python's integers, and neighbours have keys of their own."""
    key = noise_key(seed, stream, index)
    near = {key, noise_key(seed, stream + 1, index), noise_key(seed, stream, index + 1)}
    assert len(near | {noise_key((seed + 1) % 2**63, stream, index)}) == 4
    found = exponential_noise(torch.tensor([key]), 5)[0].tolist()
    state, mask = key % 2**64, 2**64 - 1
    for clock in found:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        uniform = ((z ^ (z >> 31)) >> 11) + 0.5
        assert math.isclose(clock, -math.log(uniform / 2**53), rel_tol=1e-12, abs_tol=1e-15)


def test_noise_is_exponential_across_keys_tokens_and_places():
    """G-tests of the deciles, along each axis that a text goes; and neighbours are independent."""
    for table in (
        exponential_noise(keys(DRAWS), 3)[:, 2],
        exponential_noise(keys(3), DRAWS)[1],
        exponential_noise(torch.tensor([noise_key(i, 0, 0) for i in range(DRAWS)]), 1)[:, 0],
        exponential_noise(torch.tensor([noise_key(0, i, 5) for i in range(DRAWS)]), 1)[:, 0],
    ):
        decile = ((-table).exp() * 10).long().clamp(max=9)
        tenth = torch.full((10,), 0.1, dtype=torch.float64)
        assert fit_probability(decile.bincount(minlength=10), tenth) > FALSE_ALARM
        pairs = (10 * decile[:-1] + decile[1:])[::2]
        pair = torch.full((100,), 0.01, dtype=torch.float64)
        assert fit_probability(pairs.bincount(minlength=100), pair) > FALSE_ALARM


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    counts = draw(probabilities.expand(DRAWS, -1), keys(DRAWS)).bincount(minlength=5)
    assert fit_probability(counts, probabilities) > FALSE_ALARM
    other = torch.tensor([0.49, 0.0, 0.31, 0.15, 0.05])
    assert fit_probability(counts, other) < FALSE_ALARM
