"""SwiGLU against its float64 reference, packed and separate, and its fused form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import swiglu as op
from kexaone.kernels.elementwise import BLOCKS, Config
from kexaone.kernels.quantize import quantize_fp8, quantize_reference
from kexaone.kernels.tables import use

from .contract import (
    check,
    check_compiled,
    column_counts,
    differentiate,
    dtypes,
    laid_out,
    layouts,
    normal,
    row_counts,
    same_bits,
    seeds,
)

# exact in every dtype, so that the oracle clamps the same elements; both sides of the clamp occur
limits = st.sampled_from([0.0, 0.75, 7.0])


def halves(rows, columns, dtype, layout, seed):
    return [laid_out(normal(rows, columns, seed=seed + i, dtype=dtype), layout) for i in range(2)]


@given(rows=row_counts, columns=column_counts, dtype=dtypes, layout=layouts, seed=seeds,
       limit=limits)  # fmt: skip
def test_separate_halves_meet_the_contract(rows, columns, dtype, layout, seed, limit):
    check(lambda g, u: op.swiglu(g, u, limit=limit),
          lambda g, u: op.swiglu_reference(g, u, limit=limit),
          halves(rows, columns, dtype, layout, seed))  # fmt: skip


@given(rows=row_counts, columns=column_counts, dtype=dtypes, layout=layouts, seed=seeds,
       limit=limits)  # fmt: skip
def test_packed_halves_meet_the_contract(rows, columns, dtype, layout, seed, limit):
    x = laid_out(normal(rows, 2 * columns, seed=seed, dtype=dtype), layout)
    check(lambda x: op.swiglu(x, limit=limit), lambda x: op.swiglu_reference(x, limit=limit), [x])


@given(rows=row_counts, columns=column_counts, dtype=dtypes, seed=seeds,
       block=st.sampled_from(BLOCKS[:3]), height=st.sampled_from([1, 4]))  # fmt: skip
def test_every_tile_gives_the_same_bits(rows, columns, dtype, seed, block, height):
    x = normal(rows, 2 * columns, seed=seed, dtype=dtype)
    usual = differentiate(op.swiglu, [x], seed)
    with use("swiglu", Config(block, height, 4)):
        assert same_bits(differentiate(op.swiglu, [x], seed), usual)
        assert same_bits(op.swiglu_fp8(x), quantize_reference(usual[0][0]))


@given(rows=row_counts, columns=column_counts, dtype=dtypes, layout=layouts, seed=seeds,
       limit=limits, power_of_two=st.booleans())  # fmt: skip
def test_fused_equals_unfused(rows, columns, dtype, layout, seed, limit, power_of_two):
    gate, up = halves(rows, columns, dtype, layout, seed)
    out = op.swiglu(gate, up, limit=limit)
    found = op.swiglu_fp8(gate, up, limit=limit, power_of_two=power_of_two)
    assert same_bits(found, quantize_fp8(out, power_of_two=power_of_two))
    packed = torch.cat([gate, up], -1)
    assert same_bits(op.swiglu(packed, limit=limit), out)
    assert same_bits(op.swiglu_fp8(packed, limit=limit, power_of_two=power_of_two), found)


@given(columns=column_counts, seed=seeds, limit=limits)
def test_rounds_where_the_model_does(columns, seed, limit):
    """In bfloat16 the two roundings leave no room: a float32 error is seldom seen."""
    gate, up = halves(33, columns, torch.bfloat16, "contiguous", seed)
    ours, models = op.swiglu(gate, up, limit=limit), op.swiglu_reference(gate, up, limit=limit)
    assert (ours != models).float().mean() < 1e-3
    # one rounding of silu the other way moves the product by at most two units
    torch.testing.assert_close(ours, models, rtol=2 * 2**-7, atol=0)


def test_views_of_one_projection_are_read_in_place(monkeypatch):
    """Three dimensions, packed, strided: no copy of the input is made."""
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: pytest.fail("copied"))
    wide = normal(3, 5, 600, dtype=torch.bfloat16)
    for x in (wide, wide[1:], wide[:, :, :400], wide.transpose(0, 1)[0]):
        gate, up = x.chunk(2, dim=-1)
        assert op.swiglu(x).data_ptr() != x.data_ptr()
        assert same_bits(op.swiglu(x), op.swiglu(gate, up))
        torch.testing.assert_close(op.swiglu(x), op.swiglu_reference(x))


def test_the_gradient_of_packed_halves_is_packed():
    x = normal(3, 5, 600).requires_grad_()
    (grad,) = torch.autograd.grad(op.swiglu(x).sum(), x)
    assert grad.shape == x.shape and grad.is_contiguous()


def test_infinities_zeros_and_nan():
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([[-1e30, -100.0, -0.0, 0.0, 100.0, 1e30, inf, nan, 1.0, 1.0]])
    up = torch.tensor([[1.0, 1.0, 1.0, inf, 1.0, 1.0, 1.0, 1.0, nan, -inf]])
    for limit in (0.0, 7.0):
        ours = op.swiglu(gate, up, limit=limit)
        expected = op.swiglu_reference(gate, up, limit=limit)
        torch.testing.assert_close(ours, expected, equal_nan=True)
        data = gate[:, :6], up[:, :6]
        _, grads = differentiate(lambda g, u, n=limit: op.swiglu(g, u, limit=n), data, 0)
        _, wanted = differentiate(lambda g, u, n=limit: op.swiglu_reference(g, u, limit=n), data, 0)
        for ours, expected in zip(grads, wanted, strict=True):
            torch.testing.assert_close(ours, expected, equal_nan=True)


def test_twice_the_same_bits():
    data = halves(100, 300, torch.bfloat16, "contiguous", 3)
    assert same_bits(*(differentiate(op.swiglu, data, 0) for _ in range(2)))


def test_row_offsets_beyond_32_bits():
    """Two rows 2^31 + 16 elements apart: the memory between them is never touched."""
    stride = 2**31 + 16
    x = torch.empty(stride + 256, dtype=torch.bfloat16).as_strided((2, 256), (stride, 1))
    x.copy_(normal(2, 256))
    assert same_bits(differentiate(op.swiglu, [x], 0),
                     differentiate(op.swiglu, [x.contiguous()], 0))  # fmt: skip
    assert same_bits(op.swiglu_fp8(x), op.swiglu_fp8(x.contiguous()))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    gate, up = halves(5, 40, torch.float32, "row strided", 0)
    gate, up = gate.requires_grad_(), None if packed else up.requires_grad_()
    torch.library.opcheck(torch.ops.kexaone.swiglu, (gate, up, 0.5))
    with torch.no_grad():
        grad = normal(5, 20 if packed else 40)
        torch.library.opcheck(torch.ops.kexaone.swiglu_backward, (grad, gate, up, 0.5))
        torch.library.opcheck(torch.ops.kexaone.swiglu_fp8, (gate, up, 0.5, True))


def test_compiled_with_dynamic_shapes():
    """One graph, forward and backward, no break, no recompilation when the length changes."""

    def block(x, up):
        return op.swiglu(op.swiglu(x), up, limit=2.0)

    check_compiled(
        block, lambda rows: [normal(rows, 80, seed=1), normal(rows, 40, seed=2)], sizes=(4, 9, 17)
    )


def test_reference_is_used_when_asked_and_for_float64():
    gate, up = halves(4, 64, torch.bfloat16, "contiguous", 0)
    with kexaone.impl("reference"):
        assert same_bits(op.swiglu(gate, up), op.swiglu_reference(gate, up))
        assert same_bits(op.swiglu_fp8(gate, up), quantize_reference(op.swiglu(gate, up)))
    assert op.swiglu(gate.double(), up.double()).dtype == torch.float64


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"without up, gate must be \[..., 2N\], got \(2, 7\)"):
        op.swiglu(torch.ones(2, 7))
    for up in (torch.ones(1, 64), torch.ones(2, 64).half()):
        with pytest.raises(ValueError, match="up must have the shape and dtype of gate"):
            op.swiglu(torch.ones(2, 64), up)
