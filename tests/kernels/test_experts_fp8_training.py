"""The float8 training layer: casts bit for bit, products per expert, and the whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import expert_tiles, swiglu
from kexaone.kernels import expert_weights_fp8 as weights_op
from kexaone.kernels import experts_fp8_training as op
from kexaone.kernels.experts import moe_experts_reference
from kexaone.kernels.experts_fp8 import moe_experts_fp8
from kexaone.kernels.grouped_gemm_fp8 import grouped_gemm_fp8, grouped_gemm_fp8_reference
from kexaone.kernels.grouping import group_by_expert_reference
from kexaone.kernels.quantize import QuantizedRows, quantize_fp8
from kexaone.kernels.quantize_groups import (
    QuantizedGroups,
    quantize_fp8_groups,
    quantize_groups_reference,
)
from kexaone.kernels.quantize_tiles import quantize_fp8_blocks
from kexaone.kernels.tables import use

from .contract import (
    assert_close,
    check_compiled,
    differentiate,
    laid_out,
    layouts,
    normal,
    same_bits,
    seeds,
)

dtypes = st.sampled_from([torch.bfloat16, torch.float32])
# rows of each expert: none at all, empty ones, one row, exactly a block, just over one
counts = st.sampled_from([
    (0, 0), (1,), (0, 5, 0, 1), (33, 0, 2), (0, 0, 128), (129, 0, 3), (1,) * 11, (300, 7),
])  # fmt: skip
widths = st.sampled_from([1, 33, 160])
# PyTorch cannot compare float8 tensors, with which "test_schema" looks for mutated arguments
UTILS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def offsets_of(rows):
    return torch.tensor([0, *rows]).cumsum(0).int()


@given(rows=counts, columns=widths, dtype=dtypes, layout=layouts, seed=seeds,
       power_of_two=st.booleans())  # fmt: skip
def test_casts_are_bit_exact(rows, columns, dtype, layout, seed, power_of_two):
    offsets = offsets_of(rows)
    x = laid_out(normal(sum(rows), columns, seed=seed, dtype=dtype), layout)
    found, expected = (
        f(x, offsets, power_of_two=power_of_two)
        for f in (quantize_fp8_groups, quantize_groups_reference)
    )
    assert same_bits(found, expected)


def routed(tokens, top_k, experts, seed, favourite=0.0):
    """A grouping; with a large `favourite` every token chooses the first experts."""
    scores = normal(tokens, experts, seed=seed) - favourite * torch.arange(experts)
    ids = scores.argsort(1, descending=True)[:, :top_k]
    return group_by_expert_reference(ids, experts=experts)


@given(tokens=st.sampled_from([0, 1, 150]), seed=seeds, favourite=st.sampled_from([0.0, 99.0]))
def test_rows_gathered_in_the_loads(tokens, seed, favourite):
    routing = routed(tokens, 2, 5, seed, favourite)
    x = normal(tokens, 40, seed=seed, dtype=torch.bfloat16)
    gathered = x.index_select(0, routing.order // 2)
    found = quantize_fp8_groups(x, routing.offsets, order=routing.order, top_k=2)
    apart = quantize_fp8_groups(gathered, routing.offsets)
    assert same_bits(found, apart)


@given(rows=counts, n=widths, k=widths, dtype=dtypes, seed=seeds,
       block=st.sampled_from([None, 32]))  # fmt: skip
def test_weight_gradient_meets_the_contract(rows, n, k, dtype, seed, block):
    """Per expert, which is the first dimension; an expert without rows gets zeros."""
    offsets = offsets_of(rows)
    grad, x = (
        quantize_fp8_groups(normal(sum(rows), c, seed=seed + c) * normal(c).exp(), offsets)
        for c in (n, k)
    )
    config = block and expert_tiles.Config(block, block, block, 128, 1, 4, 2)
    with use("grouped_gemm_fp8_weight", config):
        ours = weights_op.weight_gradient_fp8(grad, x, offsets, dtype=dtype)
    naive, exact = (
        weights_op.weight_gradient_fp8_reference(grad, x, offsets, dtype=t)
        for t in (dtype, torch.float64)
    )
    sizes = [
        QuantizedGroups(g.values.float().abs().to(g.values.dtype), g.scales) for g in (grad, x)
    ]
    size = weights_op.weight_gradient_fp8_reference(*sizes, offsets, dtype=torch.float64)
    # a short sum may be exact by luck: grant one rounding of the value, and one of the terms
    error = torch.maximum((naive.double() - exact).abs(), size * 2**-23)
    error = torch.maximum(error, exact.abs() * torch.finfo(dtype).eps / 2)
    assert ours.dtype == dtype
    assert_close(ours, error, exact, 0)
    for e, count in enumerate(rows):
        assert count or not ours[e].any()


def inputs(tokens, top_k, hidden, width, seed, experts=5, dtype=torch.bfloat16):
    """x, gate_up, down and weights, scaled so that no layer's output grows."""
    return [
        normal(tokens, hidden, seed=seed, dtype=dtype),
        (normal(experts, 2 * width, hidden, seed=seed + 1) / hidden**0.5).to(dtype),
        (normal(experts, hidden, width, seed=seed + 2) / width**0.5).to(dtype),
        normal(tokens, top_k, seed=seed + 3).sigmoid() + 0.1,
    ]


