"""Attention over caches in slots, rings and pages against float64 and against `attention`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import attention_decode as op
from kexaone.kernels.arch import ARCHS
from kexaone.kernels.attention import attention
from kexaone.kernels.attention_splits import Config, Problem, configs, feasible
from kexaone.kernels.tables import use

from .contract import check, check_compiled, laid_out, normal, same_bits, seeds

# small tiles and many splits, and one split with several tiles of rows
SPLIT, TILED = Config(16, 16, 16, 100, 4, 1), Config(16, 16, 1 << 20, 1, 4, 1)
CASES = [(4, 2, torch.bfloat16), (6, 2, torch.float32), (8, 1, torch.float16)]
cases, tiles = st.sampled_from(CASES), st.sampled_from([SPLIT, TILED])
# new rows of each sequence, none and more than one tile included, and tokens before them
counts = st.lists(st.sampled_from([0, 1, 1, 2, 4, 8, 11]), min_size=1, max_size=3)
before = st.lists(st.sampled_from([1, 5, 16, 40, 130]), min_size=3, max_size=3)
windows = st.sampled_from([0, 2, 9, 64])


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def starts(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def slots(batch, heads, capacity, dtype, dim=32, seed=0):
    return [normal(batch, heads, capacity, dim, seed=seed + i, dtype=dtype) for i in (1, 2)]


def compare(config, data, **options):
    longest = int(options["cu_seqlens"].diff().max())
    with use("attention_decode", config):
        check(
            lambda *x: op.attention_decode(*x[:3], **named(x), longest=longest, **options),
            lambda *x: op.attention_decode_reference(*x, **options),
            data, by=1, gradients=False,
        )  # fmt: skip


def named(data):
    return dict(zip(("sinks", "k_scale", "v_scale"), data[3:], strict=False))


@given(case=cases, config=tiles, counts=counts, before=before, window=windows,
       spare=st.sampled_from([0, 1, 50]), sinks=st.booleans(), seed=seeds)  # fmt: skip
def test_slots_meet_the_contract(case, config, counts, before, window, spare, sinks, seed):
    heads, kv_heads, dtype = case
    lengths = [n + m for n, m in zip(counts, before, strict=False)]
    q = normal(sum(counts), heads, 32, seed=seed, dtype=dtype)
    data = [q, *slots(len(counts), kv_heads, max(lengths) + spare, dtype, seed=seed)]
    data += [normal(heads, seed=seed + 5, dtype=dtype)] if sinks else []
    compare(config, data, lengths=int32(*lengths), cu_seqlens=starts(counts), window=window)


@given(config=tiles, counts=counts, before=before, window=st.sampled_from([2, 9, 64]),
       spare=st.integers(0, 3), seed=seeds)  # fmt: skip
def test_rings_meet_the_contract(config, counts, before, window, spare, seed):
    """A ring of no more slots than the window of all new rows needs."""
    heads, kv_heads, dtype = CASES[0]
    lengths = [n + m for n, m in zip(counts, before, strict=False)]
    q = normal(sum(counts), heads, 32, seed=seed, dtype=dtype)
    capacity = window + max(max(counts), 1) - 1 + spare
    data = [q, *slots(len(counts), kv_heads, capacity, dtype, seed=seed)]
    compare(config, data, lengths=int32(*lengths), cu_seqlens=starts(counts), window=window)


@given(config=tiles, counts=counts, before=before, window=windows,
       page=st.sampled_from([4, 16]), seed=seeds)  # fmt: skip
def test_pages_equal_slots(config, counts, before, window, page, seed):
    """The same keys in pages of any order give the same bits."""
    heads, kv_heads, dtype = CASES[0]
    lengths = [n + m for n, m in zip(counts, before, strict=False)]
    most, batch = -(-max(lengths) // page), len(counts)
    q = normal(sum(counts), heads, 32, seed=seed, dtype=dtype)
    keys, values = slots(batch, kv_heads, most * page, dtype, seed=seed)
    table = torch.randperm(batch * most, generator=torch.Generator().manual_seed(seed))
    table = table.view(batch, most).int()
    paged = [torch.empty(batch * most, page, kv_heads, 32, dtype=dtype) for _ in range(2)]
    for pages, cache in zip(paged, (keys, values), strict=True):
        pages[table.long()] = cache.unflatten(2, (most, page)).movedim(1, 3)
    options = {"lengths": int32(*lengths), "cu_seqlens": starts(counts), "window": window}
    with use("attention_decode", config):
        want = op.attention_decode(q, keys, values, **options)
        assert same_bits(op.attention_decode(q, *paged, pages=table, **options), want)
    compare(config, [q, *paged], pages=table, **options)


@given(config=tiles, counts=counts, before=before, scaled=st.sampled_from(["", "one", "heads"]),
       dtype=st.sampled_from([torch.bfloat16, torch.float32]), seed=seeds)  # fmt: skip
def test_float8_caches_meet_the_contract(config, counts, before, scaled, dtype, seed):
    lengths = [n + m for n, m in zip(counts, before, strict=False)]
    q = normal(sum(counts), 4, 32, seed=seed, dtype=dtype)
    data = [q, *(x.to(op.FP8) for x in slots(len(counts), 2, max(lengths), dtype, seed=seed))]
    options = {"lengths": int32(*lengths), "cu_seqlens": starts(counts)}
    if scaled:
        shape = () if scaled == "one" else (2,)
        scales = [normal(*shape, seed=seed + i).abs() + 0.1 for i in range(2)]
        with use("attention_decode", config):
            check(
                lambda *x: op.attention_decode(*x[:3], k_scale=x[3], v_scale=x[4], **options),
                lambda *x: op.attention_decode_reference(*x[:3], None, *x[3:], **options),
                [*data, *scales], by=1, gradients=False,
            )  # fmt: skip
    else:
        compare(config, data, **options)


@pytest.mark.parametrize("counts, held", [([1, 3], 1500), ([40, 1], 200)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_every_head_dimension_with_the_default_tiles(dim, counts, held):
    """Keys for several splits, and rows for several tiles."""
    data = [normal(sum(counts), 16, dim, dtype=torch.bfloat16)]
    data += slots(2, 2, held, torch.bfloat16, dim=dim)
    compare(None, data, lengths=int32(held, held // 3), cu_seqlens=starts(counts))


@given(length=st.integers(1, 90), window=windows, seed=seeds)
def test_decoding_meets_the_contract_of_attention(length, window, seed):
    """The last rows of a sequence, against the reference of the op for whole sequences."""
    rows = min(length, 4)
    assume(length > 1)
    q = normal(rows, 4, 32, seed=seed, dtype=torch.bfloat16)
    cache = slots(1, 2, length, torch.bfloat16, seed=seed)
    options = {"cu_seqlens": int32(0, rows), "window": window}

    def whole(q, k, v):
        with kexaone.impl("reference"):
            k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
            return attention(q, k, v, cu_seqlens_k=int32(0, length), **options)

    with use("attention_decode", SPLIT):
        check(lambda *x: op.attention_decode(*x, lengths=int32(length), **options), whole,
              [q, *cache], by=1, gradients=False)  # fmt: skip


@pytest.mark.parametrize("layout", ["row strided", "column strided", "expanded"])
def test_layouts(layout):
    cache = [laid_out(x, layout) for x in slots(2, 2, 40, torch.bfloat16)]
    q = laid_out(normal(3, 4, 32, dtype=torch.bfloat16), layout)
    compare(SPLIT, [q, *cache], lengths=int32(30, 40), cu_seqlens=int32(0, 1, 3))


@pytest.mark.parametrize("config", [SPLIT, TILED])
def test_what_no_row_sees_is_never_loaded(config):
    """NaN in slots before the window, and in slots that nothing wrote yet."""
    q, cache = normal(2, 4, 32), slots(1, 2, 100, torch.float32)
    options = {"lengths": int32(80), "cu_seqlens": int32(0, 2), "window": 10}
    with use("attention_decode", config):
        want = op.attention_decode(q, *cache, **options)
        for x in cache:
            x[:, :, :69] = float("nan")
            x[:, :, 80:] = float("nan")
        assert same_bits(op.attention_decode(q, *cache, **options), want)


def test_offsets_beyond_32_bits():
    """Slots 2^31 + 16 elements apart: the memory between them is never touched."""
    stride, near = 2**31 + 16, slots(1, 2, 2, torch.bfloat16)
    far = [torch.empty(stride + 64, dtype=torch.bfloat16).as_strided((1, 2, 2, 32),
           (64, 32, stride, 1)).copy_(x) for x in near]  # fmt: skip
    q = normal(1, 4, 32, dtype=torch.bfloat16)
    options = {"lengths": int32(2), "cu_seqlens": int32(0, 1)}
    assert same_bits(op.attention_decode(q, *far, **options),
                     op.attention_decode(q, *near, **options))  # fmt: skip


def test_twice_the_same_bits():
    q, cache = normal(4, 16, 128), slots(1, 2, 3000, torch.float32, dim=128)
    options = {"lengths": int32(3000), "cu_seqlens": int32(0, 4)}
    assert same_bits(*(op.attention_decode(q, *cache, **options) for _ in range(2)))


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize("longest", [1, 3, 8, 512])
def test_tiles_hold_their_rows_and_splits_their_keys(arch, longest):
    for batch, kv_heads, group, keys in ((1, 8, 8, 200), (64, 8, 8, 32768), (1, 2, 5, 262144)):
        problem = Problem(batch, kv_heads, group, 128, 2, longest, keys)
        config = configs(problem, arch)[0]
        assert feasible(config, problem, arch)
        assert config.tokens(problem) * group <= config.tile_rows(problem)
        assert config.splits(problem) == 1 or keys // config.splits(problem) >= config.least


def test_opcheck():
    q, (keys, values) = normal(3, 4, 32), slots(2, 2, 20, torch.float32)
    arguments = (int32(9, 20), int32(0, 1, 3), None, normal(4), None, None, 2, 5, 0.2)
    operation = torch.ops.kexaone.attention_decode
    torch.library.opcheck(operation, (q, keys, values, *arguments))


def test_compiled_with_dynamic_shapes():
    def step(q, weight, keys, values, lengths, at):
        out = op.attention_decode(q, keys, values, lengths=lengths, cu_seqlens=at, longest=1).out
        return out * weight.cos()

    def data(size):
        q, weight = normal(size, 4, 32, seed=size), normal(1)
        cache = [x.requires_grad_(False) for x in slots(size, 2, 50 + size, torch.float32)]
        full = torch.full((size,), 50, dtype=torch.int32)
        return [q, weight, *cache, full, starts([1] * size)]

    def inference(q, weight, keys, values, lengths, at):
        return step(q.detach(), weight, keys.detach(), values.detach(), lengths, at)

    check_compiled(inference, data, sizes=(7, 9, 21))


def test_reference_is_used_when_asked_and_for_float64():
    q, cache = normal(3, 4, 32), slots(2, 2, 20, torch.float32)
    options = {"lengths": int32(9, 20), "cu_seqlens": int32(0, 1, 3), "window": 4}
    with kexaone.impl("reference"):
        assert same_bits(op.attention_decode(q, *cache, **options),
                         op.attention_decode_reference(q, *cache, **options))  # fmt: skip
    wide = op.attention_decode(q.double(), *(x.double() for x in cache), **options)
    assert wide.out.dtype == wide.lse.dtype == torch.float64


@pytest.mark.parametrize("arguments, message", [
    ({"q": torch.ones(3, 5, 32)}, "5 query heads must be a multiple of 2"),
    ({"keys": torch.ones(2, 2, 9, 32)}, "must have one shape"),
    ({"lengths": torch.tensor([1, 2])}, "lengths must be int32, one for each"),
    ({"lengths": int32(1), "cu_seqlens": int32(0, 3)}, "one for each sequence of the cache"),
    ({"q": torch.ones(3, 4, 32).half()}, "keys and values must be torch.float16 or"),
    ({"cu_seqlens": torch.tensor([0, 1, 3])}, "cu_seqlens must be int32"),
    ({"window": -1}, "window must be 0"),
    ({x: torch.ones(2, 20, 32) for x in ("keys", "values")}, "4-dimensional"),
])  # fmt: skip
def test_wrong_inputs_are_refused(arguments, message):
    cache = torch.ones(2, 2, 20, 32)
    good = {"q": torch.ones(3, 4, 32), "keys": cache, "values": cache, "lengths": int32(9, 20),
            "cu_seqlens": int32(0, 1, 3)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op.attention_decode(**{**good, **arguments})
