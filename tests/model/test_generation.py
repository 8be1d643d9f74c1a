"""Generation against full passes without a cache, transformers, and exact distributions.

Models run in float64, where different orders of summation differ by about 1e-14: too little to
flip a routing decision or the larger of two logits in practice.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import (
    FALSE_ALARM,
    configs,
    defined,
    fit_probability,
    random_model,
    routing_margin,
    small_config,
    transformers_model,
)

from kexaone import Config, KExaone
from kexaone.model.engine import Engine
from kexaone.model.generation import Generation, Statistics, generate
from kexaone.model.packing import Packing
from kexaone.model.sampling import Sampling

EXAMPLES = settings(max_examples=30, deadline=None)
VOCAB = 5  # so small that random drafts often stand
seeds = st.integers(0, 2**31)
tokens = st.integers(0, VOCAB - 1)
ragged_prompts = st.lists(st.lists(tokens, min_size=1, max_size=20), min_size=1, max_size=4)
mtp_windows = st.sampled_from([(0,), (3,), (0, 2)])


def with_drafter(config: Config, windows: tuple[int, ...] = (0,)) -> Config:
    return dataclasses.replace(config, vocab_size=VOCAB, mtp_windows=windows)


def last_logits(model: KExaone, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(rows))[:, -1].float()


def greedy(model: KExaone, prompt: list[int], count: int, penalty: float = 0.0) -> list[int]:
    """The definition: a whole pass for every token, the lowest index of the largest logit."""
    new: list[int] = []
    for _ in range(count):
        logits = last_logits(model, [[*prompt, *new]])[0].tolist()
        scores = [x - penalty * (t in new) for t, x in enumerate(logits)]
        new.append(scores.index(max(scores)))
    return new


def until(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    return tokens[: next((i for i, t in enumerate(tokens) if t in stop), len(tokens)) + 1]


def counting_model() -> KExaone:
    """After token t comes t + 1, for the decoder and for the MTP block: every draft stands."""
    model = random_model(small_config(max_position_embeddings=64, hidden_size=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
        # a token's state is a direction of its own, kept by what follows
        model.model.embed_tokens.weight.copy_(torch.eye(61, 64))
        model.lm_head.weight.copy_(torch.eye(61, 64).roll(1, 0))
        assert model.mtp is not None
        model.mtp.fc.weight.copy_(torch.cat((torch.eye(64), torch.zeros(64, 64)), 1))
    return model


@EXAMPLES
@given(
    st.tuples(configs(), mtp_windows), seeds, ragged_prompts, st.integers(1, 12), st.integers(1, 25)
)
def test_plain_and_speculative_greedy_are_the_definition(drawn, seed, prompts, count, chunk):
    model = random_model(with_drafter(*drawn), seed=seed).double()
    expected = [greedy(model, p, count) for p in prompts]
    for drafts in range(5):
        found = generate(model, prompts, max_new_tokens=count, drafts=drafts, chunk=chunk)
        assert found.token_ids == expected, drafts


@EXAMPLES
@given(configs(), seeds, ragged_prompts, st.integers(1, 4), st.floats(-2, 2), st.sets(tokens))
def test_stop_tokens_and_penalty_with_drafts(config, seed, prompts, drafts, penalty, stop):
    model = random_model(with_drafter(config), seed=seed).double()
    options = {"sampling": Sampling(presence_penalty=penalty), "stop_ids": tuple(stop)}
    expected = [until(greedy(model, p, 9, penalty), tuple(stop)) for p in prompts]
    for count in (0, drafts):
        found = generate(model, prompts, max_new_tokens=9, drafts=count, **options)
        assert found.token_ids == expected


@settings(max_examples=20, deadline=None)
@given(configs(smallest_window=2), seeds, st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_plain_greedy_is_what_transformers_generates(config, seed, lengths):
    model = random_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    longest, new = max(lengths), 10
    ids = torch.randint(0, config.vocab_size, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    prompts = [row[m].tolist() for row, m in zip(ids, mask, strict=True)]
    found = generate(model, prompts, max_new_tokens=new).token_ids
    for prompt, row in zip(prompts, found, strict=True):
        whole = torch.tensor([prompt + row])
        with torch.no_grad():
            best, second = model(whole)[0, len(prompt) - 1 :].topk(2).values.unbind(-1)
        # both are float32 and within 1e-4 of each other
        assume((best - second).min() > 1e-3 and routing_margin(model, whole) > 1e-5)
    theirs = transformers_model(model).generate(
        ids,
        attention_mask=mask.long(),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert theirs[:, longest:].tolist() == found


@EXAMPLES
@given(
    st.tuples(configs(), mtp_windows), seeds, ragged_prompts, st.floats(0.5, 2), st.integers(1, 25)
)
def test_sampled_text_is_the_same_with_and_without_drafts(drawn, seed, prompts, warmth, chunk):
    """Seed, prompt and place decide a token: neither drafts, nor chunks, nor who is beside it."""
    model = random_model(with_drafter(*drawn), seed=seed).double()
    sampling = Sampling(temperature=warmth, presence_penalty=0.7, top_p=0.9, seed=seed)
    options = {"sampling": sampling, "max_new_tokens": 9, "stop_ids": (0,)}
    expected = generate(model, prompts, **options).token_ids
    for drafts in range(1, 5):
        found = generate(model, prompts, drafts=drafts, chunk=chunk, **options)
        assert found.token_ids == expected, drafts
    assert generate(model, prompts[:1], **options).token_ids == expected[:1]


@EXAMPLES
@given(configs(), st.sampled_from([(0,), (3,)]), seeds, ragged_prompts, st.integers(1, 4))
def test_drafts_are_what_plain_passes_propose(config, windows, seed, prompts, drafts):
    """Every chain of drafts of a run, computed anew from the whole text without a cache."""
    model = random_model(with_drafter(config, windows), seed=seed).double()
    engine = Engine(model, slots=len(prompts), context=40, drafts=drafts)
    requests = [engine.submit(p, max_new_tokens=8, stop_ids=()) for p in prompts]
    made, plain_draft = 0, engine._draft

    def checked(rows, count):
        nonlocal made
        found = plain_draft(rows, count)
        for row, tokens in zip(rows, found, strict=True):
            text = [*row.request.prompt, *row.request.token_ids]
            assert tokens == chain(model, text, count)
            made += count
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_draft", checked)
        engine.run()
    assert made and all(len(r.token_ids) == 8 for r in requests)


def chain(model: KExaone, text: list[int], count: int) -> list[int]:
    """The drafter's most likely tokens after a text whose last token the decoder has not seen."""
    cpu, followers = torch.device("cpu"), torch.tensor(text[1:])
    packing = Packing.of([len(text) - 1], starts=None, device=cpu)
    tokens: list[int] = []
    with torch.no_grad():
        hidden = model.features(torch.tensor(text[:-1]), packing).hidden_NH
        for _ in range(count):
            packing = Packing.of([len(hidden)], starts=None, device=cpu)
            output = model.predict_further(hidden, followers, packing)
            tokens.append(int(model.lm_head(output[-1]).argmax()))
            # the block goes on from its own output; what it read before stays
            hidden = torch.cat((hidden, output[-1:]))
            followers = torch.cat((followers, torch.tensor(tokens[-1:])))
    return tokens


