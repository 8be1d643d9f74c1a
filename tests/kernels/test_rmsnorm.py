"""RMSNorm against its float64 reference, and its fused forms against the unfused ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import rmsnorm as op
from kexaone.kernels.quantize import quantize_reference
from kexaone.kernels.rmsnorm_fp8 import add_rms_norm_fp8, rms_norm_fp8
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


def inputs(rows, columns, dtype, layout, seed, count=2):
    tensors = [laid_out(normal(rows, columns, seed=seed + i, dtype=dtype), layout)
               for i in range(count - 1)]  # fmt: skip
    return [*tensors, normal(columns, seed=seed + 9, dtype=dtype)]


def sliced(columns):
    """Whether rows are judged one by one.

    The gradient is what is left of a row's gradient after its part along the row is taken off. Of a
    few numbers next to nothing may be left, and that is rounding error in any computation.
    """
    return 0 if columns >= 64 else None


def add_reference(x, residual, weight):
    total = x + residual
    return op.rms_norm_reference(total, weight, eps=1e-5), total


@given(rows=row_counts, columns=column_counts, dtype=dtypes, layout=layouts, seed=seeds)
def test_norm_meets_the_contract(rows, columns, dtype, layout, seed):
    x, weight = inputs(rows, columns, dtype, layout, seed)
    check(op.rms_norm, lambda x, w: op.rms_norm_reference(x, w, eps=1e-5), [x, weight],
          by=sliced(columns))  # fmt: skip


@given(rows=row_counts, columns=column_counts, dtype=dtypes, layout=layouts, seed=seeds)
def test_norm_of_a_sum_meets_the_contract(rows, columns, dtype, layout, seed):
    check(op.add_rms_norm, add_reference, inputs(rows, columns, dtype, layout, seed, count=3),
          by=sliced(columns))  # fmt: skip


@given(columns=column_counts, rows=row_counts, dtype=dtypes, seed=seeds)
def test_rows_in_pieces(columns, rows, dtype, seed):
    """Rows too wide for registers are walked; here every row of more than 128 columns is."""
    with use("rms_norm", op.Config(block=128, rows=1, programs=3, num_warps=4)):
        check(op.add_rms_norm, add_reference, inputs(rows, columns, dtype, "contiguous", seed, 3),
              by=sliced(columns))  # fmt: skip


@given(columns=column_counts, rows=row_counts, dtype=dtypes, seed=seeds)
def test_several_rows_per_program(columns, rows, dtype, seed):
    with use("rms_norm", op.Config(block=512, rows=4, programs=3, num_warps=4)):
        check(op.add_rms_norm, add_reference, inputs(rows, columns, dtype, "contiguous", seed, 3),
              by=sliced(columns))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_widest_rows(dtype):
    """65536 columns, the widest that the issue of spilling registers is known for."""
    check(op.add_rms_norm, add_reference, inputs(3, 65536, dtype, "contiguous", 0, 3))


@given(rows=row_counts, columns=column_counts, dtype=dtypes, seed=seeds,
       power_of_two=st.booleans(), block=st.sampled_from([None, 128]))  # fmt: skip
def test_fused_equals_unfused(rows, columns, dtype, seed, power_of_two, block):
    x, residual, weight = inputs(rows, columns, dtype, "contiguous", seed, 3)
    config = op.Config(block, 1, 4, 4) if block else None
    with use("rms_norm", config):
        total = x + residual
        summed = op.add_rms_norm(x, residual, weight)
        normed = op.rms_norm(total, weight)
        assert same_bits(summed, [normed, total])
        quantized = quantize_reference(normed, power_of_two=power_of_two)
        fused = add_rms_norm_fp8(x, residual, weight, power_of_two=power_of_two)
        assert same_bits(fused, [quantized, total])
        assert same_bits(rms_norm_fp8(total, weight, power_of_two=power_of_two), quantized)


def test_twice_the_same_bits():
    data = inputs(100, 300, torch.bfloat16, "contiguous", 3, 3)
    assert same_bits(*(differentiate(op.add_rms_norm, data, 0) for _ in range(2)))


def test_row_offsets_beyond_32_bits():
    """Two rows 2^31 + 16 elements apart: the memory between them is never touched."""
    stride = 2**31 + 16
    x = torch.empty(stride + 128, dtype=torch.bfloat16).as_strided((2, 128), (stride, 1))
    x.copy_(normal(2, 128))
    weight = normal(128, seed=1, dtype=torch.bfloat16)
    check(op.rms_norm, lambda x, w: op.rms_norm_reference(x, w, eps=1e-5), [x, weight])
    assert same_bits(op.rms_norm(x, weight), op.rms_norm(x.contiguous(), weight))


def test_one_column():
    """The gradient of x / |x| is zero but for eps, so only values can be compared."""
    x, weight = inputs(7, 1, torch.bfloat16, "contiguous", 0)
    check(op.rms_norm, lambda x, w: op.rms_norm_reference(x, w, eps=1e-5), [x, weight],
          gradients=False)  # fmt: skip


def test_a_zero_row_and_a_huge_row():
    x = torch.zeros(3, 64)
    x[1] = 1e18
    out = op.rms_norm(x, torch.ones(64))
    assert (out[0] == 0).all() and (out[2] == 0).all()
    torch.testing.assert_close(out[1], torch.ones(64))


@pytest.mark.parametrize("fused", [False, True])
def test_opcheck(fused):
    x, residual, weight = (t.requires_grad_() for t in inputs(5, 40, torch.float32, "row strided",
                                                              0, 3))  # fmt: skip
    if fused:
        torch.library.opcheck(torch.ops.kexaone.add_rms_norm, (x, residual, weight, 1e-5))
    else:
        torch.library.opcheck(torch.ops.kexaone.rms_norm, (x, weight, 1e-5))
    with torch.no_grad():
        grad, rstd = normal(5, 40), torch.rand(5)
        torch.library.opcheck(torch.ops.kexaone.rms_norm_backward, (grad, None, x, weight, rstd))
        other = residual if fused else None
        torch.library.opcheck(torch.ops.kexaone.rms_norm_fp8, (x, other, weight, 1e-5, False))


def test_compiled_with_dynamic_shapes():
    """One graph, forward and backward, no break, no recompilation when the length changes."""

    def block(x, residual, weight):
        out = op.add_rms_norm(x, residual, weight)
        return op.rms_norm(out.total, weight) + out.normed

    check_compiled(
        block, lambda rows: inputs(rows, 64, torch.float32, "contiguous", rows, 3), sizes=(4, 9, 17)
    )


def test_reference_is_used_when_asked_and_for_float64():
    x, weight = inputs(4, 64, torch.bfloat16, "contiguous", 0)
    with kexaone.impl("reference"):
        assert same_bits(op.rms_norm(x, weight), op.rms_norm_reference(x, weight, eps=1e-5))
    assert op.rms_norm(x.double(), weight.double()).dtype == torch.float64


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"weight must be \[64\], got \(32,\)"):
        op.rms_norm(torch.ones(2, 64), torch.ones(32))
    with pytest.raises(ValueError, match="residual must have the shape and dtype of x"):
        op.add_rms_norm(torch.ones(2, 64), torch.ones(1, 64), torch.ones(64))