def bound(function, routing, **options):
    return lambda *data: function(*data, routing.offsets, routing.order, **options)


@settings(max_examples=8)
@given(tokens=st.sampled_from([1, 2, 40]), width=st.sampled_from([72, 200]), seed=seeds,
       dtype=dtypes, favourite=st.sampled_from([0.0, 99.0]))  # fmt: skip
def test_gradient_of_the_activation_meets_the_contract(tokens, width, seed, dtype, favourite):
    """dz, weights * h and dweights from the same casts and the same z, per expert."""
    hidden, routing = 136, routed(tokens, 2, 5, seed, favourite)
    _, _, down, weights = inputs(tokens, 2, hidden, width, seed, dtype=dtype)
    grad = normal(tokens, hidden, seed=seed, dtype=dtype)
    z = normal(2 * tokens, 2 * width, seed=seed + 7, dtype=dtype)
    ids = routing.offsets, routing.order
    ours = op._gated_backward(grad, down, weights, *ids, z, 0.0, False)
    cast, turned = quantize_fp8(grad), quantize_fp8_blocks(down, transposed=True)

    def plain(dtype):
        wide = torch.promote_types(dtype, torch.float32)
        dh = grouped_gemm_fp8_reference(cast, turned.values, turned.scales, routing.offsets,
                                        order=routing.order, top_k=2, dtype=wide)  # fmt: skip
        leaf, weight = z.to(dtype).requires_grad_(), weights.flatten()[routing.order, None]
        h = swiglu.swiglu_reference(leaf)
        (dz,) = torch.autograd.grad(h, leaf, (dh * weight).to(dtype))
        share = (dh * h.detach()).sum(1)
        d_weights = torch.empty_like(share).index_copy_(0, routing.order.long(), share)
        return dz, (h * weight).detach().to(dtype), d_weights.view(weights.shape)

    naive, exact = plain(dtype), plain(torch.float64)
    for mine, other, oracle, own in zip(ours, naive, exact, (dtype, dtype, torch.float32),
                                        strict=True):  # fmt: skip
        error = torch.maximum((other.double() - oracle).abs(), oracle.abs() * torch.finfo(own).eps)
        assert mine.dtype == own
        assert_close(mine, error, oracle, None)
        if own == dtype and len(mine) == 2 * tokens:
            for start, end in routing.offsets.unfold(0, 2, 1).tolist():
                assert_close(mine[start:end], error[start:end], oracle[start:end], None)