def outcomes(
    model: KExaone, prompt: list[int], sampling: Sampling, count: int, stop: tuple[int, ...]
) -> dict[tuple[int, ...], float]:
    """The exact probability of every continuation, by going through all of them."""
    closed, open_ = {}, {(): 1.0}
    for step in range(count):
        rows = list(open_)
        logits = last_logits(model, [[*prompt, *row] for row in rows])
        longer = {}
        for row, scores in zip(rows, logits.tolist(), strict=True):
            seen = [t in row for t in range(len(scores))]
            for t, chance in enumerate(defined(scores, seen, sampling)[0]):
                if chance:
                    ends = t in stop or step == count - 1
                    (closed if ends else longer)[*row, t] = open_[row] * chance
        open_ = longer
    return closed


SAMPLED = {
    "temperature": Sampling(temperature=0.7, seed=1),
    "top_p": Sampling(temperature=1.0, top_p=0.7, seed=2),
    "top_k": Sampling(temperature=1.5, top_k=2, seed=3),
    "presence_penalty": Sampling(temperature=1.0, presence_penalty=1.0, seed=4),
    "all": Sampling(temperature=1.3, top_k=3, top_p=0.9, presence_penalty=-0.6, seed=5),
}


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize(("drafts", "stop"), [(0, ()), (1, ()), (3, ()), (3, (2,))])
def test_sampled_text_has_the_exact_distribution(name, drafts, stop):
    """Twenty thousand continuations of one prompt in a batch: G-test over all possible ones."""
    model = random_model(small_config(vocab_size=4), seed=11, std=0.25).double()
    prompt, count, batch = [3, 1, 0], 4, 20_000
    found = generate(
        model,
        [prompt] * batch,
        max_new_tokens=count,
        drafts=drafts,
        sampling=SAMPLED[name],
        stop_ids=stop,
    )
    if drafts and not stop:
        # some drafts must stand and some fall, or only one branch would be tested
        assert 0.02 < found.statistics.acceptance < 0.98
    times = Counter(map(tuple, found.token_ids))

    def fit(sampling: Sampling) -> float:
        exact = outcomes(model, prompt, sampling, count, stop)
        assert math.isclose(sum(exact.values()), 1, rel_tol=1e-9)
        if not set(times) <= set(exact):
            return 0.0
        counts = torch.tensor([times[row] for row in exact])
        return fit_probability(counts, torch.tensor(list(exact.values())))

    assert fit(SAMPLED[name]) > FALSE_ALARM
    # and the test would have noticed a setting that is left out or a little off
    for change in ({"temperature": SAMPLED[name].temperature * 1.3}, {"presence_penalty": 0.3}):
        assert fit(dataclasses.replace(SAMPLED[name], **change)) < FALSE_ALARM


