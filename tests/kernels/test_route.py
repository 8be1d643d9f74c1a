"""The router and its balance statistics against their float64 reference; ids bit for bit."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import balance, dispatch, matmul_fp32
from kexaone.kernels import route as op
from kexaone.kernels.tables import use

from .contract import (
    DTYPES,
    check,
    check_compiled,
    differentiate,
    laid_out,
    layouts,
    normal,
    same_bits,
    seeds,
)

token_counts = st.sampled_from([0, 1, 2, 8, 33, 130])
experts_and_choices = st.sampled_from([(5, 2), (60, 16), (128, 8), (300, 6)])
dtype_pairs = st.sampled_from(
    [(a, a) for a in DTYPES]
    + [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)  # fmt: skip


@pytest.fixture(autouse=True)
def kernels_at_every_size():
    with kexaone.impl("triton"):
        yield


def inputs(tokens, hidden, experts, dtype, layout="contiguous", seed=0, weight_dtype=None):
    x = laid_out(normal(tokens, hidden, seed=seed, dtype=dtype), layout)
    weight = (2 * normal(experts, hidden, seed=seed + 1) / hidden**0.5).to(weight_dtype or dtype)
    return [x, laid_out(weight, "contiguous" if layout == "expanded" else layout)]


def bias_of(experts, seed=0):
    return 0.3 * normal(experts, seed=seed + 2)


def with_ids(ids, bias, scaling, normalize):
    """The reference with the choice given: what a rounding cannot turn over."""

    def scores_and_weights(x, weight):
        routed = op.route_reference(x, weight, bias, top_k=1)
        weights = routed.scores_TE.gather(1, ids)
        if normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return routed.scores_TE, weights * scaling

    return scores_and_weights


def check_routing(data, top_k, seed, *, normalize=True, scaling=2.5):
    bias = bias_of(len(data[1]), seed)
    keywords = {"top_k": top_k, "scaling": scaling, "normalize": normalize}

    def ours(x, weight):
        routed = op.route(x, weight, bias, **keywords)
        return routed.scores_TE, routed.weights_TK

    routed = op.route(*data, bias, **keywords)
    ids, _ = op.select_reference(routed.scores_TE, bias, **keywords)
    assert torch.equal(routed.ids_TK, ids)
    # an expert's gradient from few tokens hangs on the roundings of as many scores, and a token's
    # on those of a few experts: one by one they are judged where luck evens out
    by = 0 if len(data[0]) >= 32 and len(data[1]) >= 16 else None
    check(ours, with_ids(ids, bias, scaling, normalize), data, by=by)


@given(tokens=token_counts, shape=experts_and_choices, dtype=dtype_pairs, seed=seeds,
       normalize=st.booleans(), scaling=st.sampled_from([1.0, 2.5]))  # fmt: skip
def test_routing_meets_the_contract(tokens, shape, dtype, seed, normalize, scaling):
    data = inputs(tokens, 256, shape[0], dtype[0], seed=seed, weight_dtype=dtype[1])
    check_routing(data, shape[1], seed, normalize=normalize, scaling=scaling)


@given(tokens=st.sampled_from([1, 33]), layout=layouts, seed=seeds)
def test_inputs_with_strides(tokens, layout, seed):
    check_routing(inputs(tokens, 100, 32, torch.bfloat16, layout, seed), 8, seed)


@pytest.mark.parametrize("dtype", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("three", [False, True])
def test_other_tiles(dtype, pieces, three):
    config = matmul_fp32.Config(16, 32, 32, pieces, three, 4, 3)
    with use("matmul_fp32", config):
        check_routing(inputs(33, 200, 40, dtype[0], weight_dtype=dtype[1]), 4, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 40])
def test_rows_of_the_large_model(tokens, dtype):
    """The longer the sums are, the more their order matters."""
    check_routing(inputs(tokens, 6144, 128, dtype), 8, 0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_and_two_experts(top_k):
    check_routing(inputs(9, 64, top_k, torch.float32), top_k, 0)


@given(shape=experts_and_choices, tokens=token_counts, seed=seeds)
def test_equal_scores_go_to_the_lower_index(shape, tokens, seed):
    """Scores that are all alike, or that take few values."""
    experts, top_k = shape
    alike = op.route(
        torch.zeros(tokens, 16), torch.zeros(experts, 16), torch.zeros(experts), top_k=top_k
    )
    assert torch.equal(alike.ids_TK, torch.arange(top_k).expand(tokens, top_k))
    coarse = normal(experts, seed=seed).round() / 4
    routed = op.route(torch.zeros(tokens, 16), torch.zeros(experts, 16), coarse, top_k=top_k)
    expected = sorted(range(experts), key=lambda e: (-coarse[e].item(), e))[:top_k]
    assert routed.ids_TK.tolist() == [expected] * tokens


def test_ids_stay_in_range_whatever_the_scores():
    x, weight = inputs(4, 32, 60, torch.float32)
    bias = torch.full((60,), float("nan"))
    assert op.route(x, weight, bias, top_k=8).ids_TK.tolist() == [list(range(8))] * 4
    bias = bias_of(60)
    bias[7], bias[3], bias[9] = float("inf"), float("nan"), -float("inf")
    x[2] = float("nan")
    routed = op.route(x, weight, bias, top_k=8)
    ids, _ = op.select_reference(routed.scores_TE, bias, top_k=8, scaling=1.0, normalize=True)
    assert torch.equal(routed.ids_TK, ids) and routed.ids_TK[0, :2].tolist() == [3, 7]


def test_choices_are_made_by_bias_and_weighed_without():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    routed = op.route(
        logits, torch.eye(4), torch.tensor([9.0, 0.0, 9.0, 0.0]), top_k=2, scaling=2.5
    )
    assert routed.ids_TK.tolist() == [[0, 2]]
    chosen = torch.tensor([[0.0, -1.0]]).sigmoid()
    torch.testing.assert_close(routed.weights_TK, 2.5 * chosen / chosen.sum())


def test_products_of_16_bit_operands_are_not_rounded():
    """A sum of 1 and 2^-20: the product of the bfloat16 factors needs float32."""
    x = torch.tensor([[1.0, 2.0**-10, 0.0, 0.0]] * 20).bfloat16()
    routed = op.route(x, x[:2], torch.zeros(2), top_k=1)
    assert same_bits(routed.scores_TE, torch.full((20, 2), 1 + 2.0**-20).sigmoid())


@pytest.mark.parametrize("three", [False, True])
def test_three_parts_are_the_whole(three):
    """A float32 operand in three bfloat16 parts has all its bits."""
    config = matmul_fp32.Config(16, 16, 16, 1, three, 4, 3)
    with use("matmul_fp32", config):
        a = normal(20, 16)
        out = matmul_fp32.matmul_fp32(a, torch.eye(16, dtype=torch.bfloat16), torch.float32)
    assert same_bits(out, a)


@given(sequences=st.sampled_from([1, 2, 3]), length=st.sampled_from([1, 5, 33, 200]),
       seed=seeds, shape=st.sampled_from([(5, 2), (128, 8)]),
       config=st.sampled_from([None, balance.Config(4, 2, 4)]))  # fmt: skip
def test_balance_meets_the_contract(sequences, length, seed, shape, config):
    experts, top_k = shape
    scores = normal(sequences * length, experts, seed=seed).sigmoid()
    ids = scores.argsort(1)[:, :top_k]
    with use("balance", config):
        found = balance.balance_statistics(scores, ids, sequences=sequences)
        expected = balance.balance_reference(scores, ids, sequences=sequences)
        assert same_bits(found.counts_BE, expected.counts_BE)
        check(
            lambda s: balance.balance_statistics(s, ids, sequences=sequences).shares_BE,
            lambda s: balance.balance_reference(s, ids, sequences=sequences).shares_BE,
            [scores],
        )


def routed_and_balanced(x, weight, bias):
    routed = op.route(x, weight, bias, top_k=4, scaling=2.5)
    found = balance.balance_statistics(routed.scores_TE, routed.ids_TK, sequences=1)
    return routed.weights_TK, found.shares_BE * found.counts_BE


@pytest.mark.parametrize("tokens", [3, 200])
def test_twice_the_same_bits(tokens):
    data = [*inputs(tokens, 96, 32, torch.bfloat16), bias_of(32)]
    assert same_bits(*(differentiate(routed_and_balanced, data, 0) for _ in range(2)))


def test_compiled_with_dynamic_shapes():
    check_compiled(
        routed_and_balanced,
        lambda tokens: [*inputs(tokens, 64, 32, torch.bfloat16, seed=tokens), bias_of(32)],
        sizes=(5, 9, 40),
    )


def test_row_offsets_beyond_32_bits():
    """Two rows 2^31 + 16 elements apart: the memory between them is never touched."""
    stride = 2**31 + 16
    x = torch.empty(stride + 64, dtype=torch.bfloat16).as_strided((2, 64), (stride, 1))
    x.copy_(normal(2, 64))
    _, weight = inputs(2, 64, 32, torch.bfloat16)
    for rows in (x, x[[0, 1]].repeat(8, 1)[::8]):
        ours, theirs = (
            differentiate(routed_and_balanced, [t, weight, bias_of(32)], 0)
            for t in (rows, rows.contiguous())
        )
        assert same_bits(ours, theirs)


def test_opcheck():
    x, weight = (t.requires_grad_() for t in inputs(6, 40, 10, torch.float32))
    ops, arguments = torch.ops.kexaone, (x, weight, bias_of(10), 3, 2.5, True)
    torch.library.opcheck(ops.route, arguments)
    scores, ids, weights = (t.detach() for t in ops.route(*arguments))
    torch.library.opcheck(ops.balance, (scores.clone().requires_grad_(), ids, 2))
    with torch.no_grad():
        grads = (torch.rand_like(scores), torch.rand_like(weights))
        torch.library.opcheck(ops.route_backward, (*grads, x, weight, scores, ids, 2.5, True))
        torch.library.opcheck(ops.balance_backward, (torch.rand(2, 10), scores))


def test_reference_is_used_when_asked_and_for_float64():
    x, weight = inputs(7, 40, 10, torch.bfloat16)
    expected = op.route_reference(x, weight, bias_of(10), top_k=3)
    with kexaone.impl("reference"):
        assert same_bits(op.route(x, weight, bias_of(10), top_k=3), expected)
    wide = op.route(x.double(), weight.double(), bias_of(10), top_k=3)
    assert wide.scores_TE.dtype == wide.weights_TK.dtype == torch.float64
    found = balance.balance_statistics(wide.scores_TE, wide.ids_TK, sequences=1)
    assert found.shares_BE.dtype == torch.float64


def test_few_tokens_on_a_cpu_launch_no_kernel():
    x = torch.ones(2, 1024)
    assert dispatch.choose(x, work=2 * 1024 * 32) == "triton"
    with patch.object(dispatch._scope, "override", None):
        assert dispatch.choose(x, work=2 * 1024 * 32) == "reference"
        assert dispatch.choose(x, work=64 * 1024 * 32) == dispatch.choose(x) == "triton"
        reason = dispatch.explain(x, work=2 * 1024 * 32).reason
    assert reason == "65536 multiplications on a CPU are less than launching kernels costs"


def test_wrong_arguments_are_refused():
    x, weight, bias = torch.ones(4, 8), torch.ones(6, 8), torch.ones(6)
    with pytest.raises(ValueError, match=r"weight \[E, H\], got \(4, 8\) and \(6, 7\)"):
        op.route(x, weight[:, :7], bias, top_k=1)
    with pytest.raises(ValueError, match=r"bias must be \[6\], got \(5,\)"):
        op.route(x, weight, bias[:5], top_k=1)
    for top_k in (0, 7):
        with pytest.raises(ValueError, match=f"top_k must be from 1 to 6, got {top_k}"):
            op.route(x, weight, bias, top_k=top_k)
    with pytest.raises(ValueError, match="top_k must be from 1 to 16, got 17"):
        op.route(x, torch.ones(32, 8), torch.ones(32), top_k=17)
    with pytest.raises(ValueError, match="4 tokens are not 3 sequences of one length"):
        balance.balance_statistics(torch.ones(4, 6), torch.ones(4, 1).long(), sequences=3)
    with pytest.raises(ValueError, match="ids of 3 tokens, scores of 4"):
        balance.balance_statistics(torch.ones(4, 6), torch.ones(3, 1).long(), sequences=2)
