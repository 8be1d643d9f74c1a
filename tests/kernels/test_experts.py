"""The experts' layer against float64 per expert, and its fused kernels against the single ops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import expert_tiles
from kexaone.kernels import experts as op
from kexaone.kernels.grouped_gemm import grouped_gemm
from kexaone.kernels.grouping import Permutation, group_by_expert_reference
from kexaone.kernels.swiglu import swiglu
from kexaone.kernels.tables import use

from .contract import (
    assert_close,
    check,
    check_compiled,
    differentiate,
    neighbour,
    normal,
    same_bits,
    seeds,
)

EXPERTS = 6
dtypes = st.sampled_from([torch.bfloat16, torch.float32])
limits = st.sampled_from([0.0, 0.5])


def routed(tokens, top_k, seed, favourite=0.0) -> Permutation:
    """A grouping; with a large `favourite` every token chooses the first experts."""
    scores = normal(tokens, EXPERTS, seed=seed) - favourite * torch.arange(EXPERTS)
    ids = scores.argsort(1, descending=True)[:, :top_k]
    return group_by_expert_reference(ids, experts=EXPERTS)


def inputs(tokens, top_k, hidden, width, dtype, seed):
    """x, gate_up, down and weights, scaled so that no layer's output grows."""
    return [
        normal(tokens, hidden, seed=seed, dtype=dtype),
        (normal(EXPERTS, 2 * width, hidden, seed=seed + 1) / hidden**0.5).to(dtype),
        (normal(EXPERTS, hidden, width, seed=seed + 2) / width**0.5).to(dtype),
        normal(tokens, top_k, seed=seed + 3).sigmoid() + 0.1,
    ]


def bound(function, routing, limit):
    return lambda *data: function(*data, routing.offsets, routing.order, limit=limit)


def check_layer(routing, data, limit, seed=0):
    """The contract per token and per expert; a token's K weights are too few to be a slice.

    The naive error is the largest over inputs one rounding apart, as in `check`.
    """
    ours, plain = (bound(f, routing, limit) for f in (op.moe_experts, op.moe_experts_reference))
    check(ours, plain, data, by=None, seed=seed)

    def run(layer, inputs):
        return [t for part in differentiate(layer, inputs, seed) for t in part]

    exact = run(plain, [t.double() for t in data])
    errors = [torch.zeros_like(t) for t in exact]
    for k in range(4):
        near = [neighbour(t, 9 * k + i) for i, t in enumerate(data)] if k else data
        pairs = zip(errors, run(plain, near), run(plain, [t.double() for t in near]), strict=True)
        errors = [torch.maximum(e, (n.double() - x).abs()) for e, n, x in pairs]
    for mine, error, oracle in list(zip(run(ours, data), errors, exact, strict=True))[:-1]:
        assert_close(mine, error, oracle, 0)


@settings(max_examples=10)
@given(tokens=st.sampled_from([0, 1, 2, 50]), top_k=st.sampled_from([1, 3]),
       hidden=st.sampled_from([33, 160]), width=st.sampled_from([17, 96]), dtype=dtypes, seed=seeds,
       limit=limits, favourite=st.sampled_from([0.0, 100.0]))  # fmt: skip
def test_layer_meets_the_contract(tokens, top_k, hidden, width, dtype, seed, limit, favourite):
    # the clamp's derivative jumps: in bfloat16 one element rounded to the limit decides the error
    limit = limit if dtype == torch.float32 else 0.0
    routing = routed(tokens, top_k, seed, favourite)
    check_layer(routing, inputs(tokens, top_k, hidden, width, dtype, seed), limit, seed)


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_fused_equals_unfused(limit):
    """Values: the grouped products, SwiGLU and the weighted sum, one op each, bit for bit."""
    routing = routed(40, 3, 1)
    x, gate_up, down, weights = inputs(40, 3, 96, 80, torch.bfloat16, 1)
    z = grouped_gemm(x, gate_up, routing.offsets, order=routing.order, top_k=3)
    y = grouped_gemm(swiglu(z, limit=limit), down, routing.offsets)
    by_token = y.index_select(0, routing.position).view(40, 3, -1).float()
    total = torch.zeros(40, 96)
    for k in range(3):
        total += by_token[:, k] * weights[:, k, None]
    fused = bound(op.moe_experts, routing, limit)
    assert same_bits(fused(x, gate_up, down, weights), total.bfloat16())
    # what is kept for training must not change the values
    assert same_bits(fused(x.requires_grad_(), gate_up, down, weights), total.bfloat16())


