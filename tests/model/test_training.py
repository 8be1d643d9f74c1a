"""One training step: losses against plain loops, accumulation, clipping, rates, router bias."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from training_cases import (
    TINY,
    assert_same,
    new_trainer,
    single_threaded,
    state_of,
    variants,
    windows,
)

from kexaone import Config, KExaone, impl
from kexaone.kernels.balance import balance_statistics
from kexaone.model.data import DataError, Windows
from kexaone.model.losses import balance_loss, training_loss, update_router_bias
from kexaone.model.moe import MoE
from kexaone.model.packing import Packing
from kexaone.model.trainer import Trainer, TrainingError, TrainSettings

LOSS_OPTIONS = {"mtp_weight": 0.3, "balance_weight": 0.7}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


def surprise(logits: Tensor, target: int) -> float:
    """-log softmax(logits)[target], in nats."""
    values = logits.double().tolist()
    highest = max(values)
    return math.log(sum(math.exp(v - highest) for v in values)) + highest - values[target]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def losses_by_hand(model: KExaone, ids: Tensor) -> tuple[float, float]:
    """Next-token and MTP loss, every prediction by itself, from nothing but the tokens before."""

    def packing(length: int) -> Packing:
        return Packing.of([length], starts=None, device=ids.device)

    next_token: list[float] = []
    further: list[list[float]] = [[] for _ in range(model.config.mtp_steps)]
    for row in ids:
        for target in range(1, len(row)):
            hidden = model.features(row[:target], packing(target)).hidden_NH
            next_token.append(surprise(model.lm_head(hidden[-1]), int(row[target])))
            for depth in range(min(target - 1, len(further))):
                known = target - 1 - depth
                h = hidden[:known]
                for j in range(depth + 1):
                    h = model.predict_further(h, row[1 + j : 1 + j + known], packing(known), step=j)
                further[depth].append(surprise(model.lm_head(h[-1]), int(row[target])))
    return mean(next_token), mean([mean(x) for x in further]) if further else 0.0


@torch.no_grad()
def balance_by_hand(scores: Tensor, ids: Tensor) -> float:
    """One sequence: E/(K T) x times chosen x mean share of the scores, summed over experts."""
    experts = scores.shape[1]
    total = 0.0
    for e in range(experts):
        times = sum(row.count(e) for row in ids.tolist())
        share = mean([row[e] / sum(row) for row in scores.tolist()])
        total += experts / ids.numel() * times * share
    return total


@settings(max_examples=25, deadline=None)
@given(
    config=variants(), batch=st.integers(1, 3), length=st.integers(5, 8), seed=st.integers(0, 99)
)
def test_training_loss_equals_plain_loops(
    config: Config, batch: int, length: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = KExaone(config).double()
    ids = torch.randint(0, 32, (batch, length))
    with torch.no_grad():
        loss = training_loss(model, ids, **LOSS_OPTIONS)
    next_token, mtp = losses_by_hand(model, ids)
    # Only the loss itself is in float32: logits rounded (2 x |logit| x u, u = 2^-24), a softmax sum
    # over 32 terms, means over at most 24 tokens of at most 3 depths, with |logit| and loss < 40.
    bound = 2**-24 * (2 * 40 + 32 + 40 * (24 + 3))
    assert abs(float(loss.next_token) - next_token) < bound
    assert abs(float(loss.mtp) - mtp) < bound
    packing = Packing.of([length], starts=None, device=ids.device)
    rows = [model.features(row, packing).routings for row in ids]
    layers = list(zip(*rows, strict=True))
    by_hand = [mean([balance_by_hand(r.scores_TE, r.ids_TK) for r in layer]) for layer in layers]
    balance = mean(by_hand) if layers else 0.0
    # values near 1 from float32 sums over 9 tokens, 4 experts, 3 sequences and 6 layers
    assert abs(float(loss.balance) - balance) < 2**-24 * 50
    for layer, load in zip(layers, loss.expert_loads, strict=True):
        chosen = [e for r in layer for e in r.ids_TK.flatten().tolist()]
        assert load.tolist() == [chosen.count(e) for e in range(4)]
    assert torch.equal(loss.total, loss.next_token + 0.3 * loss.mtp + 0.7 * loss.balance)


def test_one_document_does_not_see_another() -> None:
    torch.manual_seed(1)
    model, ids = KExaone(TINY).double(), torch.randint(0, 32, (2, 8))
    for other in (ids[1], ids[1].flip(0)):
        with torch.no_grad():
            loss = training_loss(model, torch.stack([ids[0], other]))
            alone = [training_loss(model, row[None]) for row in (ids[0], other)]
        for name in ("next_token", "mtp", "balance"):
            expected = mean([float(getattr(x, name)) for x in alone])
            # float32 means over 16 tokens instead of twice over 8
            assert float(getattr(loss, name)) == pytest.approx(expected, rel=20 * 2**-24)


@pytest.mark.parametrize("shape", [(8,), (2, 3), (0, 8), (1, 2, 8)])
def test_training_loss_of_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, T\] with T >= 4, got"):
        training_loss(KExaone(TINY), torch.zeros(shape, dtype=torch.int64))


@settings(deadline=None)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 9),
    experts=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["reference", "triton"]),
    data=st.data(),
)
def test_balance_loss(
    batch: int, tokens: int, experts: int, seed: int, kind: str, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch * tokens, experts, generator=random) + 1e-3
    scores.requires_grad_()
    ids = scores.detach().topk(top_k).indices
    with impl(kind):
        statistics = balance_statistics(scores, ids, sequences=batch)
    counts = statistics.counts_BE
    rows = list(zip(scores.detach().split(tokens), ids.split(tokens), strict=True))
    assert counts.tolist() == [
        [sum(row.count(e) for row in i.tolist()) for e in range(experts)] for _, i in rows
    ]
    loss = balance_loss(statistics)
    # float32: a share is a sum of E and a quotient, then sums over T, E and B; all terms positive
    error = (2 * experts + tokens + batch + 6) * 2**-24
    expected = mean([balance_by_hand(*row) for row in rows])
    assert float(loss.detach()) == pytest.approx(expected, rel=error)
    (grad,) = torch.autograd.grad(loss, scores)
    frequency = counts.double() * experts / (top_k * tokens)
    for row, (row_scores, _) in enumerate(rows):
        sums = row_scores.double().sum(-1, keepdim=True)
        overload = frequency[row] - row_scores.double() / sums @ frequency[row][:, None]
        # the two terms of the difference, each below the largest frequency, may cancel
        off = grad.view(batch, tokens, experts)[row] * sums * batch * tokens - overload
        assert off.abs().max() <= 2 * error * frequency[row].max()


@settings(max_examples=30, deadline=None)
@given(
    loads=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=2, max_size=2),
    rate=st.floats(1e-5, 0.1),
    start=st.floats(-1, 1, width=32),
)
def test_router_bias_moves_by_the_rate(loads: list[list[int]], rate: float, start: float) -> None:
    model = KExaone(dataclasses.replace(TINY, mtp_windows=(), mtp_steps=0)).bfloat16()
    biases = [
        m.gate.e_score_correction_bias.fill_(start) for m in model.modules() if isinstance(m, MoE)
    ]
    update_router_bias(model, [torch.tensor(x) for x in loads], rate=rate)
    for bias, load in zip(biases, loads, strict=True):
        signs = [(sum(load) > 4 * x) - (sum(load) < 4 * x) for x in load]
        step = torch.tensor(rate, dtype=torch.float32)
        assert bias.dtype == torch.float32
        assert torch.equal(bias, start + step * torch.tensor(signs, dtype=torch.float32))
    with pytest.raises(ValueError, match="the model has 2 sparse layers, got 1 loads"):
        update_router_bias(model, [torch.tensor(loads[0])])


class Stepped:
    """Stands in for the optimizer's update and keeps the gradients it would have used."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grads: dict[str, Tensor] = {}
        self.model = trainer.model
        monkeypatch.setattr(trainer.optimizer, "step", self.take)

    def take(self, lr: float) -> None:
        named = self.model.named_parameters()
        self.grads = {n: p.grad.clone() for n, p in named if p.grad is not None}

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.grads.values()))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_the_whole_batch(
    accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"clip": 1e9, "mtp_weight": 0.5, "balance_weight": 0.5}
    whole = new_trainer(dtype=torch.float64, batch_size=4, **options)
    parts = new_trainer(
        dtype=torch.float64, batch_size=4 // accumulation, accumulation=accumulation, **options
    )
    one, many = Stepped(whole, monkeypatch), Stepped(parts, monkeypatch)
    first, second = whole.step(), parts.step()
    assert one.grads.keys() == many.grads.keys()
    for name, grad in one.grads.items():
        # The losses are float32, but dividing by a power of two is exact, so both get the same
        # bits from them. What differs is the order of float64 sums over 32 tokens, and each of
        # their terms comes from a chain of about 3 layers x 10 products: 1000 roundings of 2^-53
        # come to 1e-13, and a factor of 1e3 is left for terms that cancel.
        assert torch.allclose(many.grads[name], grad, rtol=0, atol=1e-10 * one.norm), name
    for field in ("loss", "next_token", "mtp", "balance"):
        # means of float32 values of at most 28 each: a sum of 32 terms rounds 32 times
        assert getattr(second, field) == pytest.approx(getattr(first, field), rel=33 * 2**-24)
    assert first.tokens == second.tokens == 32
    for a, b in zip(whole.model.buffers(), parts.model.buffers(), strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e4])
