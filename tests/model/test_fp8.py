"""Block-scaled float8 against a plain loop over blocks and a table of all e4m3 numbers."""

from __future__ import annotations

import bisect
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexaone.model.fp8 import Fp8Linear, dequantize, quantize, scale_shape

TINY = torch.finfo(torch.float32).tiny
EXAMPLES = settings(max_examples=30, deadline=None)
# one row or column short of a block, a whole one, one more
edges = st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257])
seeds = st.integers(0, 2**31)

# e4m3 without infinities: 4 bits of exponent biased by 7, 3 of mantissa, and 0x7F is NaN
E4M3 = [
    math.ldexp(m, -9) if e == 0 else math.ldexp(8 + m, e - 10)
    for e in range(16)
    for m in range(8)
    if (e, m) != (15, 7)
]


def nearest(x: float) -> float:
    """The e4m3 number next to x; between two, the one with the even last bit."""
    size = min(abs(x), E4M3[-1])
    above = bisect.bisect_left(E4M3, size)
    if E4M3[above] == size:
        return math.copysign(size, x)
    low, high = E4M3[above - 1], E4M3[above]
    middle = (low + high) / 2
    up = size > middle or (size == middle and above % 2 == 0)
    return math.copysign(high if up else low, x)


def random_weight(rows: int, cols: int, seed: int) -> Tensor:
    """Blocks of very different size, from 2^-20 to 2^20, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    shape = scale_shape(weight.shape)
    size = torch.randint(-20, 21, shape, generator=generator).float().exp2()
    size[torch.rand(shape, generator=generator) < 0.15] = 0
    return weight * size.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]


def blocks(rows: int, cols: int):
    """Index of the scale and slices of each block."""
    for i, j in itertools.product(range(0, rows, 128), range(0, cols, 128)):
        yield (i // 128, j // 128), (slice(i, min(i + 128, rows)), slice(j, min(j + 128, cols)))


def test_the_table_is_the_format():
    codes = torch.arange(127, dtype=torch.uint8)
    assert codes.view(torch.float8_e4m3fn).double().tolist() == E4M3
    assert E4M3[-1] == 448 and E4M3[1] == 2**-9


@EXAMPLES
@given(edges, edges, seeds)
def test_quantize_is_a_plain_loop_over_blocks(rows, cols, seed):
    weight = random_weight(rows, cols, seed)
    found = quantize(weight)
    assert found.values.dtype == torch.float8_e4m3fn and found.values.shape == weight.shape
    assert found.scale.dtype == torch.float32
    assert found.scale.shape == (math.ceil(rows / 128), math.ceil(cols / 128))
    for at, block in blocks(rows, cols):
        part = weight[block]
        peak = max(abs(x) for x in part.flatten().tolist())
        # one division rounded to float32, as the definition says
        scale = torch.tensor(peak) / 448 if peak else torch.tensor(1.0)
        assert found.scale[at] == scale
        scaled = (part / scale).double().flatten().tolist()
        assert found.values[block].double().flatten().tolist() == [nearest(x) for x in scaled]


@EXAMPLES
@given(edges, edges, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_dequantize_is_a_plain_loop_over_blocks(rows, cols, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator).mul(100).clamp(-448, 448)
    values = values.to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(values.shape), generator=generator) + 0.01
    found = dequantize(values, scale, dtype=dtype)
    assert found.dtype == dtype and found.shape == values.shape
    for at, block in blocks(rows, cols):
        assert torch.equal(found[block], (values[block].float() * scale[at]).to(dtype))


@EXAMPLES
@given(edges, edges, seeds)
def test_error_is_at_most_half_an_e4m3_spacing(rows, cols, seed):
    weight = random_weight(rows, cols, seed)
    found = quantize(weight)
    back = dequantize(found.values, found.scale, dtype=torch.float64)
    for at, block in blocks(rows, cols):
        scale, w = found.scale[at].double(), weight[block].double()
        # v in [2^e, 2^(e+1)) has neighbours 2^(e-3) apart, below 2^-6 they are 2^-9 apart
        exponent = torch.frexp(w / scale).exponent - 1
        half = (exponent.clamp(min=-6) - 4).double().exp2()
        # and quotient and product are rounded to float32, 2^-24 each
        assert ((back[block] - w).abs() <= half * scale + 2**-23 * w.abs()).all()


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_what_float8_holds_comes_back_exactly(rows, cols, seed):
    """Powers of two as scales: quantizing again changes no bit."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows * 128, cols * 128)
    codes = torch.randint(0, 127, shape, generator=generator)
    values = torch.tensor(E4M3)[codes]
    values[::128, ::128] = -448
    scale = torch.randint(-30, 31, (rows, cols), generator=generator).float().exp2()
    weight = values * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    found = quantize(weight)
    assert torch.equal(found.scale, scale) and torch.equal(found.values.float(), values)
    assert torch.equal(dequantize(found.values, found.scale, dtype=torch.float32), weight)


