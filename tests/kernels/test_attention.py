"""Attention over packed sequences against float64, SDPA and flex_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kexaone
from kexaone.kernels import attention as op
from kexaone.kernels import attention_backward
from kexaone.kernels.attention import AttentionOutput
from kexaone.kernels.tables import use

from .contract import check, check_compiled, differentiate, laid_out, normal, same_bits, seeds

# tiles small enough that short sequences take several, with and without a loop for whole blocks
SMALL = {
    split: (op.Config(32, 16, split, 4, 1), attention_backward.Config(32, 16, 16, 32, split, 4, 1))
    for split in (False, True)
}
# query heads, key heads, dtype: groups of 2, 3 (a tile's rows do not divide by it) and 1
CASES = [(4, 2, torch.bfloat16), (6, 2, torch.float32), (2, 2, torch.float16)]
cases = st.sampled_from(CASES)
# where all rows see a single key, gradients are zero but for rounding: a test of its own
lengths = st.lists(
    st.sampled_from([0, 1, 2, 15, 16, 17, 40, 77]), min_size=1, max_size=4
).filter(lambda lengths: max(lengths) != 1)  # fmt: skip
windows = st.sampled_from([0, 2, 5, 16, 33, 1000])


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(queries, keys, heads, kv_heads, dtype, *, dim=32, sinks=False, seed=0):
    shapes = [(queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, dim)]
    data = [normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]
    return [*data, normal(heads, seed=seed + 9, dtype=dtype)] if sinks else data


def ours(**options):
    return lambda q, k, v, sinks=None: op.attention(q, k, v, sinks=sinks, **options)


class Plain(torch.autograd.Function):
    """The maths of `attention_backward.py`, one line of torch each, in the dtype of the inputs.

    Autograd's own sum over p dp in place of dout out cancels better where a softmax is nearly one
    key, which no kernel that keeps only the log of the denominator can do.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, options):
        result = op.attention_reference(q, k, v, sinks, **options)
        lse = result.lse.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, result.out, lse)
        ctx.options = options
        return result.out, result.lse

    @staticmethod
    def backward(ctx, grad, lse_grad):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        options, group = ctx.options, q.shape[1] // k.shape[1]
        scale = options.get("scale") or q.shape[-1] ** -0.5
        starts_k = options.get("cu_seqlens_k", options["cu_seqlens"])
        seen = op.visible_reference(options["cu_seqlens"], starts_k, len(q), len(k),
                                    options.get("window", 0))  # fmt: skip
        qh, kh, vh, gh = (x.transpose(0, 1) for x in (q, *(
            x.repeat_interleave(group, 1) for x in (k, v)), grad))  # fmt: skip
        lse = lse.T[..., None]
        p = torch.where(seen, (qh @ kh.mT * scale - lse).exp(), 0)
        delta = ((gh * out.transpose(0, 1)).sum(-1) - lse_grad.T.to(q.dtype))[..., None]
        ds = p * (gh @ vh.mT - delta)
        # one sum over all queries of a key head, as long as the kernel's
        d_keys = [x.unflatten(0, (-1, group)).flatten(1, 2) for x in (ds, qh, p, gh)]
        grads = (ds @ kh * scale, d_keys[0].mT @ d_keys[1] * scale, d_keys[2].mT @ d_keys[3])
        dq, dk, dv = (x.transpose(0, 1) for x in grads)
        d_sinks = None
        if sinks is not None:
            d_sinks = -((sinks[:, None, None] - lse).exp() * delta).sum((1, 2))
        return dq, dk, dv, d_sinks, None


def reference(**options):
    return lambda q, k, v, sinks=None: Plain.apply(q, k, v, sinks, options)


def test_the_written_out_gradient_is_that_of_autograd():
    data = [x.double() for x in inputs(30, 40, *CASES[1], sinks=True)]
    options = {"cu_seqlens": starts([10, 20]), "cu_seqlens_k": starts([15, 25]), "window": 9}
    exact = differentiate(lambda *x: op.attention_reference(*x, **options), data, 0)
    plain = differentiate(reference(**options), data, 0)
    torch.testing.assert_close(plain, exact, rtol=1e-12, atol=1e-13)


def compare(data, split, **options):
    forward, backward = SMALL[split]
    with use("attention", forward), use("attention_backward", backward):
        check(ours(**options), reference(**options), data, by=1)


@given(case=cases, lengths=lengths, window=windows, sinks=st.booleans(), split=st.booleans(),
       seed=seeds)  # fmt: skip
def test_self_attention_meets_the_contract(case, lengths, window, sinks, split, seed):
    tokens = sum(lengths)
    data = inputs(tokens, tokens, *case, sinks=sinks, seed=seed)
    compare(data, split, cu_seqlens=starts(lengths), window=window)


@given(lengths=lengths, before=st.sampled_from([1, 16, 50]), window=windows,
       split=st.booleans(), seed=seeds)  # fmt: skip
