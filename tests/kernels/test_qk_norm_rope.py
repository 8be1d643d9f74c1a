"""QK-norm + RoPE against its float64 reference; fused, packed and cached against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import qk_norm_rope as op
from kexaone.kernels.qk_norm_rope import rotate_reference
from kexaone.kernels.qk_norm_rope_cache import qk_norm_rope_cache
from kexaone.kernels.qk_norm_rope_packed import qk_norm_rope_packed
from kexaone.kernels.tables import use
from kexaone.model.cache import LayerCache
from kexaone.model.layers import RMSNorm, apply_rope, rope_tables
from kexaone.model.packing import Packing

from .contract import (
    LAYOUTS,
    check,
    check_compiled,
    differentiate,
    generator,
    laid_out,
    normal,
    same_bits,
    seeds,
    tensors,
)

CPU = torch.device("cpu")
CONTEXT = 262_144
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROPES = ("none", "by token", "by position")
# query heads, key heads, head dimension, dtype: each pair of kernels is compiled once
HEADS = [
    (64, 8, 128, BF16), (16, 2, 64, FP32), (1, 1, 32, FP16), (3, 1, 96, BF16), (4, 4, 34, FP32),
]  # fmt: skip
heads = st.sampled_from(HEADS)
tokens = st.sampled_from([0, 1, 2, 7, 33])
# one or two float32 heads have one or two roots, which the naive computation may round exactly by
# luck; that few tokens are right is then said by test_tokens_do_not_depend_on_each_other
many = st.sampled_from([0, 7, 33])
contract_cases = st.tuples(tokens, st.sampled_from([h for h in HEADS if h[3] != FP32])) | st.tuples(
    many, st.sampled_from([h for h in HEADS if h[3] == FP32])
)


def inputs(tokens, shape, seed, layout="contiguous"):
    queries, keys, dim, dtype = shape
    q, k = (laid_out(normal(tokens, count, dim, seed=seed + i, dtype=dtype), layout)
            for i, count in enumerate((queries, keys)))  # fmt: skip
    return [q, k, *(normal(dim, seed=seed + 2 + i, dtype=dtype) for i in range(2))]


def turn(rope, tokens, dim, seed):
    """Tables of angles, and the rows of them that tokens take."""
    if rope == "none":
        return {}
    positions = torch.randint(CONTEXT, (tokens,), generator=generator(seed))
    if rope == "by token":
        cos, sin = rope_tables(positions, dim, 1e6)
        return {"cos": cos[:, 0], "sin": sin[:, 0]}
    cos, sin = rope_tables(positions.sort().values, dim, 1e6)
    rows = torch.randint(max(tokens, 1), (tokens,), generator=generator(seed + 1))
    return {"cos": cos[:, 0], "sin": sin[:, 0], "positions": rows}


def ours(**options):
    return lambda *x: op.qk_norm_rope(*x, **options)


def reference(*, cos=None, sin=None, positions=None):
    return lambda *x: op.qk_norm_rope_reference(*x, cos=cos, sin=sin, positions=positions, eps=1e-5)


@pytest.mark.parametrize("rope", ROPES)
@given(case=contract_cases, seed=seeds)
def test_heads_meet_the_contract(rope, case, seed):
    """Per tensor, per token and per head."""
    tokens, shape = case
    options = turn(rope, tokens, shape[2], seed)
    for by in (0, 1):
        check(ours(**options), reference(**options), inputs(tokens, shape, seed), by=by)


@given(tokens=tokens, layout=st.sampled_from([*LAYOUTS, "heads first"]), seed=seeds)
def test_any_strides(tokens, layout, seed):
    """Values and gradients of views are the bits of those of contiguous tensors."""
    shape = (4, 2, 64, BF16)
    if layout == "heads first":
        data = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else x
                for x in inputs(tokens, shape, seed)]  # fmt: skip
    else:
        data = inputs(tokens, shape, seed, layout)
    options = turn("by token", tokens, 64, seed)
    plain = [x.contiguous() for x in data]
    check(ours(**options), reference(**options), plain, by=1)
    assert same_bits(
        differentiate(ours(**options), data, seed), differentiate(ours(**options), plain, seed)
    )


@pytest.mark.parametrize("config", [op.Config(1, 64, 4), op.Config(64, 3, 4)])
@given(tokens=many, seed=seeds)
def test_other_tiles(config, tokens, seed):
    """The bits do not depend on the tile, but for the weights' gradients: sums in another order."""
    data, options = inputs(tokens, (5, 2, 64, FP32), seed), turn("by token", tokens, 64, seed)
    outputs, grads = differentiate(ours(**options), data, seed)
    with use("qk_norm_rope", config):
        check(ours(**options), reference(**options), data, by=1)
        found, found_grads = differentiate(ours(**options), data, seed)
    assert same_bits(found, outputs) and same_bits(found_grads[:2], grads[:2])