@pytest.mark.parametrize("limit", [0.0, 0.7])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_layer_equals_the_single_ops(limit, power_of_two):
    """Output and gradients: casts, products and sums, one op each, bit for bit."""
    two = {"power_of_two": power_of_two}
    routing = routed(60, 2, 5, 1)
    x, gate_up, down, weights = inputs(60, 2, 136, 200, 1)
    layer = bound(op.moe_experts_fp8_training, routing, limit=limit, **two)
    (out,), grads = differentiate(layer, [x, gate_up, down, weights], 3)
    first, second = (quantize_fp8_blocks(w, **two) for w in (gate_up, down))
    pair = (QuantizedRows(w.values, w.scales) for w in (first, second))
    cast = quantize_fp8(x, **two)
    inference = moe_experts_fp8(cast, *pair, weights, routing.offsets, routing.order, limit=limit,
                                **two)  # fmt: skip
    assert same_bits(out, inference)
    z = grouped_gemm_fp8(cast, first.values, first.scales, routing.offsets, order=routing.order,
                         top_k=2)  # fmt: skip
    grad = normal(60, 136, seed=3).bfloat16()
    dz, scaled, d_weights = op._gated_backward(
        grad, down, weights, routing.offsets, routing.order, z, limit, power_of_two
    )
    turned = quantize_fp8_blocks(gate_up, transposed=True, **two)
    by_row = grouped_gemm_fp8(quantize_fp8(dz, **two), turned.values, turned.scales,
                              routing.offsets)  # fmt: skip
    by_token = by_row.index_select(0, routing.position).view(60, 2, -1).float()
    slots = {"order": routing.order, "top_k": 2, **two}
    products = [
        weights_op.weight_gradient_fp8(*pair, routing.offsets)
        for pair in (
            (quantize_fp8_groups(dz, routing.offsets, **two),
             quantize_fp8_groups(x, routing.offsets, **slots)),
            (quantize_fp8_groups(grad, routing.offsets, **slots),
             quantize_fp8_groups(scaled, routing.offsets, **two)),
        )
    ]  # fmt: skip
    d_x = (by_token[:, 0] + by_token[:, 1]).bfloat16()
    assert same_bits(grads, [d_x, *products, d_weights])


@pytest.mark.parametrize("favourite", [0.0, 99.0])
@pytest.mark.parametrize("limit", [0.0, 2.0])
def test_layer_is_near_the_unrounded_one(favourite, limit):
    """Against float64 without any cast, over all and per expert.

    A cast to e4m3 is off by at most 2^-4 relative, so by at most 2^-4 / sqrt(3) in the mean square.
    Errors of different casts are independent. The longest way, to the gradient of gate_up, leads
    through four products of two casts each (z, dh, dz, itself), and SwiGLU's slope is below 1.1.
    """
    routing = routed(200, 2, 5, 4, favourite)
    data = inputs(200, 2, 256, 128, 4)
    ours = differentiate(bound(op.moe_experts_fp8_training, routing, limit=limit), data, 5)
    exact = differentiate(bound(moe_experts_reference, routing, limit=limit),
                          [t.double() for t in data], 5)  # fmt: skip
    most = 1.1 * math.sqrt(8) * 2**-4 / math.sqrt(3)
    for mine, oracle in zip([*ours[0], *ours[1]], [*exact[0], *exact[1]], strict=True):
        assert (mine - oracle).norm() <= most * oracle.norm()
        if mine.dim() == 3:
            for one, other in zip(mine, oracle, strict=True):
                assert (one - other).norm() <= most * other.norm()


