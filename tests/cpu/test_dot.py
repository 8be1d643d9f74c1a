"""`tl.dot` over dtypes, tile shapes and operand layouts against exact or float64 products."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

F8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@triton.jit
def dot_kernel(a, b, c, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
               LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if LEFT:
        x = tl.trans(tl.load(a + k[:, None] * M + m[None, :]))
    else:
        x = tl.load(a + m[:, None] * K + k[None, :])
    if RIGHT:
        y = tl.trans(tl.load(b + n[:, None] * K + k[None, :]))
    else:
        y = tl.load(b + k[:, None] * N + n[None, :])
    z = tl.load(c + m[:, None] * N + n[None, :])
    r = tl.dot(x, y, z, input_precision="ieee", out_dtype=KIND)
    tl.store(out + m[:, None] * N + n[None, :], r)


def product(a, b, c, left=False, right=False, kind=tl.float32):
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty_like(c)
    x = a.T.contiguous() if left else a.contiguous()
    y = b.T.contiguous() if right else b.contiguous()
    dot_kernel[(1,)](x, y, c, out, M=m, N=n, K=k, LEFT=left, RIGHT=right, KIND=kind)
    return out


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("tile", [(16, 16, 16), (64, 32, 128), (7 + 1, 64, 4), (1, 128, 64),
                                  (32, 8, 16), (4, 2, 1), (128, 64, 64)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_small_integers_multiply_exactly(dtype, tile, left, right):
    m, n, k = tile
    generator = torch.Generator().manual_seed(m + n + k)
    a = torch.randint(-8, 9, (m, k), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (k, n), generator=generator).to(dtype)
    c = torch.randint(-50, 50, (m, n), generator=generator).float()
    # every partial sum is an integer below 2^24: any order of additions gives the exact result
    want = a.double() @ b.double() + c
    assert torch.equal(product(a, b, c, left, right).double(), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, *F8.values()], ids=str)
@pytest.mark.parametrize("right", [False, True])
def test_other_operand_types(dtype, right):
    m, n, k = 32, 64, 32
    generator = torch.Generator().manual_seed(6)
    a = torch.randint(-8, 8, (m, k), generator=generator).to(dtype)
    b = torch.randint(-8, 8, (k, n), generator=generator).to(dtype)
    out_type = {torch.float64: torch.float64, torch.int8: torch.int32}.get(dtype, torch.float32)
    kind = {torch.float64: tl.float64, torch.int8: tl.int32}.get(dtype, tl.float32)
    c = torch.randint(-50, 50, (m, n), generator=generator).to(out_type)
    want = a.double() @ b.double() + c.double()
    assert torch.equal(product(a, b, c, right=right, kind=kind).double(), want)


def test_half_precision_result_is_rounded_once():
    generator = torch.Generator().manual_seed(7)
    a = torch.randint(-8, 8, (16, 64), generator=generator).half()
    b = torch.randint(-8, 8, (64, 32), generator=generator).half() + 0.125
    c = torch.randn(16, 32, generator=generator).half()
    want = (a.double() @ b.double() + c.double()).half()
    assert torch.equal(product(a, b, c, kind=tl.float16), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_is_that_of_fp32_accumulation(dtype):
    generator = torch.Generator().manual_seed(8)
    m, n, k = 64, 64, 256
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(k, n, generator=generator).to(dtype)
    want = a.double() @ b.double()
    got = product(a, b, torch.zeros(m, n))
    # k fp32 additions of products of magnitude |a||b|: k * 2^-24 of the sum of magnitudes
    bound = (a.double().abs() @ b.double().abs()) * k * 2.0**-24
    assert ((got.double() - want).abs() <= bound).all()


@triton.jit
def batched_kernel(a, b, out, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, m, n, k = tl.arange(0, B), tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + i[:, None, None] * M * K + m[None, :, None] * K + k[None, None, :])
    y = tl.load(b + i[:, None, None] * K * N + k[None, :, None] * N + n[None, None, :])
    r = tl.dot(x, y, input_precision="ieee")
    tl.store(out + i[:, None, None] * M * N + m[None, :, None] * N + n[None, None, :], r)


def test_batched():
    a = torch.randint(-8, 8, (4, 16, 32)).float()
    b = torch.randint(-8, 8, (4, 32, 16)).float()
    out = torch.empty(4, 16, 16)
    batched_kernel[(1,)](a, b, out, B=4, M=16, N=16, K=32)
    assert torch.equal(out, a @ b)


@triton.jit
def scaled_kernel(a, a_scale, b, b_scale, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                  LEFT: tl.constexpr, RIGHT: tl.constexpr, PACK: tl.constexpr):  # fmt: skip
    m, n, k, s = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // 32)
    ka = tl.arange(0, K // PACK)
    x = tl.load(a + m[:, None] * (K // PACK) + ka[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    sx = tl.load(a_scale + m[:, None] * (K // 32) + s[None, :])
    sy = tl.load(b_scale + n[:, None] * (K // 32) + s[None, :])
    r = tl.dot_scaled(x, sx, LEFT, y, sy, RIGHT)
    tl.store(out + m[:, None] * N + n[None, :], r)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.mark.parametrize("form", ["e4m3", "e5m2", "e2m1"])
def test_microscaled_operands(form):
    m, n, k = 16, 32, 64
    generator = torch.Generator().manual_seed(10)
    if form == "e2m1":
        codes = torch.randint(0, 16, (m, k), generator=generator)
        x = E2M1[codes]
        a = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    else:
        x = torch.randint(-4, 5, (m, k), generator=generator).float()
        a = x.to(F8[form])
    y = torch.randint(-4, 5, (k, n), generator=generator).float()
    # scales from 1/2 to 4 and small integers: every sum is exact in fp32
    sa = torch.randint(126, 130, (m, k // 32), generator=generator).to(torch.uint8)
    sb = torch.randint(126, 130, (n, k // 32), generator=generator).to(torch.uint8)
    out = torch.empty(m, n)
    scaled_kernel[(1,)](a, sa, y.to(torch.float8_e4m3fn), sb, out, M=m, N=n, K=k, LEFT=form,
                        RIGHT="e4m3", PACK=2 if form == "e2m1" else 1)  # fmt: skip
    scale = [torch.exp2(s.float() - 127).repeat_interleave(32, 1) for s in (sa, sb)]
    assert torch.equal(out, (x * scale[0]) @ (y * scale[1].T))


@triton.jit
def few_rows_kernel(x, w, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    TRANSPOSE: tl.constexpr):  # fmt: skip
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        rows = (m[:, None] < M) & inside[None, :]
        a = tl.load(x + m[:, None] * K + start + k[None, :], mask=rows, other=0.0)
        if TRANSPOSE:
            columns = (n[:, None] < N) & inside[None, :]
            b = tl.load(w + n[:, None] * K + start + k[None, :], mask=columns, other=0.0)
            sums = tl.dot(a, tl.trans(b.to(a.dtype)), sums, input_precision="ieee")
        else:
            columns = (n[None, :] < N) & inside[:, None]
            b = tl.load(w + n[None, :] * K + start + k[:, None], mask=columns, other=0.0)
            sums = tl.dot(a, b.to(a.dtype), sums, input_precision="ieee")
    tl.store(y + m[:, None] * N + n[None, :], sums, mask=(m[:, None] < M) & (n[None, :] < N))


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 32])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float8_e4m3fn)],
    ids=["fp32", "bf16", "fp8"],
)
def test_few_rows_against_weights_that_lie_along_k(dtypes, rows, transpose):
    """The error of a sum of 200 products in fp32, in any order, is below 200 ulp of their sizes."""
    generator = torch.Generator().manual_seed(rows)
    m, n, k = max(1, rows - 1), 77, 200
    x = torch.randn(m, k, generator=generator).to(dtypes[0])
    w = torch.randn(n, k, generator=generator).to(dtypes[1])
    y = torch.full((m, n), float("nan"))
    few_rows_kernel[(5,)](x, w, y, m, n, k, BM=rows, BN=16, BK=64, TRANSPOSE=transpose)
    bound = 200 * 2.0**-24 * (x.double().abs() @ w.double().abs().T)
    assert ((y.double() - x.double() @ w.double().T).abs() <= bound).all()
