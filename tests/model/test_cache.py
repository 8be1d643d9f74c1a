"""Caches: what they hold, what they cost, and that a rollback leaves no trace.

Models run in float64, where different orders of summation differ by about 1e-14: far below the
tolerance, and too little to flip a routing decision in practice.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import configs, random_model, small_config

from kexaone import Config
from kexaone.model import engine, generation
from kexaone.model.attention import cached_attention
from kexaone.model.cache import Cache, LayerCache, cache_bytes
from kexaone.model.config import PRESETS
from kexaone.model.packing import Packing

TOLERANCE = 1e-9
CPU = torch.device("cpu")
EXAMPLES = settings(max_examples=40, deadline=None)
KIB, MIB, GIB = 2**10, 2**20, 2**30
CONTEXT = 262_144
seeds = st.integers(0, 2**31)


def allocated(cache: Cache) -> int:
    """Bytes of the storage that the tensors of a cache really occupy."""
    layers = (*cache.layers, *cache.mtp_layers)
    return sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))


def logits_of(model, cache: Cache, parts: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.cat(parts), lengths=[len(p) for p in parts], cache=cache)


@EXAMPLES
@given(st.data(), st.booleans(), st.integers(1, 6), st.integers(1, 5), st.integers(0, 4))
def test_a_layer_shows_the_newest_key_of_every_position(data, ring, window, chunk, drafts):
    """Against lists that simply forget what is taken back; every entry has a value of its own."""
    chunk = max(chunk, drafts + 1)
    capacity = window + chunk + drafts if ring else 0
    layer = LayerCache((2, 1, capacity, 2), ring=ring, like=torch.zeros(0))
    history: list[list[float]] = [[], []]
    longest = [0, 0]
    for call in range(data.draw(st.integers(1, 12))):
        counts = [data.draw(st.integers(0, chunk)) for _ in history]
        counts[0] += not any(counts)
        starts = [len(h) for h in history]
        packing = Packing(tuple(counts), tuple(starts), CPU)
        stamps = torch.arange(packing.total, dtype=torch.float32) + 100 * call + 1
        keys = stamps[:, None, None].expand(-1, 1, 2)
        view = layer.append(keys, -keys, packing)
        for row, new in zip(history, stamps.split(counts), strict=True):
            row += new.tolist()
        for b, (row, start, count) in enumerate(zip(history, starts, counts, strict=True)):
            if not count:
                continue
            shown = {
                p: (k, v)
                for p, k, v in zip(
                    view.positions[b].tolist(),
                    view.keys[b, 0, :, 1].tolist(),
                    view.values[b, 0, :, 0].tolist(),
                    strict=True,
                )
                if p >= 0
            }
            needed = range(max(0, start - window + 1) if ring else 0, len(row))
            assert set(needed) <= set(shown) <= set(range(len(row)))
            assert all(shown[p] == (row[p], -row[p]) for p in needed)
        longest = [max(most, len(row)) for most, row in zip(longest, history, strict=True)]
        for b, row in enumerate(history):
            del row[data.draw(st.integers(max(0, longest[b] - drafts), len(row))) :]
    assert layer.capacity == capacity if ring else layer.capacity >= max(longest)


@EXAMPLES
@given(st.data(), configs(), seeds, st.integers(1, 9), st.integers(1, 4))
def test_rolled_back_tokens_leave_no_trace(data, config, seed, chunk, drafts):
    """A cache that is fed wrong tokens and rolled back stays equal to one that never saw them."""
    model = random_model(config, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)

    def draw(counts: list[int]) -> list[torch.Tensor]:
        return [torch.randint(0, config.vocab_size, (n,), generator=generator) for n in counts]

    like = model.lm_head.weight
    used, clean = (Cache(config, 2, like=like, chunk=chunk, drafts=drafts) for _ in range(2))
    for _ in range(data.draw(st.integers(1, 8))):
        kept = draw([data.draw(st.integers(1, used.chunk - drafts)) for _ in range(2)])
        wrong = draw([data.draw(st.integers(0, drafts)) for _ in range(2)])
        both = [torch.cat(pair) for pair in zip(kept, wrong, strict=True)]
        ours = logits_of(model, used, both)
        used.truncate([n - len(w) for n, w in zip(used.lengths, wrong, strict=True)])
        expected = logits_of(model, clean, kept)
        pieces = ours.split([len(b) for b in both])
        ours = torch.cat([p[: len(k)] for p, k in zip(pieces, kept, strict=True)])
        assert (ours - expected).abs().max() <= TOLERANCE
        assert used.lengths == clean.lengths


@EXAMPLES
@given(st.data(), configs(), st.integers(1, 9), st.integers(0, 4))
def test_windowed_layers_never_grow_and_global_ones_do(data, config, chunk, drafts):
    model = random_model(config)
    cache = Cache(config, 1, like=model.lm_head.weight, chunk=chunk, drafts=drafts)
    for _ in range(8):
        count = data.draw(st.integers(1, cache.chunk))
        logits_of(model, cache, [torch.zeros(count, dtype=torch.int64)])
        for layer, window in zip(cache.layers, config.windows, strict=True):
            if window:
                assert layer.keys.shape[2] == window + max(chunk, drafts + 1) + drafts
            else:
                assert cache.lengths[0] <= layer.keys.shape[2] <= 1.5 * cache.lengths[0]
            assert layer.values.shape == layer.keys.shape
    assert cache.nbytes == allocated(cache)


def test_the_draft_block_has_its_own_cache_only_where_drafts_are_made():
    config = small_config(mtp_windows=(0,))
    like = torch.zeros(0)
    assert not Cache(config, 1, like=like, drafts=0).mtp_layers
    assert len(Cache(config, 1, like=like, drafts=1).mtp_layers) == 1


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("chunk", "drafts", "batch"), [(512, 0, 1), (2048, 3, 2), (1, 4, 1)])
def test_bytes_are_those_of_the_arithmetic(name, chunk, drafts, batch):
    config = Config.preset(name)
    like = torch.empty(0, device="meta", dtype=torch.bfloat16)
    cache = Cache(config, batch, like=like, chunk=chunk, drafts=drafts)
    cache.reserve(CONTEXT)
    assert all(layer.keys.is_meta for layer in cache.layers)
    sizes = cache_bytes(config, CONTEXT, chunk=chunk, drafts=drafts, itemsize=2)
    assert cache.nbytes == allocated(cache) == batch * sizes["total"]
    windows = [layer for layer in cache.layers if layer.ring]
    assert batch * sizes["windowed"] == sum(layer.nbytes for layer in windows)
    assert batch * sizes["mtp"] == sum(layer.nbytes for layer in cache.mtp_layers)
    assert sizes["total"] == sizes["windowed"] + sizes["global"] + sizes["mtp"]


def test_a_quarter_million_tokens_of_mini():
    # 2 tensors x 2 heads x 32 x 2 bytes = 256 bytes per token and layer; 2 layers are global, 6
    # keep 64 + 512 + 3 entries, the MTP layer is global
    sizes = cache_bytes(Config.preset("mini"), CONTEXT, chunk=512, drafts=3, itemsize=2)
    assert sizes["global"] == 2 * 256 * CONTEXT == 128 * MIB
    assert sizes["windowed"] == 6 * 256 * (64 + 512 + 3)
    assert sizes["mtp"] == 64 * MIB


def test_a_quarter_million_tokens_of_the_released_model():
    config = Config.preset("k-exaone-236b")
    for tokens, gib in ((8192, 0.375), (32_768, 1.5), (131_072, 6), (CONTEXT, 12)):
        sizes = cache_bytes(config, tokens, chunk=512, drafts=1, itemsize=2)
        assert sizes["global"] == gib * GIB
        # the windows alone are 18 MiB; one chunk and one draft come on top
        assert sizes["windowed"] == 18 * MIB + 36 * 4 * KIB * (512 + 1)
        assert sizes["mtp"] == 4 * KIB * tokens
    assert cache_bytes(config, CONTEXT, chunk=512, drafts=0, itemsize=1)["global"] == 6 * GIB


@pytest.mark.parametrize("drafts", [0, 2])
def test_generation_allocates_exactly_the_arithmetic(monkeypatch, drafts):
    made = []

    class Recorded(Cache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(engine, "Cache", Recorded)
    config = small_config()
    prompts = [[1] * 30, [2] * 17]
    generation.generate(
        random_model(config), prompts, max_new_tokens=20, drafts=drafts, chunk=8, stop_ids=()
    )
    (cache,) = made
    sizes = cache_bytes(config, 30 + 20 + drafts, chunk=8, drafts=drafts, itemsize=4)
    assert cache.nbytes == allocated(cache) == len(prompts) * sizes["total"]


def test_decode_after_a_long_prefill():
    """3000 tokens of mini in chunks, then single tokens, against whole passes without a cache."""
    config = Config.preset("mini")
    model = random_model(config, std=0.05).double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (3004,), generator=generator)
    cache = Cache(config, 1, like=model.lm_head.weight, chunk=500, drafts=2)
    with torch.no_grad():
        expected = model(ids[None])[0, 2990:]
        ours = [model(part[None], cache=cache)[0] for part in ids[:3000].split(500)]
        ours += [model(part[None], cache=cache)[0] for part in ids[3000:].split(1)]
    assert (torch.cat(ours)[2990:] - expected).abs().max() <= TOLERANCE
    assert {layer.capacity for layer in cache.layers if layer.ring} == {64 + 500 + 2}


def test_the_last_position_of_a_full_context():
    """Attention of one query over 262,144 cached keys against the formula, then the model's end."""
    config = dataclasses.replace(Config.preset("mini"), windows=(64, 0))
    model = random_model(config).double()
    cache = Cache(config, 1, like=model.lm_head.weight, chunk=7, drafts=1)
    cache.reserve(CONTEXT)
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
    cache.lengths[:] = [CONTEXT - 1]
    packing = cache.packing([1])
    assert packing.positions.tolist() == [CONTEXT - 1]
    options = {"dtype": torch.float64, "generator": generator}
    q, k, v = (torch.randn(1, heads, 32, **options) for heads in (8, 2, 2))
    for layer, window in zip(cache.layers, config.windows, strict=True):
        out = cached_attention(q, layer.append(k, v, packing), packing, window=window)
        slots = torch.arange(CONTEXT - (window or CONTEXT), CONTEXT) % layer.capacity
        assert torch.equal(layer.keys[0, :, slots[-1]], k[0])
        for head in range(8):
            keys, values = (x[0, head // 4, slots] for x in (layer.keys, layer.values))
            expected = (keys @ q[0, head] / 32**0.5).softmax(0) @ values
            # n terms whose weights add up to one: at most about n unit roundoffs of 2^-53, while
            # one key too few or too many is worth 1 / n
            assert (out[0, head] - expected).abs().max() <= CONTEXT * 2**-53

    size = cache.nbytes
    with torch.no_grad():
        assert model(torch.tensor([[1]]), cache=cache).isfinite().all()
        assert cache.lengths == [CONTEXT] and cache.nbytes == allocated(cache) == size
        with pytest.raises(ValueError, match=r"context of 262145 tokens exceeds"):
            model(torch.tensor([[1]]), cache=cache)
    assert cache.lengths == [CONTEXT]


def test_reserving_keeps_what_is_there_and_never_shrinks():
    layer = LayerCache((1, 1, 0, 2), ring=False, like=torch.zeros(0))
    keys = torch.arange(6.0).view(3, 1, 2)
    packing = Packing((3,), (0,), CPU)
    layer.append(keys, -keys, packing)
    for tokens in (10, 4):
        layer.reserve(tokens)
        assert layer.capacity == 10
        assert torch.equal(layer.keys[0, 0, :3], keys[:, 0])
        assert torch.equal(layer.values[0, 0, :3], -keys[:, 0])
    ring = LayerCache((1, 1, 4, 2), ring=True, like=torch.zeros(0))
    ring.reserve(100)
    assert ring.capacity == 4


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"chunk": 0}, {"drafts": -1}, {"batch": -1, "chunk": -1}]
)
def test_impossible_caches_are_refused(options):
    arguments = {"batch": 1, "chunk": 4, "drafts": 0} | options
    with pytest.raises(ValueError, match=r"need batch >= 1, chunk >= 1, drafts >= 0"):
        Cache(small_config(), arguments.pop("batch"), like=torch.zeros(0), **arguments)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([6, 1], "at most 5 tokens per sequence and call"),
        ([1], "holds 2 sequences, got 1"),
        ([1, 1, 1], "holds 2 sequences, got 3"),
        ([-1, 1], ">= 0"),
    ],
)
def test_calls_that_do_not_fit_change_nothing(lengths, words):
    cache = Cache(small_config(), 2, like=torch.zeros(0), chunk=5)
    with pytest.raises(ValueError, match=words):
        cache.packing(lengths)
    assert cache.lengths == [0, 0] and cache.nbytes == allocated(cache)


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([6, 10], "go back to 7 at least, got 6"),
        ([11, 10], "go back to 7 at least, got 11"),
        ([10, 0], "go back to 7 at least, got 0"),
        ([10], "holds 2 sequences, got 1"),
    ],
)
def test_rollbacks_that_reach_too_far_change_nothing(mtp, lengths, words):
    cache = Cache(small_config(), 2, like=torch.zeros(0), chunk=5, drafts=3)
    held = cache.mtp_lengths if mtp else cache.lengths
    held[:] = [10, 10]
    with pytest.raises(ValueError, match=words):
        cache.truncate(lengths, mtp=mtp)
    assert held == [10, 10]
    cache.truncate([7, 9], mtp=mtp)
    assert held == [7, 9]
    assert (cache.lengths, cache.mtp_lengths) == (([0, 0], [7, 9]) if mtp else ([7, 9], [0, 0]))


def test_rollbacks_do_not_add_up():
    """Two short ones reach as far back as a long one, which the ring could not undo."""
    cache = Cache(small_config(), 1, like=torch.zeros(0), chunk=5, drafts=3)
    cache.lengths[:] = [10]
    cache.truncate([8])
    with pytest.raises(ValueError, match="back to 7 at least"):
        cache.truncate([6])
    cache.lengths[:] = [9]
    with pytest.raises(ValueError, match="back to 7 at least"):
        cache.truncate([6])
    cache.truncate([7])
    cache.lengths[:] = [12]
    cache.truncate([9])
    assert cache.lengths == [9]


def test_a_short_sequence_does_not_go_below_zero():
    cache = Cache(small_config(), 1, like=torch.zeros(0), chunk=5, drafts=3)
    cache.lengths[:] = [1]
    with pytest.raises(ValueError, match="back to 0 at least, got -1"):
        cache.truncate([-1])