def test_reference_agrees_and_is_used_when_asked_and_for_float64():
    routing, data = routed(50, 2, 5, 8), inputs(50, 2, 136, 72, 8)
    layer = bound(op.moe_experts_fp8_training, routing, limit=0.7)
    plain = bound(op.moe_experts_fp8_training_reference, routing, limit=0.7)
    with kexaone.impl("reference"):
        found = differentiate(layer, data, 0)
    assert same_bits(found, differentiate(plain, data, 0))
    for mine, other in zip(*([*p[0], *p[1]] for p in (differentiate(layer, data, 0), found)),
                           strict=True):  # fmt: skip
        # h, dz and w h differ by single roundings to bfloat16, each worth 1/16 after the cast
        assert (mine - other).norm() <= other.norm() / 16
    assert layer(*(t.double() for t in data)).dtype == torch.float64


def test_no_tokens():
    routing, data = routed(0, 2, 5, 0), inputs(0, 2, 64, 32, 0)
    (out,), grads = differentiate(bound(op.moe_experts_fp8_training, routing), data, 0)
    assert out.shape == (0, 64) and not grads[1].any() and not grads[2].any()


def test_twice_the_same_bits():
    routing, data = routed(60, 3, 5, 4), inputs(60, 3, 96, 80, 4)
    layer = bound(op.moe_experts_fp8_training, routing)
    assert same_bits(differentiate(layer, data, 0), differentiate(layer, data, 0))


def test_row_offsets_beyond_32_bits():
    """Two rows 2^31 + 16 elements apart: the memory between them is never touched."""
    stride, offsets = 2**31 + 16, offsets_of((1, 1))
    x = torch.empty(stride + 128, dtype=torch.bfloat16).as_strided((2, 128), (stride, 1))
    x.copy_(normal(2, 128))
    found, expected = (quantize_fp8_groups(t, offsets) for t in (x, x.contiguous()))
    assert same_bits(found, expected)


def test_opcheck():
    routing, data = routed(5, 2, 5, 6), inputs(5, 2, 32, 16, 6)
    ids, ops = (routing.offsets, routing.order), torch.ops.kexaone
    leaves = [t.requires_grad_() for t in data]
    torch.library.opcheck(ops.moe_experts_fp8_training, (*leaves, *ids, 0.5, False))
    with torch.no_grad():
        grad, z = normal(5, 32).bfloat16(), normal(10, 32).bfloat16()
        torch.library.opcheck(
            ops.moe_experts_fp8_training_backward, (grad, *data, *ids, z, 0.5, True)
        )
        torch.library.opcheck(ops.quantize_fp8_groups, (data[0], *ids, 2, False), test_utils=UTILS)
        cast = quantize_groups_reference(z, routing.offsets)
        torch.library.opcheck(
            ops.grouped_gemm_fp8_weight,
            (cast.values, cast.scales, cast.values, cast.scales, routing.offsets, torch.bfloat16),
            test_utils=UTILS,
        )


def test_compiled_with_dynamic_shapes():
    def data(tokens):
        routing = routed(tokens, 2, 5, tokens)
        return *inputs(tokens, 2, 48, 32, 7), routing.offsets, routing.order

    check_compiled(lambda *t: op.moe_experts_fp8_training(*t, limit=0.5).relu(), data,
                   sizes=(4, 9, 17))  # fmt: skip


def test_wrong_shapes_are_refused():
    routing, data = routed(4, 2, 5, 9), inputs(4, 2, 48, 32, 9)
    layer = bound(op.moe_experts_fp8_training, routing)
    with pytest.raises(ValueError, match=r"down must be torch.bfloat16 \[5, 48, 32\]"):
        layer(data[0], data[1], data[2].transpose(1, 2), data[3])
    with pytest.raises(ValueError, match=r"offsets must be int32 \[E \+ 1\]"):
        quantize_fp8_groups(data[0], routing.offsets.long())
    cast = quantize_fp8_groups(data[0], offsets_of((4,)))
    other = quantize_fp8_groups(data[0], offsets_of((2, 2)))
    with pytest.raises(ValueError, match=r"values must be \[columns, 128\]"):
        weights_op.weight_gradient_fp8(other, cast, offsets_of((4,)))
