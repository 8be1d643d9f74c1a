"""Elementwise ops against numpy and torch, over dtypes and edge values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.language.extra import libdevice


@triton.jit
def binary_kernel(x, y, out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    a = tl.load(x + at, mask=inside, other=1)
    b = tl.load(y + at, mask=inside, other=1)
    if OP == "add":
        r = a + b
    elif OP == "sub":
        r = a - b
    elif OP == "mul":
        r = a * b
    elif OP == "div":
        r = a // b
    elif OP == "rem":
        r = a % b
    elif OP == "and":
        r = a & b
    elif OP == "or":
        r = a | b
    elif OP == "xor":
        r = a ^ b
    elif OP == "shl":
        r = a << (b & 7)
    elif OP == "shr":
        r = a >> (b & 7)
    elif OP == "min":
        r = tl.minimum(a, b)
    elif OP == "max":
        r = tl.maximum(a, b)
    else:
        r = tl.where(a < b, a, b - a)
    tl.store(out + at, r, mask=inside)


def run(x: torch.Tensor, y: torch.Tensor, op: str) -> torch.Tensor:
    out = torch.empty_like(x)
    binary_kernel[(triton.cdiv(x.numel(), 256),)](x, y, out, x.numel(), OP=op, BLOCK=256)
    return out


NUMPY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.minimum, "max": np.maximum,
    "shl": lambda a, b: np.left_shift(a, b & 7), "shr": lambda a, b: np.right_shift(a, b & 7),
    "where": lambda a, b: np.where(a < b, a, b - a),
    # C rules: the quotient truncates towards zero
    "div": lambda a, b: c_div(a, b),
    "rem": lambda a, b: a - c_div(a, b) * b,
}  # fmt: skip


def c_div(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    quotient = np.abs(a.astype(object)) // np.abs(b.astype(object))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


@pytest.mark.parametrize("op", sorted(NUMPY))
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_integers_wrap_as_in_two_complement(op, dtype, data):
    limits = np.iinfo(dtype)
    seed, n = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 700))
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(limits.min, limits.max, n, dtype=dtype, endpoint=True) for _ in "ab")
    edges = np.array([limits.min, limits.max, 1], dtype)
    a[:3], b[:3] = edges[: len(a[:3])], edges[::-1][: len(b[:3])]
    if op in ("div", "rem"):
        b[b == 0] = 1
        b[(a == limits.min) & (b == dtype(-1).astype(dtype) if limits.min else b == 0)] = 1
    with np.errstate(over="ignore"):
        want = NUMPY[op](a, b)
    got = run(torch.from_numpy(a), torch.from_numpy(b), op).numpy()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "where"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_float_arithmetic_is_correctly_rounded(op, dtype):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype) for _ in "xy")
    wide = (x.double(), y.double()) if dtype != torch.float64 else (x, y)
    a, b = wide
    want = {"add": a + b, "sub": a - b, "mul": a * b, "where": torch.where(a < b, a, b - a)}[op]
    if dtype == torch.float32:
        want = {"add": x + y, "sub": x - y, "mul": x * y}.get(op, torch.where(x < y, x, y - x))
    assert torch.equal(run(x, y, op), want.to(dtype))


@triton.jit
def nan_kernel(x, y, out, PROPAGATE: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    if PROPAGATE:
        big = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
        small = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        big, small = tl.maximum(a, b), tl.minimum(a, b)
    tl.store(out + at, big)
    tl.store(out + N + at, small)


@pytest.mark.parametrize("propagate", [False, True])
def test_nan_rules_of_maximum_and_minimum(propagate):
    values = torch.tensor([float("nan"), 1.0, -2.0, float("inf")])
    x, y = (t.reshape(-1).contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    out = torch.empty(32)
    nan_kernel[(1,)](x, y, out, PROPAGATE=propagate, N=16)
    big, small = (torch.maximum, torch.minimum) if propagate else (torch.fmax, torch.fmin)
    want = torch.cat([big(x, y), small(x, y)])
    assert torch.equal(out.nan_to_num(nan=77.0), want.nan_to_num(nan=77.0))


@triton.jit
def unary_kernel(x, out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at, mask=at < n, other=1.0)
    if OP == "exp":
        r = tl.exp(a)
    elif OP == "exp2":
        r = tl.exp2(a)
    elif OP == "log":
        r = tl.log(a)
    elif OP == "log2":
        r = tl.log2(a)
    elif OP == "sin":
        r = tl.sin(a)
    elif OP == "cos":
        r = tl.cos(a)
    elif OP == "erf":
        r = tl.erf(a)
    elif OP == "tanh":
        r = libdevice.tanh(a)
    elif OP == "sqrt":
        r = tl.sqrt(a)
    elif OP == "rsqrt":
        r = tl.rsqrt(a)
    elif OP == "floor":
        r = tl.floor(a)
    elif OP == "ceil":
        r = tl.ceil(a)
    elif OP == "abs":
        r = tl.abs(a)
    else:
        r = tl.sigmoid(a)
    tl.store(out + at, r, mask=at < n)


# largest error in units of the last place that the polynomials were built for
ULP = {
    "exp": 1.5, "exp2": 1.5, "log": 1.5, "log2": 2.5, "sin": 2, "cos": 2, "erf": 3, "tanh": 2,
    "sqrt": 0.5, "rsqrt": 1.5, "floor": 0, "ceil": 0, "abs": 0, "sigmoid": 4,
}  # fmt: skip


@pytest.mark.parametrize("op", sorted(ULP))
def test_functions_against_float64(op):
    generator = torch.Generator().manual_seed(2)
    low, high = {"log": (0, 50), "log2": (0, 50), "sqrt": (0, 50), "rsqrt": (1e-6, 50)}.get(
        op, (-30, 30)
    )
    x = torch.rand(50_001, generator=generator) * (high - low) + low
    out = torch.empty_like(x)
    unary_kernel[(triton.cdiv(len(x), 1024),)](x, out, len(x), OP=op, BLOCK=1024)
    reference = torch.abs if op == "abs" else getattr(torch, op)
    want = reference(x.double())
    spacing = torch.from_numpy(np.spacing(np.maximum(want.abs().float().numpy(), 1e-37)))
    assert ((out.double() - want).abs() / spacing.double()).max() <= ULP[op] + 1e-9


@pytest.mark.parametrize("op", ["exp", "exp2", "log", "log2", "sin", "cos", "erf", "tanh"])
def test_functions_at_the_edges(op):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e-45, -1e-45, 1e-39, 3e38, -3e38, 1.0, -1.0,
                      -126.5, -149.0, -151.0, 128.0, 88.8, -103.5])  # fmt: skip
    out = torch.empty_like(x)
    unary_kernel[(1,)](x, out, len(x), OP=op, BLOCK=32)
    want = getattr(torch, op)(x.double()).float()
    assert torch.equal(out.isnan(), want.isnan())
    finite = ~want.isnan()
    torch.testing.assert_close(out[finite], want[finite], rtol=4e-7, atol=2e-45)
    zero = want == 0
    assert torch.equal(torch.signbit(out[zero]), torch.signbit(want[zero]))


@triton.jit
def special_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at)
    tl.store(out + at, libdevice.isinf(a).to(tl.int8))
    tl.store(out + N + at, libdevice.isnan(a).to(tl.int8))
    tl.store(out + 2 * N + at, libdevice.signbit(a).to(tl.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_library_tests_of_special_values(dtype):
    x = torch.tensor([0.0, -0.0, 1.5, -1e-42, float("inf"), float("-inf"), float("nan"), -3.0] * 4)
    x = x.to(dtype)
    out = torch.zeros(3, 32, dtype=torch.int8)
    special_kernel[(1,)](x, out, N=32)
    expected = torch.stack([x.isinf(), x.isnan(), x.signbit()])
    assert torch.equal(out != 0, expected)


@triton.jit
def high_kernel(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, libdevice.mulhi(a, b))
    tl.store(out + N + at, tl.umulhi(a, b))


def test_high_half_of_products():
    x, y = (torch.randint(-(2**31), 2**31, (64,)).int() for _ in range(2))
    out = torch.zeros(2, 64, dtype=torch.int32)
    high_kernel[(1,)](x, y, out, N=64)
    assert torch.equal(out[0], (x.long() * y.long() >> 32).int())
    unsigned = [(int(a) % 2**32) * (int(b) % 2**32) >> 32 for a, b in zip(x, y, strict=True)]
    assert [int(v) % 2**32 for v in out[1]] == unsigned
