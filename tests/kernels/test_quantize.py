"""Float8 casts: the references against a plain loop, the kernels against the references' bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kexaone
from kexaone.kernels.dequantize import dequantize_fp8, dequantize_reference
from kexaone.kernels.elementwise import BLOCKS, Config
from kexaone.kernels.quantize import quantize_fp8, quantize_reference
from kexaone.kernels.quantize_tiles import (
    quantize_blocks_reference,
    quantize_fp8_blocks,
    quantize_fp8_both,
    quantize_fp8_transposed,
)
from kexaone.kernels.tables import use

from .contract import (
    check_compiled,
    column_counts,
    dtypes,
    laid_out,
    layouts,
    normal,
    row_counts,
    same_bits,
    seeds,
)

heights = st.sampled_from([0, 1, 7, 127, 128, 129, 300])
FP8 = torch.float8_e4m3fn


def awkward(*shape, dtype, seed):
    """Values over forty powers of two, with zero blocks, subnormals, infinities and NaN."""
    x = normal(*shape, seed=seed) * torch.exp2(20 * normal(*shape[:-1], 1, seed=seed + 1))
    kind = torch.randint(0, 400, shape, generator=torch.Generator().manual_seed(seed))
    for i, value in enumerate((0.0, -0.0, 1e-42, float("inf"), -float("inf"), float("nan"))):
        x[kind == i] = value
    x[..., : shape[-1] // 3] = torch.where(x[..., :1] > 0, 0.0, x[..., : shape[-1] // 3])
    return x.to(dtype)


def expected_scale(block, power_of_two):
    amax = max([abs(v) for v in block.flatten().tolist() if v == v], default=0.0)
    scale = torch.tensor(max(amax, 1e-12), dtype=torch.float32) / torch.tensor(448.0)
    if power_of_two and torch.isfinite(scale):
        mantissa, exponent = torch.frexp(scale)
        return torch.ldexp(torch.tensor(1.0), exponent - 1 if mantissa == 0.5 else exponent)
    return scale


@pytest.mark.parametrize("power_of_two", [False, True])
def test_references_are_a_plain_loop_over_blocks(power_of_two):
    x = normal(130, 257, seed=1) * torch.exp2(10 * normal(130, 1, seed=2))
    x[:, 128:256] = 0
    x[3, 5] = float("nan")
    for height, reference in ((1, quantize_reference), (128, quantize_blocks_reference)):
        found = reference(x, power_of_two=power_of_two)
        for i in range(0, 130, height):
            for j in range(0, 257, 128):
                block = x[i : i + height, j : j + 128]
                scale = expected_scale(block, power_of_two)
                assert found.scales[i // height, j // 128] == scale
                # quotient, factor and product are rounded to float32, hence not the last bit
                exact = (block.double() / scale.double()).float()
                values = found.values[i : i + height, j : j + 128].float()
                torch.testing.assert_close(values, exact, rtol=2**-4 + 2**-20, atol=2**-10,
                                           equal_nan=True)  # fmt: skip
                if power_of_two:
                    assert same_bits(values, exact.to(FP8).float())


@settings(max_examples=12)
@given(rows=row_counts, columns=column_counts, dtype=dtypes, layout=layouts, seed=seeds,
       power_of_two=st.booleans(), block=st.sampled_from([None, *BLOCKS[:3]]),
       height=st.sampled_from([1, 4]))  # fmt: skip
def test_rows_are_the_bits_of_the_reference(
    rows, columns, dtype, layout, seed, power_of_two, block, height
):
    x = laid_out(awkward(rows, columns, dtype=dtype, seed=seed), layout)
    with use("quantize_fp8", Config(block, height, 4) if block else None):
        assert same_bits(quantize_fp8(x, power_of_two=power_of_two),
                         quantize_reference(x, power_of_two=power_of_two))  # fmt: skip


# each example compiles up to four kernels
@settings(max_examples=8)
@given(batch=st.sampled_from([(), (1,), (3,), (2, 2)]), rows=heights, columns=column_counts,
       dtype=dtypes, layout=layouts, seed=seeds, power_of_two=st.booleans())  # fmt: skip
def test_tiles_are_the_bits_of_the_reference(
    batch, rows, columns, dtype, layout, seed, power_of_two
):
    x = laid_out(awkward(*batch, rows, columns, dtype=dtype, seed=seed), layout)
    kind = {"power_of_two": power_of_two}
    straight, turned = quantize_reference(x, **kind), quantize_reference(x.mT, **kind)
    assert same_bits(quantize_fp8_both(x, **kind), [straight, turned])
    assert same_bits(quantize_fp8_transposed(x, **kind), turned)
    assert same_bits(quantize_fp8_blocks(x, **kind), quantize_blocks_reference(x, **kind))
    assert same_bits(quantize_fp8_blocks(x, transposed=True, **kind),
                     quantize_blocks_reference(x.mT, **kind))  # fmt: skip


@settings(max_examples=10)
@given(batch=st.sampled_from([(), (3,), (2, 2)]), rows=heights, columns=column_counts,
       dtype=dtypes, layout=layouts, seed=seeds)  # fmt: skip
def test_dequantized_bits(batch, rows, columns, dtype, layout, seed):
    x = normal(*batch, rows, columns, seed=seed)
    for found in (quantize_reference(x), quantize_blocks_reference(x)):
        values = laid_out(found.values, layout)
        wide = dequantize_fp8(values, found.scales, dtype=dtype)
        assert same_bits(wide, dequantize_reference(values, found.scales, dtype=dtype))


@given(rows=row_counts, columns=column_counts, seed=seeds, power_of_two=st.booleans())
def test_what_went_in_comes_out(rows, columns, seed, power_of_two):
    """Half an e4m3 spacing: 2^-4 of the value, or 2^-10 of the scale among subnormals."""
    x = normal(rows, columns, seed=seed)
    found = quantize_fp8(x, power_of_two=power_of_two)
    back = dequantize_fp8(found.values, found.scales, dtype=torch.float32)
    scale = found.scales.repeat_interleave(128, -1)[:, :columns]
    # three roundings to float32 come on top
    assert ((back - x).abs() <= x.abs() * (2**-4 + 2**-22) + scale * 2**-10).all()


def test_twice_the_same_bits():
    x = normal(300, 300, dtype=torch.bfloat16)
    for f in (quantize_fp8, quantize_fp8_both, quantize_fp8_blocks):
        assert same_bits(f(x), f(x))


def test_row_offsets_beyond_32_bits():
    """Two rows, and two matrices, 2^31 + 16 elements apart, with untouched memory between."""
    stride = 2**31 + 16
    x = torch.empty(stride + 256, dtype=torch.bfloat16)
    for view in (x.as_strided((2, 256), (stride, 1)), x.as_strided((2, 2, 128), (stride, 128, 1))):
        view.copy_(normal(*view.shape))
        for f in (quantize_fp8, quantize_fp8_both, quantize_fp8_blocks):
            assert same_bits(f(view), f(view.contiguous()))
    values = torch.empty(stride + 256, dtype=FP8).as_strided((2, 256), (stride, 1))
    values.copy_(normal(2, 256))
    scales = torch.rand(2, 2)
    assert same_bits(dequantize_fp8(values, scales), dequantize_fp8(values.contiguous(), scales))


def test_opcheck():
    x, ops = laid_out(normal(5, 140), "row strided"), torch.ops.kexaone
    torch.library.opcheck(ops.quantize_fp8, (x, False))
    torch.library.opcheck(ops.quantize_fp8_both, (x, True))
    torch.library.opcheck(ops.quantize_fp8_transposed, (x, False))
    for transposed in (False, True):
        torch.library.opcheck(ops.quantize_fp8_blocks, (x, transposed, False))
    found = quantize_fp8(x)
    # not the test of the schema: it compares inputs, which torch cannot in float8
    torch.library.opcheck(ops.dequantize_fp8, (found.values, found.scales, torch.bfloat16),
                          test_utils=("test_faketensor", "test_aot_dispatch_dynamic",
                                      "test_autograd_registration"))  # fmt: skip


def test_compiled_with_dynamic_shapes():
    def there_and_back(x):
        rows, both, blocks = quantize_fp8(x), quantize_fp8_both(x), quantize_fp8_blocks(x)
        wide = [dequantize_fp8(q.values, q.scales, dtype=torch.float32)
                for q in (rows, both.rows, blocks)]  # fmt: skip
        # the casts carry no gradient; x itself does
        return wide[0] + wide[1] + wide[2] + x

    check_compiled(there_and_back, lambda rows: [normal(rows, 64, seed=1)], sizes=(4, 9, 17))


def test_reference_is_used_when_asked_and_for_float64():
    x = normal(130, 64, dtype=torch.bfloat16)
    expected = quantize_fp8(x), quantize_fp8_both(x), quantize_fp8_blocks(x, transposed=True)
    with kexaone.impl("reference"):
        found = quantize_fp8(x), quantize_fp8_both(x), quantize_fp8_blocks(x, transposed=True)
        assert same_bits(found, expected)
    q = quantize_fp8(x.double())
    assert same_bits(q, expected[0])
    assert dequantize_fp8(q.values, q.scales, dtype=torch.float64).dtype == torch.float64


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one dimension"):
        quantize_fp8(torch.tensor(1.0))
    for f in (quantize_fp8_blocks, quantize_fp8_transposed, quantize_fp8_both):
        with pytest.raises(ValueError, match=r"x must be \[..., R, C\], got \(3,\)"):
            f(torch.ones(3))
    values = torch.zeros(130, 200).to(FP8)
    with pytest.raises(ValueError, match=r"scales must be \[130, 2\] or \[2, 2\], got \[2, 1\]"):
        dequantize_fp8(values, torch.ones(2, 1))
    with pytest.raises(ValueError, match="values must be float8_e4m3fn"):
        dequantize_fp8(values.to(torch.float8_e5m2), torch.ones(2, 2))