def test_stacked_experts_are_quantized_one_by_one():
    weight = torch.stack([random_weight(130, 200, seed) for seed in range(3)])
    found = quantize(weight)
    assert found.scale.shape == scale_shape(weight.shape) == (3, 2, 2)
    back = dequantize(found.values, found.scale, dtype=torch.bfloat16)
    for i, expert in enumerate(weight):
        alone = quantize(expert)
        assert torch.equal(found.scale[i], alone.scale)
        assert torch.equal(found.values[i].float(), alone.values.float())
        assert torch.equal(back[i], dequantize(alone.values, alone.scale, dtype=torch.bfloat16))


@pytest.mark.parametrize("peak", [0.0, 1e-45, 1e-42, 6e-43, 1e-38, 1e-36, 1e38, 3.4e38])
def test_blocks_of_extreme_size(peak):
    """Zero, subnormal and huge blocks stay finite, and zeros in them stay zero."""
    weight = torch.zeros(130, 130)
    weight[::2, ::3] = peak
    # the last block is of ordinary size, whatever its neighbours are
    weight[128:, 128:] = 0
    weight[129, 129] = -1.0
    found = quantize(weight)
    assert found.scale.isfinite().all() and (found.scale >= TINY).all()
    assert found.values.float().isfinite().all()
    back = dequantize(found.values, found.scale, dtype=torch.float32)
    assert not back[weight == 0].any()
    # half the smallest spacing at the smallest scale, and half a spacing of the peak
    assert (back - weight).abs().max() <= max(TINY * 2**-10, peak * 2**-4)
    assert back[129, 129] == -1


def test_a_large_value_costs_precision_in_its_own_block_only():
    weight = torch.full((256, 256), 1.0)
    weight[0, 0] = 1e6
    found = quantize(weight)
    back = dequantize(found.values, found.scale, dtype=torch.float32)
    assert not back[1:128, 1:128].any()
    assert torch.equal(back[128:], weight[128:]) and torch.equal(back[:, 128:], weight[:, 128:])
    assert back[0, 0] == 1e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(128, 128), (200, 130), (1, 300)])
def test_linear_is_linear_with_the_widened_weight(dtype, shape):
    found = quantize(random_weight(*shape, seed=1))
    layer = Fp8Linear(found.values, found.scale)
    weight = dequantize(found.values, found.scale, dtype=dtype)
    x = torch.randn(3, 5, shape[1], dtype=dtype, requires_grad=True)
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, F.linear(x, weight), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand_as(x))
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_change_of_dtype_keeps_the_stored_bits(dtype):
    found = quantize(random_weight(200, 130, seed=1))
    model = nn.Sequential(Fp8Linear(found.values, found.scale), nn.Linear(200, 3)).to(dtype)
    layer = model[0]
    assert layer.weight.dtype == torch.float8_e4m3fn and not layer.weight.requires_grad
    assert torch.equal(layer.weight.view(torch.uint8), found.values.view(torch.uint8))
    assert torch.equal(layer.weight_scale, found.scale)
    assert set(layer.state_dict()) == {"weight", "weight_scale"}
    assert model(torch.randn(2, 130, dtype=dtype)).dtype == dtype
    moved = layer.to("meta")
    assert moved.weight.is_meta and moved.weight_scale.is_meta


def test_the_state_survives_a_file():
    found = quantize(random_weight(200, 130, seed=1))
    layer = Fp8Linear(found.values, found.scale)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = Fp8Linear(torch.zeros_like(found.values), torch.zeros_like(found.scale))
    other.load_state_dict(torch.load(file))
    x = torch.randn(4, 130)
    assert torch.equal(layer(x), other(x)) and layer(x).any()
