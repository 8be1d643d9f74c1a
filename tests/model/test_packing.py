"""Ragged batches: the index arithmetic against plain loops, and one model fed in many ways.

Models run in float64, where different orders of summation differ by about 1e-14: far below the
tolerance, and too little to flip a routing decision in practice.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import configs, random_model, small_config

from kexaone.model import attention
from kexaone.model.cache import Cache
from kexaone.model.packing import Packing

TOLERANCE = 1e-9
CPU = torch.device("cpu")
EXAMPLES = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
pieces = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=6)


def tokens(config, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (length,), generator=generator)


@given(pieces)
def test_indices_are_those_of_a_plain_loop(drawn):
    lengths, starts = zip(*drawn, strict=True)
    packing = Packing(lengths, starts, CPU)
    rows, columns, positions = [], [], []
    for b, (length, start) in enumerate(drawn):
        for i in range(length):
            rows.append(b)
            columns.append(i)
            positions.append(start + i)
    assert packing.rows.tolist() == rows
    assert packing.columns.tolist() == columns
    assert packing.positions.tolist() == positions
    assert packing.total == len(rows) and packing.longest == max(lengths)
    assert packing.ends == tuple(s + n for n, s in drawn)
    if min(lengths):
        assert packing.last.tolist() == [
            max(i for i, r in enumerate(rows) if r == b) for b in range(len(drawn))
        ]


@given(pieces, st.booleans())
def test_padding_is_a_plain_copy_and_unpad_its_inverse(drawn, uniform):
    lengths = [drawn[0][0]] * len(drawn) if uniform else [n for n, _ in drawn]
    packing = Packing.of(lengths, starts=None, device=CPU)
    x = torch.arange(1.0, 1 + 2 * packing.total).view(-1, 2)
    expected = torch.zeros(len(lengths), max(lengths), 2)
    at = 0
    for b, length in enumerate(lengths):
        expected[b, :length] = x[at : at + length]
        at += length
    padded = packing.pad(x)
    assert torch.equal(padded, expected)
    assert torch.equal(packing.unpad(padded), x)


def test_padding_carries_gradients():
    packing = Packing.of([2, 3], starts=None, device=CPU)
    x = torch.randn(5, 2, requires_grad=True)
    weight = torch.randn(2, 3, 2)
    (packing.pad(x) * weight).sum().backward()
    assert torch.equal(x.grad, torch.cat((weight[0, :2], weight[1])))


@EXAMPLES
@given(configs(), seeds, st.lists(st.integers(1, 25), min_size=1, max_size=5), st.booleans())
def test_packed_padded_and_one_by_one_agree(config, seed, lengths, left):
    model = random_model(config, seed=seed).double()
    prompts = [tokens(config, n, seed + b) for b, n in enumerate(lengths)]
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        at = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[b, at], mask[b, at] = prompt, 1
    with torch.no_grad():
        single = torch.cat([model(p[None])[0] for p in prompts])
        packed = model(torch.cat(prompts), lengths=lengths)
        padded = model(ids, attention_mask=mask)
    assert (packed - single).abs().max() <= TOLERANCE
    assert (padded[mask.bool()] - single).abs().max() <= TOLERANCE
    assert not padded[~mask.bool()].any()


@EXAMPLES
@given(st.data(), configs(), seeds)
def test_chunked_prefill_of_ragged_batches_equals_whole_sequences(data, config, seed):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    chunk = data.draw(st.integers(1, 32))
    model = random_model(config, seed=seed).double()
    prompts = [tokens(config, n, seed + b) for b, n in enumerate(lengths)]
    cache = Cache(config, len(prompts), like=model.lm_head.weight, chunk=chunk)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    with torch.no_grad():
        while cache.lengths != lengths:
            left = [n - held for n, held in zip(lengths, cache.lengths, strict=True)]
            # any split is right: a row may even sit a call out
            counts = [data.draw(st.integers(0, min(chunk, n))) for n in left]
            if not any(counts):
                counts[left.index(max(left))] = 1
            held = list(cache.lengths)
            part = torch.cat([p[h : h + n] for p, h, n in zip(prompts, held, counts, strict=True)])
            logits = model(part, lengths=counts, cache=cache)
            for row, piece in zip(found, logits.split(counts), strict=True):
                row.append(piece)
        for prompt, row in zip(prompts, found, strict=True):
            assert (torch.cat(row) - model(prompt[None])[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("elements", [1, 50, 300])
def test_queries_taken_in_groups(monkeypatch, elements):
    config = small_config()
    model = random_model(config).double()
    prompts = [tokens(config, n, n) for n in (20, 13)]
    cache = Cache(config, 2, like=model.lm_head.weight, chunk=20)
    with torch.no_grad():
        expected = torch.cat([model(p[None])[0] for p in prompts])
        monkeypatch.setattr(attention, "MASK_ELEMENTS", elements)
        grouped = model(torch.cat(prompts), lengths=[20, 13], cache=cache)
    assert (grouped - expected).abs().max() <= TOLERANCE


def test_sequences_do_not_see_each_other():
    config = small_config()
    model = random_model(config).double()
    first, second = tokens(config, 9, 0), tokens(config, 7, 1)
    other = (first + 1) % config.vocab_size
    with torch.no_grad():
        a = model(torch.cat((first, second)), lengths=[9, 7])
        b = model(torch.cat((other, second)), lengths=[9, 7])
    assert (a[9:] - b[9:]).abs().max() <= TOLERANCE
    assert (a[:9] - b[:9]).abs().min(-1).values.max() > TOLERANCE


@pytest.mark.parametrize(
    ("lengths", "starts", "words"),
    [([1, 2], [0], "2 lengths but 1 starts"), ([1, -1], [0, 0], ">= 0"), ([1], [-1], ">= 0")],
)
def test_impossible_packings_are_refused(lengths, starts, words):
    with pytest.raises(ValueError, match=words):
        Packing.of(lengths, starts=starts, device=CPU)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((4,), {"lengths": [1, 2]}, "add up to 3"),
        ((2, 2), {"lengths": [2, 2]}, "packed"),
        ((4,), {"attention_mask": torch.ones(4)}, "not an attention_mask"),
        ((2, 2), {"attention_mask": torch.ones(2, 3)}, "shape"),
        ((2, 2), {"attention_mask": torch.zeros(2, 2)}, "hides every token"),
        ((0,), {}, "non-empty"),
        ((1, 2, 3), {}, "non-empty"),
        ((1, 4097), {}, "4097 tokens exceeds"),
    ],
)
def test_inputs_that_do_not_fit(shape, options, words):
    model = random_model(small_config())
    with pytest.raises(ValueError, match=words) as caught:
        model(torch.zeros(shape, dtype=torch.int64), **options)
    assert "\n" not in str(caught.value)