def test_clipping(clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    free, clipped = new_trainer(clip=1e9), new_trainer(clip=clip)
    wanted, got = Stepped(free, monkeypatch), Stepped(clipped, monkeypatch)
    norm, report = free.step().grad_norm, clipped.step()
    # float32: the squares of at most 1,024 elements are added in at least 8 lanes, 128 roundings of
    # 2^-24 that the root halves: 4e-6; torch divides by norm + 1e-6, and the norm is above 1
    assert report.grad_norm == norm == pytest.approx(wanted.norm, rel=1e-5) and norm > 1
    assert got.norm == pytest.approx(min(clip, norm), rel=1e-5)
    for name, grad in wanted.grads.items():
        scaled = grad * min(1.0, clip / (norm + 1e-6))
        assert torch.allclose(got.grads[name], scaled, rtol=1e-5, atol=1e-12), name


def test_gradient_that_is_not_finite_changes_nothing() -> None:
    trainer = new_trainer()
    trainer.step()
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 4] = math.inf
    expected = state_of(trainer)
    with pytest.raises(TrainingError, match="gradient of step 1 is not finite"):
        trainer.step()
    assert_same(state_of(trainer), expected)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_loss_falls_on_a_repeating_text() -> None:
    torch.manual_seed(3)
    text = torch.tensor([3, 14, 15, 9, 26, 5, 3, 14, 2]).repeat(40)
    chosen = TrainSettings(steps=60, batch_size=4, sequence_length=25, learning_rate=0.02, warmup=5)
    trainer = Trainer(KExaone(TINY), Windows(text, 25), chosen)
    reports = [trainer.step() for _ in range(60)]
    assert reports[0].next_token > 3 and reports[0].mtp > 3
    # 14 is followed by 15 or by 2, which only the tokens before it tell: whoever looks at single
    # tokens cannot get below 2/9 ln 2 = 0.154
    assert reports[-1].next_token < 0.1 and reports[-1].mtp < 0.1
    assert trainer.evaluate(Windows(text[5:], 25), 2) < 0.1


