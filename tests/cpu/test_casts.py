"""Casts are bit-exact: round to nearest even, fp8 saturates, NaN stays NaN."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, *FP8)


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All bit patterns of an 8- or 16-bit type; for fp32 all bf16 values and random patterns."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    high = torch.arange(65536, dtype=torch.int64) << 16
    random = torch.randint(0, 2**32, (200_000,), generator=torch.Generator().manual_seed(0))
    # ties and their neighbours of every narrower format
    near = torch.cat([high + d for d in (0x7FFF, 0x8000, 0x8001, 0x1000, 0xFFF, 0x1001)])
    return torch.cat([high, near % 2**32, random]).to(torch.uint32).view(torch.float32)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal bits, or both NaN."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.dtype.itemsize]
    equal = got.view(integer) == want.view(integer)
    return bool((equal | (got.float().isnan() & want.float().isnan())).all())


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_float_to_float(source, target):
    x = every_value(source)
    wide = x.float()
    if target in FP8 and source != target:  # torch does not saturate; the GPU's conversions do
        wide = wide.clamp(-torch.finfo(target).max, torch.finfo(target).max)
    assert same(cast(x, target), wide.to(target))


@pytest.mark.parametrize("target", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float_to_integer_truncates(source, target):
    x = every_value(source)
    limits = torch.iinfo(target)
    wide = x.double()
    x = x[(wide > limits.min) & (wide < float(limits.max))]
    assert torch.equal(cast(x, target), x.double().trunc().to(target))


@pytest.mark.parametrize("target", FLOATS[:3], ids=str)
@pytest.mark.parametrize("source", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
def test_integer_to_float_rounds_once(source, target):
    limits = torch.iinfo(source)
    x = torch.randint(limits.min, limits.max + 1, (5000,), dtype=torch.int64).to(source)
    # fp64 holds every one of these integers, so one conversion from it is the true rounding
    want = torch.tensor(x.double().numpy().astype("float64")).to(torch.float64)
    want = want.to(target) if target != torch.bfloat16 else bf16_of_double(want)
    if target == torch.float16:
        want = torch.from_numpy(x.numpy().astype("float64").astype("float16"))
    assert same(cast(x, target), want)


def bf16_of_double(x: torch.Tensor) -> torch.Tensor:
    """Round an integer-valued fp64 to 8 significant bits, ties to even."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 256).round(), exponent - 8).float().bfloat16()


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]


@pytest.mark.parametrize("source", INTEGERS, ids=str)
@pytest.mark.parametrize("target", INTEGERS, ids=str)
def test_integer_to_integer_wraps(source, target):
    limits = torch.iinfo(source)
    x = torch.randint(limits.min // 2, limits.max // 2, (3000,)).to(source)
    x[:2] = torch.tensor([limits.min, limits.max])
    assert torch.equal(cast(x, target), x.to(target))


@triton.jit
def product_kernel(a, b, out):
    row, column = tl.program_id(0), tl.arange(0, 256)
    x, y = tl.load(a + row).to(tl.float32), tl.load(b + column).to(tl.float32)
    tl.store(out + row * 256 + column, (x * y).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_every_fp8_product(dtype):
    values = every_value(dtype)
    out = torch.empty(256, 256, dtype=dtype)
    product_kernel[(256,)](values, values, out)
    limit = torch.finfo(dtype).max
    want = (values.float()[:, None] * values.float()[None]).clamp(-limit, limit).to(dtype)
    assert same(out, want)


@triton.jit
def to_float_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(tl.float32))


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("signed", ["u", ""])
def test_integers_to_float(signed, bits):
    dtype = getattr(torch, f"{signed}int{bits}")
    # -1 becomes the largest unsigned number
    x = torch.tensor([0, 1, 2, 100, 127, 2 ** (bits - 1) - 1, 3, -1] * 8).to(dtype)
    out = torch.zeros(64)
    to_float_kernel[(1,)](x, out, N=64)
    assert torch.equal(out, x.float())
