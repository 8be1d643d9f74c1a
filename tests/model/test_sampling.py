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
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kexaone.model.sampling import Sampling, draw, verify

DRAWS = 100_000
CPU = torch.device("cpu")
EXTREMES = (5e-324, 1e-46, 1e-38, 1e-10, 1e10, 1e38, 1e308)

# few different values, so that ties are the rule
tied_logits = st.lists(st.integers(-3, 3).map(lambda n: n / 2), min_size=1, max_size=9)
temperatures = st.sampled_from([0.1, 0.5, 1.0, 1.7])


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
    assert draw(found, generator()).tolist() == [1, 0, 3]


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
    same = [draw(uniform, Sampling(seed=3).generator(CPU)) for _ in range(2)]
    other = draw(uniform, Sampling(seed=4).generator(CPU))
    fresh = [draw(uniform, Sampling(seed=None).generator(CPU)) for _ in range(2)]
    # two independent draws agree with probability 8^-64
    assert torch.equal(*same)
    assert not torch.equal(same[0], other) and not torch.equal(*fresh)


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    counts = draw(probabilities.expand(DRAWS, -1), generator()).bincount(minlength=5)
    assert fit_probability(counts, probabilities) > FALSE_ALARM
    other = torch.tensor([0.49, 0.0, 0.31, 0.15, 0.05])
    assert fit_probability(counts, other) < FALSE_ALARM


# target and drafter per position; the drafter may be right, wrong, or elsewhere altogether
P = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.7, 0.3]])
DRAFTERS = {
    "different": [[0.2, 0.2, 0.1, 0.5], [0.4, 0.3, 0.2, 0.1]],
    "equal": P[:2].tolist(),
    "disjoint first": [[0.0, 0.0, 0.0, 1.0], [0.25, 0.25, 0.25, 0.25]],
    "certain": [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]],
}


def simulate(q: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted drafts [DRAWS], and the tokens that come out [DRAWS, 3], -1 where there is none."""
    random = generator(7)
    drafts = torch.stack([draw(row.expand(DRAWS, -1), random) for row in q], 1)
    verdict = verify(P.expand(DRAWS, -1, -1), q.expand(DRAWS, -1, -1), drafts, random)
    tokens = torch.cat((drafts, drafts[:, :1]), 1)
    index = torch.arange(3)
    tokens = torch.where(index == verdict.accepted[:, None], verdict.following[:, None], tokens)
    return verdict.accepted, tokens.masked_fill(index > verdict.accepted[:, None], -1)


@pytest.mark.parametrize("name", DRAFTERS)
def test_verified_tokens_are_distributed_as_the_target(name):
    """Every token that comes out follows its p, whatever came before it: positions in turn."""
    q = torch.tensor(DRAFTERS[name])
    accepted, tokens = simulate(q)
    for i in range(3):
        reached = tokens[accepted >= i]
        if not len(reached):
            continue
        counts = reached[:, i].bincount(minlength=4)
        assert fit_probability(counts, P[i]) > FALSE_ALARM, i
        if i < 2 and name == "different":
            assert fit_probability(counts, q[i]) < FALSE_ALARM
        # given the first token that came out, too
        for first in range(4):
            rows = reached[reached[:, 0] == first]
            if i and len(rows):
                chance = fit_probability(rows[:, i].bincount(minlength=4), P[i])
                assert chance > FALSE_ALARM, (i, first)


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_stand_as_often_as_the_distributions_overlap(name):
    q = torch.tensor(DRAFTERS[name])
    accepted, _ = simulate(q)
    first, second = torch.minimum(P[:2], q).sum(-1).double().tolist()
    shares = torch.tensor([1 - first, first * (1 - second), first * second]).double()
    # sums of float32 leave rounding where there is nothing
    shares = torch.where(shares > 1e-6, shares, 0.0)
    assert fit_probability(accepted.bincount(minlength=3), shares) > FALSE_ALARM


def test_verify_without_drafts_is_a_draw_from_the_target():
    target = P[:1].expand(DRAWS, 1, 4)
    verdict = verify(target, target[:, :0], torch.empty(DRAWS, 0, dtype=torch.int64), generator())
    assert not verdict.accepted.any()
    assert fit_probability(verdict.following.bincount(minlength=4), P[0]) > FALSE_ALARM


@given(st.data(), st.integers(1, 4), st.integers(2, 5))
def test_greedy_drafts_stand_exactly_as_far_as_they_match(data, count, size):
    tokens = st.integers(0, size - 1)
    best = data.draw(st.lists(tokens, min_size=count + 1, max_size=count + 1))
    drafts = data.draw(st.lists(tokens, min_size=count, max_size=count))
    eye = torch.eye(size)
    verdict = verify(
        eye[torch.tensor([best])], eye[torch.tensor([drafts])], torch.tensor([drafts]), generator()
    )
    stood = next((i for i in range(count) if best[i] != drafts[i]), count)
    assert verdict.accepted.tolist() == [stood]
    assert verdict.following.tolist() == [best[stood]]


def test_a_target_rounded_below_the_drafter_still_gives_a_token():
    """Nothing positive is left of p - q, yet the draft was refused: draw from p."""
    q = torch.tensor([[[0.5, 0.5]]])
    p = torch.tensor([[[0.25, 0.25], [0.5, 0.5]]]).expand(200, 2, 2)
    verdict = verify(p, q.expand(200, 1, 2), torch.zeros(200, 1, dtype=torch.int64), generator())
    refused = verdict.following[verdict.accepted == 0]
    assert 0 < len(refused) < 200 and set(refused.tolist()) == {0, 1}