def test_evaluate_is_the_mean_loss_and_leaves_no_trace() -> None:
    trainer = new_trainer()
    expected, held_out = state_of(trainer), windows(seed=4)
    losses = [
        training_loss(trainer.model, Windows.batch(held_out, i, 2)).next_token.detach()
        for i in range(3)
    ]
    for training in (True, False):
        trainer.model.train(training)
        # three float32 terms added in float64, in the same order
        assert trainer.evaluate(held_out, 3) == mean([float(x) for x in losses])
        assert trainer.model.training is training
    assert held_out.asked == [0, 1, 2] * 2
    assert_same(state_of(trainer), expected)
    with pytest.raises(ValueError, match="batches must be positive, got 0"):
        trainer.evaluate(held_out, 0)


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    decay_fraction=st.floats(0, 1),
    peak=st.floats(1e-6, 1),
)
def test_rate_of_a_run_of_any_length(
    steps: int, warmup: int, decay_fraction: float, peak: float
) -> None:
    chosen = TrainSettings(
        steps=steps, warmup=warmup, decay_fraction=decay_fraction, learning_rate=peak
    )
    rates = [chosen.rate(i) for i in range(steps + 1)]
    decay = round(decay_fraction * steps)
    rise = min(warmup, steps - decay)
    assert rates[-1] == 0 and all(0 < r <= peak for r in rates[:-1])
    assert rates[:rise] == sorted(rates[:rise])
    assert all(r == peak for r in rates[max(rise - 1, 0) : steps - decay + (decay > 0)])
    assert rates[steps - decay :] == sorted(rates[steps - decay :], reverse=True)
    # continuous: no jump above the two slopes (except to 0 after a run that does not decay);
    # each rate is a quotient and a product, so it is off by two roundings of 2^-53 at most
    slope = peak / min(rise or steps, decay or steps)
    for before, after in itertools.pairwise(rates if decay else rates[:-1]):
        assert abs(after - before) <= slope + 4 * 2**-53 * peak


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be positive, got 0"),
        ("steps", 1.5, "steps must be a finite int, got 1.5"),
        ("batch_size", True, "batch_size must be a finite int, got True"),
        ("learning_rate", math.nan, "learning_rate must be a finite float, got nan"),
        ("clip", 0.0, "clip must be positive, got 0.0"),
        ("save_every", -1, "save_every must be >= 0, got -1"),
        ("learning_rate", 1e7, r"learning_rate must be <= 1e\+06"),
        ("seed", 2**63, r"seed must be below 2\^63"),
        ("batch_size", 1 << 20, "too large: use accumulation"),
        ("sequence_length", 1, "sequence_length must be >= 2, got 1"),
        ("decay_fraction", 1.1, "decay_fraction must lie in 0..1, got 1.1"),
    ],
)
def test_settings_out_of_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainSettings(**{"steps": 1} | {field: value})


def test_data_that_does_not_fit_the_model() -> None:
    chosen = TrainSettings(steps=1, sequence_length=8)
    with pytest.raises(DataError, match=r"tokens 0\.\.32 do not fit a vocabulary of 32"):
        Trainer(KExaone(TINY), Windows(torch.arange(33), 8), chosen)
    with pytest.raises(DataError, match="windows have 7 tokens, settings ask for 8"):
        Trainer(KExaone(TINY), windows(length=7), chosen)
