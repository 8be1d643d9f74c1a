"""Float8 products (linear, grouped, experts) against float64, and against each other."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import fp8_tiles
from kexaone.kernels import linear_fp8 as op
from kexaone.kernels.experts_fp8 import moe_experts_fp8, moe_experts_fp8_reference
from kexaone.kernels.grouped_gemm_fp8 import (
    grouped_gemm_fp8,
    grouped_gemm_fp8_reference,
    widen_rows_reference,
)
from kexaone.kernels.grouping import group_by_expert_reference
from kexaone.kernels.linear_skinny import linear_skinny, linear_skinny_reference
from kexaone.kernels.quantize import QuantizedRows, quantize_fp8, quantize_reference
from kexaone.model.fp8 import quantize

from .contract import assert_close, check_compiled, laid_out, normal, same_bits, seeds

dtypes = st.sampled_from([torch.bfloat16, torch.float32])
row_counts = st.sampled_from([0, 1, 3, 16, 33])
# one block and less, odd blocks, whole ones
widths = st.sampled_from([24, 129, 256])
layouts = st.sampled_from(["contiguous", "row strided"])


def blocks(*shape, seed=0) -> QuantizedRows:
    """float8 weights with 128 x 128 scales of very different sizes."""
    weight = normal(*shape, seed=seed) * normal(*shape[:-1], 1, seed=seed + 1).exp()
    found = quantize(weight / shape[-1] ** 0.5)
    return QuantizedRows(found.values, found.scale)


def meets(ours, naive, exact, size=None):
    """The contract over all and per row; a short sum is granted the rounding of the widening.

    `size` is the sum of absolute values: a sum of few terms may be exact by luck, and is granted
    one float32 rounding of theirs.
    """
    error = torch.maximum((naive.double() - exact).abs(), exact.abs() * 2**-24)
    if size is not None:
        error = torch.maximum(error, size * 2**-23)
    assert ours.dtype == naive.dtype
    assert_close(ours, error, exact, 0)


@given(rows=row_counts, n=widths, k=widths, dtype=dtypes, seed=seeds, layout=layouts,
       power_of_two=st.booleans())  # fmt: skip
def test_linear_meets_the_contract(rows, n, k, dtype, seed, layout, power_of_two):
    x, w = laid_out(normal(rows, k, seed=seed, dtype=dtype), layout), blocks(n, k, seed=seed)
    ours = op.linear_fp8(x, w.values, w.scales, power_of_two=power_of_two)
    cast = quantize_reference(x, power_of_two=power_of_two)
    naive = grouped_gemm_fp8_reference(cast, w.values[None], w.scales[None],
                                       torch.tensor([0, rows]), dtype=dtype)  # fmt: skip
    exact = op.linear_fp8_reference(x.double(), w.values, w.scales, power_of_two=power_of_two)
    meets(ours, naive, exact)
    # cast in the loads or before them: the same bits
    if rows:
        given_cast = op.linear_fp8(cast, w.values, w.scales, dtype=dtype)
        assert same_bits(ours, given_cast)


@given(rows=row_counts, n=widths, k=widths, dtype=dtypes, seed=seeds, layout=layouts)
def test_skinny_meets_the_contract(rows, n, k, dtype, seed, layout):
    x = laid_out(normal(rows, k, seed=seed, dtype=dtype), layout)
    weight = laid_out((normal(n, k, seed=seed + 1) / k**0.5).to(dtype), layout)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    meets(linear_skinny(x, weight), linear_skinny_reference(x, weight), exact, size)


def routed(tokens, top_k, experts, seed):
    scores = normal(tokens, experts, seed=seed)
    return group_by_expert_reference(scores.argsort(1)[:, :top_k], experts=experts)


@settings(max_examples=12)
@given(tokens=st.sampled_from([0, 1, 40]), n=widths, k=widths, dtype=dtypes, seed=seeds,
       cast=st.booleans(), turned=st.booleans())  # fmt: skip
def test_grouped_meets_the_contract(tokens, n, k, dtype, seed, cast, turned):
    routing, w = routed(tokens, 2, 5, seed), blocks(5, n, k, seed=seed)
    if turned:
        # the other orientation, as the gradient of x needs it
        turned_back = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in
                       (w.values.view(torch.int8), w.scales))  # fmt: skip
        values, scales = turned_back
        w = QuantizedRows(values.view(torch.float8_e4m3fn), scales)
    x = normal(tokens, k, seed=seed, dtype=dtype)
    given_x = quantize_reference(x) if cast else x
    order = {"order": routing.order, "top_k": 2}

    def run(f, x, dtype):
        return f(x, w.values, w.scales, routing.offsets, **order, dtype=dtype)

    wide = widen_rows_reference(given_x, torch.float64) if cast else x.double()
    exact = run(grouped_gemm_fp8_reference, wide, torch.float64)
    naive = run(grouped_gemm_fp8_reference, given_x, dtype)
    positive = w.values.float().abs().to(w.values.dtype)
    size = grouped_gemm_fp8_reference(wide.abs(), positive, w.scales, routing.offsets, **order)
    meets(run(grouped_gemm_fp8, given_x, dtype), naive, exact, size)


@settings(max_examples=8)
@given(tokens=st.sampled_from([0, 1, 30]), width=st.sampled_from([72, 200]), seed=seeds,
       limit=st.sampled_from([0.0, 0.7]))  # fmt: skip
def test_experts_with_wide_activations_meet_the_contract(tokens, width, seed, limit):
    routing, hidden = routed(tokens, 2, 4, seed), 136
    gate_up, down = blocks(4, 2 * width, hidden, seed=seed), blocks(4, hidden, width, seed=seed + 5)
    weights = normal(tokens, 2, seed=seed).sigmoid()
    x = normal(tokens, hidden, seed=seed, dtype=torch.bfloat16)

    def run(f, x, weights):
        return f(x, gate_up, down, weights, routing.offsets, routing.order, limit=limit)

    naive = run(moe_experts_fp8_reference, x, weights)
    exact = run(moe_experts_fp8_reference, x.double(), weights.double())
    meets(run(moe_experts_fp8, x, weights), naive, exact)


@pytest.mark.parametrize("limit", [0.0, 0.7])
@pytest.mark.parametrize("width", [128, 200])
def test_experts_with_float8_activations_equal_the_single_ops(width, limit):
    """The grouped product, SwiGLU, the cast, the second product and the sum, bit for bit."""
    from kexaone.kernels.swiglu import swiglu

    routing = routed(30, 2, 4, 1)
    gate_up, down = blocks(4, 2 * width, 136, seed=1), blocks(4, 136, width, seed=2)
    weights = normal(30, 2).sigmoid()
    x = quantize_fp8(normal(30, 136, dtype=torch.bfloat16))
    z = grouped_gemm_fp8(x, gate_up.values, gate_up.scales, routing.offsets, order=routing.order,
                         top_k=2)  # fmt: skip
    h = quantize_fp8(swiglu(z, limit=limit))
    y = grouped_gemm_fp8(h, down.values, down.scales, routing.offsets)
    y = y.index_select(0, routing.position).view(30, 2, -1).float() * weights.unsqueeze(-1)
    fused = moe_experts_fp8(x, gate_up, down, weights, routing.offsets, routing.order, limit=limit)
    assert same_bits(fused, (y[:, 0] + y[:, 1]).bfloat16())
    reference = moe_experts_fp8_reference(x, gate_up, down, weights, routing.offsets,
                                          routing.order, limit=limit)  # fmt: skip
    # h differs from the reference's by single roundings of z, each worth 1/16 after the cast
    error = (fused.float() - reference.float()).norm() / reference.float().norm()
    assert error < 1 / 16


@triton.jit
def _fnuz_kernel(bits, out):
    at = tl.arange(0, 256)
    tl.store(out + at, fp8_tiles.fnuz_bits(tl.load(bits + at)))


def test_bits_for_instructions_that_take_e4m3fnuz_mean_half():
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    found = torch.empty_like(bits)
    with kexaone.cpu.active():
        _fnuz_kernel[(1,)](bits, found)
    half = bits.view(torch.float8_e4m3fn).float() / 2
    assert same_bits(found.view(torch.float8_e4m3fnuz).float(), half)


def test_twice_the_same_bits():
    x, w = normal(9, 300, dtype=torch.bfloat16), blocks(200, 300)
    assert same_bits(op.linear_fp8(x, w.values, w.scales), op.linear_fp8(x, w.values, w.scales))


def test_offsets_beyond_32_bits():
    """Rows of a weight 2^31 + 16 elements apart; the memory between is never touched."""
    far = 2**31 + 16
    memory = torch.empty(far + 256, dtype=torch.float8_e4m3fn)
    w = blocks(2, 256)
    tall = memory.as_strided((2, 256), (far, 1))
    tall.copy_(w.values)
    x = normal(3, 256, dtype=torch.bfloat16)
    assert same_bits(op.linear_fp8(x, tall, w.scales), op.linear_fp8(x, w.values, w.scales))


# PyTorch cannot compare float8 tensors, with which "test_schema" looks for mutated arguments
UTILS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@torch.no_grad()
def test_opcheck():
    x, w = normal(5, 64), blocks(32, 64)
    ops = torch.ops.kexaone
    torch.library.opcheck(
        ops.linear_fp8, (x, None, w.values, w.scales, x.dtype, False), test_utils=UTILS
    )
    torch.library.opcheck(ops.linear_skinny, (x, normal(32, 64)))
    routing, first, second = routed(5, 2, 3, 0), blocks(3, 64, 64), blocks(3, 64, 32)
    cast = quantize_fp8(x)
    ids = routing.offsets, routing.order
    for values, scales in ((x, None), (cast.values, cast.scales)):
        torch.library.opcheck(
            ops.grouped_gemm_fp8,
            (values, scales, first.values, first.scales, *ids, 2, torch.bfloat16),
            test_utils=UTILS,
        )
        torch.library.opcheck(
            ops.moe_experts_fp8,
            (values, scales, first.values, first.scales, second.values, second.scales,
             normal(5, 2), *ids, 0.5, torch.bfloat16, False),
            test_utils=UTILS,
        )  # fmt: skip


def test_compiled_with_dynamic_shapes():
    w, weight = blocks(32, 64), normal(32, 64)

    def block(x):
        return x + (op.linear_fp8(x, w.values, w.scales) + linear_skinny(x, weight)).sum()

    check_compiled(block, lambda rows: [normal(rows, 64)], sizes=(4, 9, 17))


def test_reference_is_used_when_asked_and_for_float64():
    x, w = normal(4, 64), blocks(32, 64)
    with kexaone.impl("reference"):
        assert same_bits(
            op.linear_fp8(x, w.values, w.scales), op.linear_fp8_reference(x, w.values, w.scales)
        )
    assert op.linear_fp8(x.double(), w.values, w.scales).dtype == torch.float64


def test_wrong_shapes_are_refused():
    x, w = normal(4, 64), blocks(32, 64)
    with pytest.raises(ValueError, match=r"weight must be \[N, 64\], got \[64, 32\]"):
        op.linear_fp8(x, w.values.t(), w.scales)
    with pytest.raises(ValueError, match=r"scales must be float32 \[1, 1\]"):
        op.linear_fp8(x, w.values, w.scales.repeat(2, 1))
    with pytest.raises(ValueError, match=r"weight must be float8_e4m3fn"):
        op.linear_fp8(x, normal(32, 64), w.scales)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 \[N, 64\]"):
        linear_skinny(x, normal(64, 32))