@pytest.mark.parametrize("shape", HEADS[1:4:2])
def test_tokens_do_not_depend_on_each_other(shape):
    data, options = inputs(33, shape, 0), turn("by token", 33, shape[2], 0)
    outputs = tensors(op.qk_norm_rope(*data, **options))
    for count in (1, 2):
        some = {name: table[:count] for name, table in options.items()}
        found = op.qk_norm_rope(data[0][:count], data[1][:count], *data[2:], **some)
        assert same_bits(found, [x[:count] for x in outputs])


@given(tokens=tokens, shape=heads, seed=seeds, indexed=st.booleans())
def test_fused_equals_unfused(tokens, shape, seed, indexed):
    """Turning in the same launch gives the bits of turning what the norm alone returns."""
    options = turn(ROPES[1 + indexed], tokens, shape[2], seed)
    fused = op.qk_norm_rope(*inputs(tokens, shape, seed), **options)
    normed = op.qk_norm_rope(*inputs(tokens, shape, seed))
    cos, sin = (options[name][options.get("positions", slice(None))] for name in ("cos", "sin"))
    assert same_bits(fused, [rotate_reference(x, cos, sin) for x in tensors(normed)])


@pytest.mark.parametrize("rope", [False, True])
def test_the_reference_is_the_chain_of_the_model(rope):
    """Norm on every layer, rotation on windowed ones only: the bits of the plain modules."""
    data = inputs(33, (16, 2, 128, BF16), 0)
    cos, sin = rope_tables(torch.arange(CONTEXT - 33, CONTEXT), 128, 1e6)
    expected = []
    for x, weight in zip(data[:2], data[2:], strict=True):
        norm = RMSNorm(128, 1e-5).bfloat16()
        norm.load_state_dict({"weight": weight})
        with kexaone.impl("reference"):
            expected.append(norm(x))
    options = {}
    if rope:
        expected = [apply_rope(x, cos, sin) for x in expected]
        options = {"cos": cos[:, 0], "sin": sin[:, 0]}
    naive = reference(**options)(*data)
    # one rounding of the root may differ: then a value is its neighbour
    assert all(((a != b).float().mean() < 1e-3) for a, b in zip(naive, expected, strict=True))
    check(ours(**options), reference(**options), data, by=1)


def packed(data, options, key_heads):
    qkv, q_weight, k_weight = data
    return qk_norm_rope_packed(qkv, q_weight, k_weight, key_heads=key_heads, **options)


@pytest.mark.parametrize("rope", ROPES[::2])
@given(tokens=tokens, shape=st.sampled_from(HEADS[1:4:2]), seed=seeds, wide=st.booleans())
def test_packed_equals_separate(rope, tokens, shape, seed, wide):
    queries, keys, dim, dtype = shape
    options = turn(rope, tokens, dim, seed)
    qkv = normal(tokens, (queries + 2 * keys) * dim, seed=seed, dtype=dtype)
    data = [laid_out(qkv, "row strided") if wide else qkv,
            *(normal(dim, seed=seed + i, dtype=dtype) for i in (1, 2))]  # fmt: skip

    def separate(qkv, q_weight, k_weight):
        q, k, v = qkv.unflatten(1, (-1, dim)).split((queries, keys, keys), 1)
        out = op.qk_norm_rope(q, k, q_weight, k_weight, **options)
        return out.q, out.k, v.clone()

    fused = differentiate(lambda *x: packed(x, options, keys), data, seed)
    assert same_bits(fused, differentiate(separate, data, seed))


def caches(ring, capacity, shape):
    """Two equal caches of three sequences; every slot holds a number of its own."""
    _, keys, dim, dtype = shape
    pair = []
    for _ in range(2):
        cache = LayerCache((3, keys, capacity, dim), ring=ring, like=torch.zeros(0, dtype=dtype))
        cache.keys.copy_(normal(*cache.keys.shape, seed=1))
        cache.values.copy_(normal(*cache.keys.shape, seed=2))
        pair.append(cache)
    return pair


@pytest.mark.parametrize("ring", [False, True])
@given(lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3), seed=seeds,
       shape=st.sampled_from(HEADS[:5:2]), rope=st.booleans(), index=st.sampled_from([64, 32]),
       capacity=st.integers(9, 40))  # fmt: skip