def test_chunks_after_earlier_keys_meet_the_contract(lengths, before, window, split, seed):
    """Each sequence's queries are the last of its keys, a sequence without queries included."""
    held = [n + (before + i) % 60 for i, n in enumerate(lengths)]
    data = inputs(sum(lengths), sum(held), *CASES[0], sinks=True, seed=seed)
    compare(data, split, cu_seqlens=starts(lengths), cu_seqlens_k=starts(held), window=window)


def test_a_single_visible_key():
    """The output is its value; dp - delta is zero but for the rounding of two sums of D terms."""
    q, k, v = (x.requires_grad_() for x in inputs(40, 40, *CASES[1]))
    result = op.attention(q, k, v, cu_seqlens=starts([1, 39]), window=1)
    assert torch.equal(result.out, v.repeat_interleave(3, 1))
    grad = normal(40, 6, 32, seed=5)
    dq, dk, dv = torch.autograd.grad(result.out, (q, k, v), grad)
    torch.testing.assert_close(dv, grad.unflatten(1, (2, 3)).sum(2))
    slack = 1.01 * 32**0.5 * torch.finfo(torch.float32).eps
    slack = slack * (grad * v.repeat_interleave(3, 1)).abs().sum(-1, keepdim=True)
    assert (dq.abs() <= slack * k.repeat_interleave(3, 1).abs()).all()
    assert (dk.abs() <= (slack * q.abs()).unflatten(1, (2, 3)).sum(2)).all()


@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize("dim", [4, 32, 64, 96, 128, 256])
def test_every_head_dimension_with_the_default_tiles(dim, window):
    """Enough tokens that the default tiles have whole, hidden and partly seen blocks."""
    data = inputs(300, 300, 8, 1, torch.bfloat16, dim=dim)
    options = {"cu_seqlens": starts([290, 10]), "window": window, "scale": 0.07}
    check(ours(**options), reference(**options), data, by=1)


def test_more_heads_in_a_group_than_rows_in_a_tile():
    data = inputs(9, 9, 40, 1, torch.float32)
    compare(data, False, cu_seqlens=starts([4, 5]), window=3)


@given(layout=st.sampled_from(["row strided", "column strided", "expanded"]), seed=seeds)
def test_layouts(layout, seed):
    data = [laid_out(x, layout) for x in inputs(33, 33, *CASES[0], seed=seed)]
    compare(data, False, cu_seqlens=starts([13, 20]), window=5)


def test_heads_before_tokens():
    """The layout [heads, tokens, dimension] of other attention functions, as a view."""
    data = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs(33, 33, *CASES[1])]
    compare(data, True, cu_seqlens=starts([13, 20]))


def dense(length, window, device=None):
    token = torch.arange(length, device=device)
    near = token[:, None] - token < (window or length + 1)
    return (token <= token[:, None]) & near


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [0, 20])
def test_against_sdpa(window, dtype):
    def sdpa(q, k, v):
        parts = [[x[:50].transpose(0, 1), x[50:].transpose(0, 1)] for x in (q, k, v)]
        return torch.cat([
            F.scaled_dot_product_attention(
                *part, attn_mask=dense(part[0].shape[1], window), enable_gqa=True
            ).transpose(0, 1)
            for part in zip(*parts, strict=True)
        ])  # fmt: skip

    def out(q, k, v):
        return op.attention(q, k, v, cu_seqlens=starts([50, 60]), window=window).out

    check(out, sdpa, inputs(110, 110, 4, 2, dtype), by=1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_against_flex_attention():
    window, tokens = 20, 110
    data = inputs(tokens, tokens, 4, 2, torch.bfloat16)
    mask = create_block_mask(
        lambda b, h, i, j: (j <= i) & (i - j < window), None, None, tokens, tokens, device="cpu"
    )

    def flex(q, k, v):
        out, aux = flex_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, enable_gqa=True,
            return_lse=True,
        )  # fmt: skip
        kind = torch.promote_types(q.dtype, torch.float32)
        return AttentionOutput(out[0].transpose(0, 1), aux[0].T.to(kind))

    options = {"cu_seqlens": starts([tokens]), "window": window}
    check(ours(**options), flex, data, by=1, gradients=False)


@given(lengths=lengths, window=windows, seed=seeds)
def test_sequences_alone_have_the_same_bits(lengths, window, seed):
    tokens = sum(lengths)
    data = inputs(tokens, tokens, *CASES[0], seed=seed)
    (forward, backward), at = SMALL[False], starts(lengths)
    with use("attention", forward), use("attention_backward", backward):
        packed = [x.requires_grad_() for x in data]
        out = op.attention(*packed, cu_seqlens=at, window=window).out
        grads = torch.autograd.grad(out, packed, torch.ones_like(out))
        for first, last in zip(at[:-1].tolist(), at[1:].tolist(), strict=True):
            alone = [x.detach()[first:last].requires_grad_() for x in data]
            part = op.attention(*alone, cu_seqlens=starts([last - first]), window=window).out
            parts = torch.autograd.grad(part, alone, torch.ones_like(part))
            assert same_bits(part, out[first:last])
            assert same_bits(parts, [g[first:last] for g in grads])