def test_a_stop_token_among_accepted_drafts():
    model, options = counting_model(), {"drafts": 4, "max_new_tokens": 30}
    for last in range(12):
        found = generate(model, [[7, 20], [3, 20]], stop_ids=(21 + last, 60), **options)
        assert found.token_ids == [list(range(21, 22 + last))] * 2
        # the first token comes from the prefill, then five from every step
        assert found.statistics.steps == math.ceil(last / 5)
    assert found.statistics.accepted_at == (6, 6, 6, 6) and found.statistics.acceptance == 1


def test_rows_that_end_apart():
    """One row stops at once, the other goes on alone; neither changes the other."""
    config = with_drafter(small_config())
    model = random_model(config).double()
    prompts = [[0, 1, 2], [3, 3], [4], [1, 0, 4, 4, 2, 2]]
    rows = [greedy(model, p, 12) for p in prompts]
    for stop in range(VOCAB):
        found = generate(model, prompts, max_new_tokens=12, drafts=3, stop_ids=(stop,)).token_ids
        assert found == [until(row, (stop,)) for row in rows]


def test_stop_tokens_default_to_those_of_the_config():
    model = counting_model()
    model.config = dataclasses.replace(model.config, eos_token_ids=(9, 6))
    assert generate(model, [[3]], max_new_tokens=9).token_ids == [[4, 5, 6]]
    assert generate(model, [[3]], max_new_tokens=9, stop_ids=(7,)).token_ids == [[4, 5, 6, 7]]
    assert len(generate(model, [[1]], max_new_tokens=9, stop_ids=()).token_ids[0]) == 9


@EXAMPLES
@given(seeds, ragged_prompts, st.integers(0, 4), st.integers(1, 12), st.sets(tokens, max_size=1))
def test_stream_and_statistics_tell_what_happened(seed, prompts, drafts, count, stop):
    model = random_model(with_drafter(small_config()), seed=seed)
    calls: list[list[list[int]]] = []
    found = generate(
        model,
        prompts,
        max_new_tokens=count,
        drafts=drafts,
        sampling=Sampling(temperature=1.0, seed=seed),
        stop_ids=tuple(stop),
        on_tokens=calls.append,
    )
    stats = found.statistics
    streamed = [[t for call in calls for t in call[b]] for b in range(len(prompts))]
    assert streamed == found.token_ids
    assert len(calls) == stats.steps + 1 and all(any(call) for call in calls)
    assert all(len(row) <= drafts + 1 for call in calls for row in call)
    assert stats.sequences == len(prompts)
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert stats.new_tokens == sum(map(len, found.token_ids))
    assert len(stats.accepted_at) == drafts
    assert list(stats.accepted_at) == sorted(stats.accepted_at, reverse=True)
    row_steps = sum(bool(row) for call in calls[1:] for row in call)
    assert 0 <= stats.accepted <= stats.drafted <= drafts * row_steps
    assert stats.accepted_at == () or stats.accepted_at[0] <= row_steps
    made = stats.sequences + row_steps + stats.accepted
    assert stats.new_tokens == made if not stop else stats.new_tokens <= made
    assert stats.acceptance == (stats.accepted / stats.drafted if stats.drafted else 0)
    assert stats.prefill_seconds > 0 and (stats.decode_seconds > 0) == (stats.steps > 0)