def test_cache_is_written_as_by_append(ring, lengths, seed, shape, rope, index, capacity):
    """The bits of the op without a cache, in the slots that LayerCache gives them; no others."""
    most = CONTEXT - 9 if ring else capacity - 9
    starts = torch.randint(most + 1, (3,), generator=generator(seed)).tolist()
    packing = Packing(tuple(lengths), tuple(starts), CPU)
    q, k, q_weight, k_weight = inputs(packing.total, shape, seed)
    v = normal(*k.shape, seed=seed + 7, dtype=k.dtype)
    options = {}
    if rope:
        cos, sin = rope_tables(packing.positions, shape[2], 1e6)
        options = {"cos": cos[:, 0], "sin": sin[:, 0]}
    fused, plain = caches(ring, capacity, shape)
    expected = op.qk_norm_rope(q, k, q_weight, k_weight, **options)
    plain.append(expected.k, v, packing)
    rows, positions = (t.to(getattr(torch, f"int{index}"))
                       for t in (packing.rows, packing.positions))  # fmt: skip
    out = qk_norm_rope_cache(q, k, v, q_weight, k_weight, fused.keys, fused.values, rows,
                             positions, **options)  # fmt: skip
    assert same_bits([out, fused.keys, fused.values], [expected.q, plain.keys, plain.values])


def test_cache_of_views_and_by_the_reference():
    """Strided heads and a cache that is a slice of another; the reference writes the same slots."""
    shape = (4, 2, 32, FP32)
    q, k, q_weight, k_weight = inputs(6, shape, 0, "row strided")
    v = laid_out(normal(6, 2, 32, seed=9), "column strided")
    rows, positions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([3, 4, 11, 6, 7, 8])
    written = []
    for name in ("triton", "reference"):
        keys, values = (torch.zeros(3, 4, 9, 32)[:, 1:3, 2:7] for _ in range(2))
        with kexaone.impl(name):
            out = qk_norm_rope_cache(q, k, v, q_weight, k_weight, keys, values, rows, positions)
        written.append((out, keys, values))
    for a, b in zip(*written, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a == 0, b == 0)
    assert torch.equal(written[0][2][2, :, 3], v[5])


def test_twice_the_same_bits():
    data, options = inputs(300, HEADS[0], 3), turn("by token", 300, 128, 3)
    assert same_bits(*(differentiate(ours(**options), data, 0) for _ in range(2)))


def test_offsets_beyond_32_bits():
    """Tokens, or heads, 2^31 + 16 elements apart: the memory between them is never touched."""
    stride = 2**31 + 16
    plain = inputs(2, (2, 1, 64, BF16), 0)
    memory = torch.empty(2 * stride, dtype=BF16)
    options = turn("by token", 2, 64, 0)
    expected = differentiate(ours(**options), plain, 0)
    for strides in ((stride, 64, 1), (64, stride, 1)):
        q = memory.as_strided((2, 2, 64), strides)
        q.copy_(plain[0])
        assert same_bits(differentiate(ours(**options), [q, *plain[1:]], 0), expected)
    keys, values = (memory.as_strided((2, 1, 3, 64), (stride, 192, 64, 1), 8 + 300 * i)
                    for i in range(2))  # fmt: skip
    q, k, q_weight, k_weight = plain
    where = torch.tensor([0, 1]), torch.tensor([5, 0])
    qk_norm_rope_cache(q, k, k, q_weight, k_weight, keys, values, *where, **options)
    assert same_bits([keys[0, :, 2], keys[1, :, 0]], list(expected[0][1]))
    assert same_bits([values[0, :, 2], values[1, :, 0]], list(k))


@pytest.mark.parametrize("rope", ROPES)
def test_opcheck(rope):
    options = turn(rope, 5, 32, 0)
    cos, sin, positions = (options.get(name) for name in ("cos", "sin", "positions"))
    q, k, q_weight, k_weight = (x.requires_grad_() for x in inputs(5, (4, 2, 32, FP32), 0))
    weights = q_weight, k_weight
    qkv = normal(5, 8 * 32).requires_grad_()
    ops = torch.ops.kexaone
    tables = cos, sin, positions
    torch.library.opcheck(ops.qk_norm_rope, (q, k, *weights, *tables, 1e-5))
    torch.library.opcheck(ops.qk_norm_rope_packed, (qkv, *weights, *tables, 2, 1e-5))
    with torch.no_grad():
        q_grad, k_grad = normal(5, 4, 32), normal(5, 2, 32)
        torch.library.opcheck(
            ops.qk_norm_rope_backward, (q_grad, k_grad, q, k, *weights, *tables, 1e-5)
        )
        torch.library.opcheck(
            ops.qk_norm_rope_packed_backward,
            (q_grad, k_grad, k_grad, qkv, *weights, *tables, 2, 1e-5),
        )
        data = [x.detach() for x in (q, k, k, *weights)]
        cache = torch.zeros(2, 2, 9, 32), torch.zeros(2, 2, 9, 32)
        where = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 5, 6])
        torch.library.opcheck(ops.qk_norm_rope_cache, (*data, *cache, *where, cos, sin, 1e-5))