def test_twice_the_same_bits():
    data = inputs(200, 200, 8, 2, torch.bfloat16, sinks=True)
    function = ours(cu_seqlens=starts([150, 50]), window=60)
    assert same_bits(*(differentiate(function, data, 0) for _ in range(2)))


def test_keys_out_of_the_window_are_never_loaded():
    """NaN in keys and values that nothing sees does not reach the result."""
    data = inputs(300, 300, *CASES[0])
    options = {"cu_seqlens": starts([0, 300]), "cu_seqlens_k": starts([0, 300]), "window": 10}
    queries = data[0][290:]
    options["cu_seqlens"] = starts([0, 10])
    want = op.attention(queries, *data[1:], **options)
    for x in data[1:]:
        x[:281] = float("nan")
    assert same_bits(op.attention(queries, *data[1:], **options), want)


def test_offsets_beyond_32_bits():
    """Tokens 2^31 + 16 elements apart: the memory between them is never touched."""
    stride = 2**31 + 16
    data = []
    for x in inputs(2, 2, *CASES[0]):
        far = torch.empty(stride + 256, dtype=x.dtype).as_strided(x.shape, (stride, 32, 1))
        data.append(far.copy_(x))
    options = {"cu_seqlens": starts([2])}
    assert same_bits(differentiate(ours(**options), data, 0),
                     differentiate(ours(**options), [x.contiguous() for x in data], 0))  # fmt: skip


def test_large_scores_and_a_dominant_sink():
    q, k, v = inputs(40, 40, *CASES[1])
    options = {"cu_seqlens": starts([40])}
    check(ours(**options), reference(**options), [q * 40, k * 40, v], by=1, gradients=False)
    sinks = torch.full((6,), 200.0)
    result = op.attention(q, k, v, sinks=sinks, **options)
    assert (result.out.abs() < 1e-30).all() and (result.lse == 200).all()


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck(sinks):
    data = [x.requires_grad_() for x in inputs(7, 9, 4, 2, torch.float32, sinks=sinks)]
    sink = data.pop() if sinks else None
    at, at_k = starts([3, 4]), starts([5, 4])
    operation = torch.ops.kexaone.attention
    torch.library.opcheck(operation, (*data, at, at_k, sink, 3, 0.2))
    with torch.no_grad():
        out, lse = operation(*data, at, at_k, sink, 3, 0.2)
        arguments = (out, lse, *data, at, at_k, sink, out, lse, 3, 0.2)
        torch.library.opcheck(torch.ops.kexaone.attention_backward, arguments)


def test_compiled_with_dynamic_shapes():
    def block(q, k, v, at):
        result = op.attention(q, k, v, cu_seqlens=at, window=5)
        return result.out * result.lse.sigmoid()[..., None]

    def data(size):
        return [*inputs(size, size, *CASES[1], seed=size), starts([size // 2, size - size // 2])]

    check_compiled(block, data, sizes=(8, 19, 37))


def test_reference_is_used_when_asked_and_for_float64():
    data, options = inputs(9, 9, *CASES[0]), {"cu_seqlens": starts([9])}
    with kexaone.impl("reference"):
        assert same_bits(op.attention(*data, **options), op.attention_reference(*data, **options))
    assert op.attention(*(x.double() for x in data), **options).lse.dtype == torch.float64


@pytest.mark.parametrize("arguments, message", [
    ({"k": torch.ones(4, 3, 32), "v": torch.ones(4, 3, 32)}, "4 query heads must be a multiple"),
    ({"v": torch.ones(4, 2, 64)}, "keys and values must have one shape"),
    ({"q": torch.ones(4, 32)}, r"must be \[tokens, heads, head dimension\]"),
    ({"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens must be int32 \[sequences \+ 1\]"),
    ({"q": torch.ones(3, 4, 32)}, "3 queries and 4 keys need cu_seqlens_k"),
    ({"cu_seqlens_k": starts([2, 2])}, "differ in length"),
    ({"sinks": torch.ones(2)}, r"sinks must be \[4\]"),
    ({"window": -1}, "window must be 0"),
    ({"scale": 0.0}, "scale must be positive"),
    ({"q": torch.ones(4, 4, 32).half()}, "must have one dtype"),
    ({x: torch.ones(4, 2, 257) for x in "qkv"}, "head dimension must be 1 to 256"),
])  # fmt: skip
def test_wrong_inputs_are_refused(arguments, message):
    k = torch.ones(4, 2, 32)
    good = {"q": torch.ones(4, 4, 32), "k": k, "v": k, "cu_seqlens": starts([4])}
    for name in ("triton", "reference"):
        with kexaone.impl(name), pytest.raises(ValueError, match=message):
            op.attention(**{**good, **arguments})