def test_speed_leaves_out_the_tokens_of_the_prefill():
    fields = {"prompt_tokens": 9, "steps": 4, "drafted": 0, "accepted_at": ()}
    stats = Statistics(sequences=2, new_tokens=10, prefill_seconds=5, decode_seconds=4, **fields)
    assert stats.tokens_per_second == 2
    stats = Statistics(sequences=2, new_tokens=2, prefill_seconds=5, decode_seconds=0, **fields)
    assert stats.tokens_per_second == 0 and stats.acceptance == 0


def test_a_run_may_fill_the_context_to_its_end():
    model = random_model(with_drafter(small_config(max_position_embeddings=24))).double()
    expected = greedy(model, [1] * 10, 14)
    for drafts in range(5):
        assert (
            generate(model, [[1] * 10], max_new_tokens=14, drafts=drafts).token_ids[0] == expected
        )
        with pytest.raises(ValueError, match="need a context of 25, the model has 24"):
            generate(model, [[1] * 10], max_new_tokens=15, drafts=drafts)


def test_a_seed_repeats_a_run():
    model = random_model(small_config())

    def run(seed: int | None) -> Generation:
        sampling = Sampling(temperature=2.0, seed=seed)
        return generate(model, [[1, 2], [3]], max_new_tokens=30, drafts=2, sampling=sampling)

    assert run(5).token_ids == run(5).token_ids != run(6).token_ids
    assert run(None).token_ids != run(None).token_ids


def test_tensors_lists_and_the_method_give_the_same():
    model = random_model(small_config())
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = generate(model, rows, max_new_tokens=5).token_ids
    assert generate(model, torch.tensor(rows), max_new_tokens=5).token_ids == expected
    assert model.generate(torch.tensor(rows, dtype=torch.int32), max_new_tokens=5).token_ids == (
        expected
    )
    assert rows == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "at least one token"),
        (torch.zeros(2, 3), {}, r"integers \[B, T\]"),
        (torch.zeros(3, dtype=torch.int64), {}, r"integers \[B, T\]"),
        ([[1, 61]], {}, "token 61 is outside the vocabulary of 61"),
        ([[-1]], {}, "token -1 is outside the vocabulary of 61"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ([[1]], {"drafts": -1}, r"drafts must lie in 0\.\.4, got -1"),
        ([[1]], {"drafts": 5}, "got 5"),
        ([[1]], {"chunk": 0}, "chunk >= 1"),
        ([[1] * 60], {"max_new_tokens": 5}, "need a context of 65, the model has 64"),
    ],
)
def test_bad_requests_are_one_clear_line(prompts, options, words):
    model = counting_model()
    with pytest.raises(ValueError, match=words) as caught:
        generate(model, prompts, **{"max_new_tokens": 3} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"drafts": 2}, {"sampling": Sampling(temperature=1)}])
def test_logits_that_overflow_are_no_text(options):
    model = counting_model()
    torch.nn.init.constant_(model.lm_head.weight, torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match="logits overflow float32"):
        generate(model, [[1, 2]], max_new_tokens=3, **options)


def test_drafts_need_a_drafter():
    model = random_model(small_config(mtp_windows=(), mtp_steps=0))
    with pytest.raises(ValueError, match="need an MTP block"):
        generate(model, [[1]], max_new_tokens=3, drafts=1)
    assert len(generate(model, [[1]], max_new_tokens=3).token_ids[0]) == 3