def test_compiled_with_dynamic_shapes():
    def block(q, k, q_weight, k_weight, cos, sin):
        out = op.qk_norm_rope(q, k, q_weight, k_weight, cos=cos.detach(), sin=sin.detach())
        qkv = torch.cat((out.q, out.k, k), 1).flatten(1)
        return qk_norm_rope_packed(qkv, q_weight, k_weight, key_heads=2)

    check_compiled(
        block,
        lambda size: [*inputs(size, (4, 2, 32, FP32), size), normal(size, 16), normal(size, 16)],
        sizes=(5, 9, 17),
    )


def test_compiled_cache_is_written_in_place():
    q, k, q_weight, k_weight = inputs(3, (4, 2, 32, FP32), 0)
    where = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 8])

    def step(cache):
        return qk_norm_rope_cache(q, k, k, q_weight, k_weight, cache[0], cache[1], *where)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        cache = torch.zeros(2, 2, 2, 9, 32)
        results.append((function(cache), cache))
    assert same_bits(*results)
    assert (results[0][1] != 0).any(-1).sum() == 2 * 2 * 3


def test_reference_is_used_when_asked_and_for_float64():
    data, options = inputs(4, (4, 2, 32, BF16), 0), turn("by token", 4, 32, 0)
    with kexaone.impl("reference"):
        assert same_bits(op.qk_norm_rope(*data, **options), reference(**options)(*data))
    double = op.qk_norm_rope(*(x.double() for x in data), **options)
    assert double.q.dtype == double.k.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(3, 1, 32)}, r"q and k must be \[T, A, D\] with equal T and D"),
        ({"q": torch.ones(4, 64)}, r"q and k must be \[T, A, D\]"),
        ({"q_weight": torch.ones(16)}, r"q_weight must be \[32\], got \(16,\)"),
        ({"k_weight": torch.ones(32).half()}, "must have one dtype"),
        ({"cos": torch.ones(4, 16)}, "cos and sin go together"),
        ({"positions": torch.zeros(4).long()}, "positions go with cos and sin"),
        ({"cos": torch.ones(4, 16), "sin": torch.ones(4, 32)}, r"sin must be float32 \[4, 16\]"),
        ({"cos": torch.ones(4, 16).double(), "sin": torch.ones(4, 16)}, "cos must be float32"),
        ({"cos": torch.ones(9, 16), "sin": torch.ones(9, 16), "positions": torch.zeros(4)},
         r"positions must be integers \[4\]"),
    ],
)  # fmt: skip
def test_wrong_shapes_are_refused(change, message):
    q, k, q_weight, k_weight = inputs(4, (4, 2, 32, FP32), 0)
    with pytest.raises(ValueError, match=message):
        op.qk_norm_rope(**({"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight} | change))


def test_wrong_packs_and_caches_are_refused():
    q, k, *weights = inputs(4, (4, 2, 32, FP32), 0)
    with pytest.raises(ValueError, match="100 columns do not hold query heads and 2 x 2 heads"):
        qk_norm_rope_packed(torch.ones(4, 100), *weights, key_heads=2)
    cache, index = torch.zeros(2, 2, 9, 32), torch.zeros(4).long()
    cases = [
        ({"v": k[:, :1]}, "v must have the shape and dtype of k"),
        ({"keys": cache.half()}, r"keys must be torch.float32 \[B, 2, C, 32\]"),
        ({"values": cache[:, :, :3]}, "keys and values must have one shape"),
        ({"keys": cache[:, :, :0], "values": cache[:, :, :0]}, "keys have no slots"),
        ({"keys": laid_out(cache, "column strided")}, "unit stride"),
        ({"positions": index[:2]}, r"positions must be integers \[4\]"),
        ({"q": q.requires_grad_()}, r"has no gradient: call it under torch.no_grad\(\)"),
    ]
    given_ = {"q": q.detach(), "k": k, "v": k, "q_weight": weights[0], "k_weight": weights[1],
              "keys": cache, "values": cache.clone(), "sequences": index,
              "positions": index}  # fmt: skip
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            qk_norm_rope_cache(**(given_ | change))
