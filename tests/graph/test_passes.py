"""Every pass: it fires on what it is for, what it leaves computes the same, what it must not touch
stays."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from ..kernels.contract import dtypes, generator, laid_out, layouts, normal, seeds
from . import patterns as p
from .validation import rewritten, validate, validate_inference

rows = st.sampled_from([1, 3, 33])
columns = st.sampled_from([64, 100, 128])


@given(name=st.sampled_from(sorted(p.NORMS)), rows=rows, columns=columns, dtype=dtypes,
       layout=layouts, seed=seeds)  # fmt: skip
def test_norms_are_found_and_equal(name, rows, columns, dtype, layout, seed):
    x = laid_out(normal(rows, columns, seed=seed, dtype=dtype), layout)
    weight = normal(columns, seed=seed + 1, dtype=dtype)
    assert validate(p.NORMS[name], [x, weight], seed=seed).matches == {"rms_norm": 1}


@given(rows=rows, columns=columns, seed=seeds)
def test_gemma_norm_is_found_in_float32_only(rows, columns, seed):
    x, weight = normal(rows, columns, seed=seed), normal(columns, seed=seed + 1)
    assert validate(p.gemma_norm, [x, weight], seed=seed).matches == {"rms_norm": 1}
    low = [x.bfloat16(), weight.bfloat16()]
    (place,) = validate(p.gemma_norm, low, seed=seed).places
    assert "weight" in place.reason


@given(rows=rows, columns=columns, dtype=dtypes, layout=layouts, seed=seeds)
def test_sums_join_the_norm(rows, columns, dtype, layout, seed):
    x = laid_out(normal(rows, columns, seed=seed, dtype=dtype), layout)
    inputs = [x, normal(rows, columns, seed=seed + 1, dtype=dtype),
              normal(columns, seed=seed + 2, dtype=dtype)]  # fmt: skip
    report = validate(p.residual_norm, inputs, seed=seed)
    assert report.matches == {"rms_norm": 1, "add_rms_norm": 1}


@given(rows=rows, columns=columns, dtype=dtypes, layout=layouts, seed=seeds)
def test_swiglu_is_found_and_equal(rows, columns, dtype, layout, seed):
    gate = laid_out(normal(rows, columns, seed=seed, dtype=dtype), layout)
    up = normal(rows, columns, seed=seed + 1, dtype=dtype)
    both = laid_out(normal(rows, 2 * columns, seed=seed, dtype=dtype), layout)
    assert validate(p.mlp, [gate, up], seed=seed).matches == {"swiglu": 1}
    assert validate(p.packed_mlp, [both], seed=seed).matches == {"swiglu": 1}
    assert rewritten(p.sliced_mlp, [both])[1].matches == {"swiglu": 1}


@given(rows=rows, padding=st.sampled_from([-1, 3]), dtype=dtypes, layout=layouts,
       batched=st.booleans(), seed=seeds)  # fmt: skip
def test_lookups_are_found_and_equal(rows, padding, dtype, layout, batched, seed):
    table = laid_out(normal(9, 64, seed=seed, dtype=dtype), layout)
    ids = torch.randint(0, 9, (1, rows) if batched else (rows,), generator=generator(seed))

    def function(table, ids):
        return torch.ops.aten.embedding(table, ids, padding)

    assert validate(function, [table, ids], seed=seed).matches == {"embedding": 1}


def test_lookups_scaled_by_frequency_stay():
    def function(table):
        return F.embedding(torch.tensor([1, 1, 2]), table, scale_grad_by_freq=True)

    assert "frequency" in rewritten(function, [normal(9, 64)])[1].refusals[0].reason


few_dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@given(batch=st.integers(1, 2), length=st.sampled_from([1, 5]), rope=st.booleans(),
       early=st.booleans(), heads=st.just((4, 2)), dtype=few_dtypes, seed=seeds)  # fmt: skip
def test_normed_heads_are_found_and_equal(batch, length, rope, early, heads, dtype, seed):
    dim = 64
    inputs = [normal(batch, length, h * dim, seed=seed + i, dtype=dtype)
              for i, h in enumerate(heads)]  # fmt: skip
    inputs += [normal(dim, seed=seed + i, dtype=dtype) for i in (5, 6)]
    report = validate(functools.partial(p.qk_norm, rope=rope, early=early), inputs, seed=seed)
    assert report.matches == {"rms_norm": 2, "qk_norm_rope": 1} and not report.refusals


@given(batch=st.integers(1, 3), length=st.sampled_from([1, 6, 40]), more=st.sampled_from([0, 5]),
       window=st.sampled_from([0, 2, 4]), heads=st.just((4, 2)), dtype=few_dtypes,
       style=st.sampled_from(["compare", "triangle", "additive", "flag"]), seed=seeds)  # fmt: skip
def test_masks_disappear(batch, length, more, window, heads, dtype, style, seed):
    if style == "flag":
        window = more = 0
    # where a query sees one key alone, gradients are zero but for rounding
    assume(length + more > 1)
    shapes = [(batch, heads[0], length, 16), *[(batch, heads[1], length + more, 16)] * 2]
    inputs = [normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]
    function = functools.partial(p.masked_attention, window=window, style=style)
    report = validate(function, inputs, seed=seed)
    assert report.matches == {"attention": 1}, report.refusals
    after, _ = rewritten(function, inputs)
    sizes = [n.meta["val"].shape for n in after.graph.nodes if "val" in n.meta
             and isinstance(n.meta["val"], torch.Tensor)]  # fmt: skip
    square = (length, length + more)
    # a single query's row of a mask has the shape of other rows
    assert length == 1 or not [s for s in sizes if tuple(s[-2:]) == square and s[-1] != 16]
    assert not [n for n in after.graph.nodes if "scaled_dot_product" in str(n.target)]


@given(tokens=st.sampled_from([1, 7, 40]), experts=st.sampled_from([4, 9]), seed=seeds)
def test_routers_are_found_and_equal(tokens, experts, seed):
    inputs = [normal(tokens, 32, seed=seed), normal(experts, 32, seed=seed + 1),
              normal(experts, seed=seed + 2) * 0.1]  # fmt: skip

    def weights_by_expert(x, weight, bias):
        weights, ids = p.router(x, weight, bias.detach(), top_k=3)
        return torch.zeros(len(x), experts, dtype=weights.dtype).scatter(1, ids, weights)

    assert validate(weights_by_expert, inputs, seed=seed).matches == {"route": 1}


@given(tokens=st.sampled_from([1, 7, 40]), top_k=st.sampled_from([1, 3]), dtype=few_dtypes,
       seed=seeds)  # fmt: skip
def test_batched_experts_are_found_and_equal(tokens, top_k, dtype, seed):
    inputs = p.expert_inputs(tokens, 5, top_k, dtype, seed)
    assert validate(p.batched_experts, inputs, seed=seed).matches == {"experts": 1}


@given(batch=st.integers(1, 2), length=st.sampled_from([2, 9]), shift=st.booleans(), dtype=dtypes,
       reduction=st.sampled_from(["mean", "sum"]), ignored=st.booleans(), seed=seeds)  # fmt: skip
def test_losses_are_found_and_equal(batch, length, shift, dtype, reduction, ignored, seed):
    targets = torch.randint(0, 50, (batch, length), generator=generator(seed))
    if ignored:
        targets[:, 0] = -100
    inputs = [normal(batch, length, 64, seed=seed, dtype=dtype),
              (normal(50, 64, seed=seed + 1) / 8).to(dtype), targets]  # fmt: skip
    function = functools.partial(p.loss, shift=shift, reduction=reduction)
    assert validate(function, inputs, seed=seed).matches == {"cross_entropy": 1}


BEFORE = {
    "nothing": lambda x: x,
    "a product": lambda x: x * 2,
    "a write to a copy": lambda x: x.clone().mul_(2),
    "a write through a view": lambda x: x.clone().view(-1).add_(1).view(x.shape),
    "a transposed copy": lambda x: x.t().contiguous().t(),
    "a cut": lambda x: torch.cat((x, x))[: x.shape[0]],
}
AFTER = {
    "nothing": lambda x, y: y,
    "a write to the result": lambda x, y: y.mul_(3),
    "the result twice": lambda x, y: (y, y + x),
    "a view": lambda x, y: y.view(-1).view(x.shape),
    "a write to the input": lambda x, y: (y, x.add_(1) if not x.requires_grad else x + 1),
    "a row of it": lambda x, y: y[0] + x.sum(),
}


@given(before=st.sampled_from(sorted(BEFORE)), after=st.sampled_from(sorted(AFTER)),
       pattern=st.sampled_from(["llama", "other", "library", "swiglu", "residual"]),
       dtype=dtypes, layout=layouts, training=st.booleans(), seed=seeds)  # fmt: skip
def test_whatever_stands_around_a_pattern(before, after, pattern, dtype, layout, training, seed):
    # results laid out like a transposed input have no flat view, in eager PyTorch either
    assume((before, after) != ("a transposed copy", "a view"))

    def function(x, other, weight):
        start = BEFORE[before](x)
        if pattern == "swiglu":
            y = p.mlp(start, other)
        elif pattern == "residual":
            y = sum(p.residual_norm(start, other, weight))
        else:
            y = p.NORMS[pattern](start, weight)
        return AFTER[after](x, y)

    x = normal(7, 64, seed=seed, dtype=dtype)
    if after != "a write to the input":
        x = laid_out(x, layout)
    inputs = [x, normal(7, 64, seed=seed + 1, dtype=dtype), normal(64, seed=seed + 2, dtype=dtype)]
    if training:
        validate(function, inputs, seed=seed)
    else:
        validate_inference(function, inputs)


def written_between(x, weight):
    """The input changes after it was read, before the result is taken."""
    x = x.clone()
    wide = x.view(x.shape)
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    normed = x * scale
    wide.mul_(0)
    return weight * normed + x


def promoted(x, weight):
    return weight.float() * p.llama_norm(x, torch.ones_like(weight))


def not_last(x, weight):
    return weight[:, None] * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5))


def scaled_sum(x, weight):
    return p.llama_norm(torch.add(x, x, alpha=2), weight)


def test_what_almost_fits_a_norm_stays():
    square = [normal(64, 64), normal(64, seed=1)]
    assert validate(not_last, square).matches == {}
    report = validate_inference(written_between, square)
    assert report.matches == {} and "in place" in report.refusals[0].reason


def test_other_dtypes_and_factors_stay():
    x, weight = normal(5, 64, dtype=torch.bfloat16), normal(64, seed=1, dtype=torch.bfloat16)
    assert validate(promoted, [x, weight]).matches == {"rms_norm": 1}  # the inner one
    mixed, _ = rewritten(lambda x, w: p.llama_norm(x, w.float()), [x, weight])
    assert "kexaone.rms_norm" not in str(mixed.graph)
    assert validate(scaled_sum, [x.float(), weight.float()]).matches == {"rms_norm": 1}
    assert validate(p.mlp, [x, x[:1]]).matches == {}
    assert validate(p.mlp, [x.double(), x.double()]).matches == {}


def dropped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)


def padded(q, k, v):
    real = (k[:, 0, :, 0] > 0)[:, None, None, :]
    mask = p.causal_mask(q.shape[2], k.shape[2], 0, "compare") & real
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dilated(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(2 * j <= i) | (j == 0))


def biased(q, k, v):
    bias = torch.arange(k.shape[2], dtype=q.dtype)[None].expand(q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def everything(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def ahead(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i + 1)


@pytest.mark.parametrize("function", [dropped, padded, dilated, biased, everything, ahead],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_other_attention_stays_and_is_said(function):
    _, report = rewritten(function, [normal(2, 2, 6, 16, seed=i) for i in range(3)])
    (place,) = report.places
    assert place.name == "attention" and place.reason


def test_returned_logits_stay():
    def both(hidden, weight, targets):
        logits = F.linear(hidden, weight)
        return logits, F.cross_entropy(logits, targets)

    inputs = [normal(9, 64), normal(50, 64, seed=1), torch.arange(9)]
    (place,) = validate(both, inputs).places
    assert "returned" in place.reason


def test_no_targets_at_all_stay_not_a_number():
    inputs = [normal(9, 64), normal(50, 64, seed=1), torch.full((9,), -100)]
    after, report = rewritten(lambda h, w, t: F.cross_entropy(F.linear(h, w), t), inputs)
    assert report.matches == {"cross_entropy": 1} and after(*inputs).isnan()


def test_tables_with_different_halves_stay():
    def function(q, k, w, cos, sin):
        def heads(x):
            n = p.llama_norm(x.view(1, 6, -1, 16).transpose(1, 2), w)
            return n * cos.unsqueeze(1) + p.rotate_half(n) * sin.unsqueeze(1)

        return heads(q), heads(k)

    inputs = [normal(1, 6, 32), normal(1, 6, 16, seed=1), normal(16, seed=2),
              normal(1, 6, 16, seed=3), normal(1, 6, 16, seed=4)]  # fmt: skip
    report = validate(function, inputs)
    assert report.matches == {"rms_norm": 2} and "halves" in report.refusals[0].reason


def test_modes_that_change_inside_a_pattern_stop_it():
    def function(x, weight):
        with torch.no_grad():
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * (x * scale)

    assert validate(function, [normal(5, 64), normal(64, seed=1)]).matches == {}