def test_other_tiles():
    """The GPU's kind of tiles: never halved, in groups that share weights."""
    routing, data = routed(50, 3, 2), inputs(50, 3, 96, 80, torch.float32, 2)
    config = expert_tiles.Config(16, 16, 32, 16, 8, 4, 2)
    with use("grouped_gemm_gated", config), use("grouped_gemm_gated_backward", config):
        check_layer(routing, data, 0.0)


def test_layouts():
    """Weights stored the other way round, and rows of x and weights that are not dense."""
    routing, data = routed(9, 2, 3), inputs(9, 2, 48, 32, torch.float32, 3)
    other = [normal(9, 99)[:, ::2][:, :48].copy_(data[0]),
             *(w.transpose(1, 2).contiguous().transpose(1, 2) for w in data[1:3]),
             data[3].t().contiguous().t()]  # fmt: skip
    layer = bound(op.moe_experts, routing, 0.0)
    for mine, expected in zip(differentiate(layer, other, 0), differentiate(layer, data, 0),
                              strict=True):  # fmt: skip
        torch.testing.assert_close(mine, expected)


def test_twice_the_same_bits():
    routing, data = routed(60, 3, 4), inputs(60, 3, 96, 80, torch.bfloat16, 4)
    layer = bound(op.moe_experts, routing, 0.0)
    assert same_bits(differentiate(layer, data, 0), differentiate(layer, data, 0))


def test_frozen_weights_cost_no_gradient():
    routing, data = routed(9, 2, 5), inputs(9, 2, 48, 32, torch.float32, 5)
    layer = bound(op.moe_experts, routing, 0.0)
    all_of_them = differentiate(layer, data, 0)[1]
    only_x = differentiate(lambda x: layer(x, *data[1:]), data[:1], 0)[1]
    assert same_bits(only_x[0], all_of_them[0])


def test_opcheck():
    routing, data = routed(5, 2, 6), inputs(5, 2, 32, 16, torch.float32, 6)
    ids = routing.offsets, routing.order
    leaves = [t.requires_grad_() for t in data]
    torch.library.opcheck(torch.ops.kexaone.moe_experts, (*leaves, *ids, 0.5, True))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.kexaone.moe_experts, (*data, *ids, 0.0, False))
        for wanted in ([True, True, True], [True, False, False]):
            torch.library.opcheck(
                torch.ops.kexaone.moe_experts_backward,
                (normal(5, 32), *data, *ids, normal(10, 32), 0.5, wanted),
            )


def test_compiled_with_dynamic_shapes():
    def data(tokens):
        routing = routed(tokens, 2, tokens)
        return *inputs(tokens, 2, 48, 32, torch.float32, 7), routing.offsets, routing.order

    check_compiled(lambda *t: op.moe_experts(*t, limit=0.5).relu(), data, sizes=(4, 9, 17))


def test_reference_is_used_when_asked_and_for_float64():
    routing, data = routed(4, 2, 8), inputs(4, 2, 48, 32, torch.float32, 8)
    layer, plain = (bound(f, routing, 0.0) for f in (op.moe_experts, op.moe_experts_reference))
    with kexaone.impl("reference"):
        assert same_bits(layer(*data), plain(*data))
    assert layer(*(t.double() for t in data)).dtype == torch.float64


def test_wrong_shapes_are_refused():
    routing, data = routed(4, 2, 9), inputs(4, 2, 48, 32, torch.float32, 9)
    layer = bound(op.moe_experts, routing, 0.0)
    with pytest.raises(ValueError, match=r"down must be torch.float32 \[6, 48, 32\]"):
        layer(data[0], data[1], data[2].transpose(1, 2), data[3])
    with pytest.raises(ValueError, match=r"weights must be \[T, K\] for 4 tokens and 8 rows"):
        layer(*data[:3], data[3][:, :1])
