"""Loads and stores: strides, masks, gathers, booleans, descriptors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


@triton.jit
def copy_kernel(x, out, xr, xc, outr, outc, top, bottom, left, right,
                M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    r, c = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    inside = (r >= top) & (r < bottom) & (left <= c) & (c <= right)
    value = tl.load(x + r * xr + c * xc, mask=inside, other=-7)
    tl.store(out + r * outr + c * outc, value, mask=(r < bottom) & (c <= right))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_strided_masked_tiles(data):
    m, n = 8, 64
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    top, bottom, left, right = draw(-2, m), draw(0, m), draw(-3, n), draw(-1, n - 1)
    x = torch.arange(m * n * 4, dtype=torch.int32).view(m, n * 4)[:, :: draw(1, 4)][:, :n]
    if data.draw(st.booleans()):
        x = torch.arange(m * n, dtype=torch.int32).view(n, m).T
    out = torch.full((n, m), -1, dtype=torch.int32).T
    if data.draw(st.booleans()):
        out = torch.full((m, n), -1, dtype=torch.int32)
    copy_kernel[(1,)](x, out, *x.stride(), *out.stride(), top, bottom, left, right, M=m, N=n)
    r, c = torch.arange(m)[:, None], torch.arange(n)[None]
    loaded = torch.where((r >= top) & (r < bottom) & (c >= left) & (c <= right), x, -7)
    assert torch.equal(out, torch.where((r < bottom) & (c <= right), loaded, -1))


@triton.jit
def lookup_kernel(table, index, out, back, n, N: tl.constexpr, M: tl.constexpr):
    row, column = tl.arange(0, M), tl.arange(0, N)
    at = tl.load(index + row)
    value = tl.load(table + at[:, None] * N + column[None, :],
                    mask=(at[:, None] >= 0) & (column[None, :] < n), other=-1.0)  # fmt: skip
    tl.store(out + row[:, None] * N + column[None, :], value)
    tl.store(back + column[:, None] * M + row[None, :], tl.trans(value))


def test_rows_chosen_by_a_table_and_their_transpose():
    n, m = 32, 16
    generator = torch.Generator().manual_seed(11)
    table = torch.randn(40, n, generator=generator)
    index = torch.randint(-1, 40, (m,), generator=generator).int()
    out, back = torch.empty(m, n), torch.empty(n, m)
    lookup_kernel[(1,)](table, index, out, back, 20, N=n, M=m)
    want = table[index.long()]
    want[index < 0] = -1
    want[:, 20:] = -1
    assert torch.equal(out, want) and torch.equal(back, want.T)


@triton.jit
def permute_kernel(x, order, out, inverse, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    place = tl.load(order + at, mask=inside, other=0)
    tl.store(out + at, tl.load(x + place, mask=inside), mask=inside)
    tl.store(inverse + place, at, mask=inside)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 500), seed=st.integers(0, 2**31), runs=st.booleans())
def test_gather_and_scatter(n, seed, runs):
    generator = torch.Generator().manual_seed(seed)
    # runs of consecutive indices take the vector path, random ones do not
    order = (torch.arange(n) + 5) % n if runs else torch.randperm(n, generator=generator)
    x = torch.randn(n, generator=generator)
    out, inverse = torch.empty(n), torch.zeros(n, dtype=torch.int64)
    permute_kernel[(triton.cdiv(n, 128),)](x, order, out, inverse, n, BLOCK=128)
    assert torch.equal(out, x[order]) and torch.equal(inverse, order.argsort())


@triton.jit
def boolean_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, ~tl.load(x + at) | (at < 3))


def test_booleans():
    x, out = torch.rand(64) > 0.5, torch.zeros(64, dtype=torch.bool)
    boolean_kernel[(1,)](x, out, N=64)
    assert torch.equal(out, ~x | (torch.arange(64) < 3))


@triton.jit
def descriptor_rows_kernel(x, index, out, M, N, ROWS: tl.constexpr, WIDE: tl.constexpr):
    source = tl.make_tensor_descriptor(x, shape=[M, N], strides=[N, 1], block_shape=[1, WIDE])
    target = tl.make_tensor_descriptor(out, shape=[M, N], strides=[N, 1], block_shape=[1, WIDE])
    rows = tl.load(index + tl.arange(0, ROWS))
    target.scatter(source.gather(rows, 0) * 2, rows, 0)


def test_descriptor_gather_and_scatter():
    x, out = torch.randn(20, 32), torch.zeros(20, 32)
    index = torch.randperm(20)[:16].int()
    descriptor_rows_kernel[(1,)](x, index, out, 20, 32, ROWS=16, WIDE=32)
    want = torch.zeros(20, 32)
    want[index.long()] = x[index.long()] * 2
    assert torch.equal(out, want)


@triton.jit
def far_kernel(x, out, stride, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, N)
    tl.store(out + row * N + at, tl.load(x + row * stride + at))


def test_offsets_beyond_32_bits():
    # 2^31 bytes lie between the two rows; only the touched pages are ever backed by memory
    stride = 2**31 + 16
    x = torch.empty(stride + 64, dtype=torch.int8)
    x[:64], x[stride:] = 1, 2
    out = torch.zeros(2, 64, dtype=torch.int8)
    far_kernel[(2,)](x, out, stride, N=64)
    assert (out[0] == 1).all() and (out[1] == 2).all()
