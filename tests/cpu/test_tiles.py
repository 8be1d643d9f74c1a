"""Reductions, scans, sorts and shape ops against torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


@triton.jit
def reduce_kernel(x, out, index, rows, columns, OP: tl.constexpr, AXIS: tl.constexpr,
                  M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    r, c = tl.arange(0, M), tl.arange(0, N)
    inside = (r[:, None] < rows) & (c[None, :] < columns)
    if OP == "max" or OP == "argmax":
        value = tl.load(x + r[:, None] * columns + c[None, :], mask=inside, other=-float("inf"))
    elif OP == "min":
        value = tl.load(x + r[:, None] * columns + c[None, :], mask=inside, other=float("inf"))
    else:
        value = tl.load(x + r[:, None] * columns + c[None, :], mask=inside, other=0.0)
    at = c if AXIS == 0 else r
    limit = columns if AXIS == 0 else rows
    if OP == "sum":
        tl.store(out + at, tl.sum(value, AXIS), mask=at < limit)
    elif OP == "max":
        tl.store(out + at, tl.max(value, AXIS), mask=at < limit)
    elif OP == "min":
        tl.store(out + at, tl.min(value, AXIS), mask=at < limit)
    else:
        best, where = tl.max(value, AXIS, return_indices=True)
        tl.store(out + at, best, mask=at < limit)
        tl.store(index + at, where, mask=at < limit)


@pytest.mark.parametrize("op", ["sum", "max", "min", "argmax"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("tile", [(16, 64), (64, 4), (1, 128), (32, 1)])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_reduce(op, axis, tile, data):
    m, n = data.draw(st.integers(1, tile[0])), data.draw(st.integers(1, tile[1]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    # few distinct values, so that argmax meets ties; sums of them are exact in any order
    x = torch.randint(-8, 8, (m, n), generator=generator).float()
    size = n if axis == 0 else m
    out, index = torch.full((size,), float("nan")), torch.full((size,), -1, dtype=torch.int32)
    reduce_kernel[(1,)](x, out, index, m, n, OP=op, AXIS=axis, M=tile[0], N=tile[1])
    if op == "sum":
        assert torch.equal(out, x.sum(axis))
    elif op == "min":
        assert torch.equal(out, x.amin(axis))
    else:
        assert torch.equal(out, x.amax(axis))
    if op == "argmax":
        first = (x == x.amax(axis, keepdim=True)).int().argmax(axis)  # ties: the lower index
        assert torch.equal(index.long(), first)


@triton.jit
def multiply_add(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def scan_kernel(a, b, out, sums, N: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    _, state = tl.associative_scan((x, y), 0, multiply_add, reverse=REVERSE)
    tl.store(out + at, state)
    tl.store(sums + at, tl.cumsum(y, 0, reverse=REVERSE))


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_with_two_operands(reverse):
    generator = torch.Generator().manual_seed(3)
    a, b = torch.rand(64, generator=generator), torch.randn(64, generator=generator)
    out, sums = torch.empty(64), torch.empty(64)
    scan_kernel[(1,)](a, b, out, sums, N=64, REVERSE=reverse)
    x, y = (a.flip(0), b.flip(0)) if reverse else (a, b)
    state, want = torch.zeros((), dtype=torch.float64), []
    for k in range(64):
        state = x[k].double() * state + y[k].double()
        want.append(state)
    want = torch.stack(want)
    want = want.flip(0) if reverse else want
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    total = y.double().cumsum(0)
    torch.testing.assert_close(
        sums.double(), total.flip(0) if reverse else total, rtol=1e-5, atol=1e-5
    )


@triton.jit
def sort_kernel(x, out, best, N: tl.constexpr, K: tl.constexpr, DOWN: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(out + at, tl.sort(value, descending=DOWN))
    tl.store(best + tl.arange(0, K), tl.topk(value, K))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_sort_and_topk(dtype, descending):
    x = torch.randint(-50, 50, (128,), generator=torch.Generator().manual_seed(4)).to(dtype)
    out, best = torch.empty_like(x), torch.empty(8, dtype=dtype)
    sort_kernel[(1,)](x, out, best, N=128, K=8, DOWN=descending)
    assert torch.equal(out, x.sort(descending=descending)[0])
    assert torch.equal(best, x.topk(8)[0])


@triton.jit
def shape_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(out + at, tl.flip(value, 0))
    tl.store(out + N + at, tl.gather(value, (at * 7) % N, 0))
    tl.store(out + 2 * N + at, tl.histogram(value % N, N))
    pairs = tl.join(value, at)
    tl.store(out + 3 * N + tl.arange(0, 2 * N), tl.reshape(pairs, (2 * N,)))
    left, right = tl.split(pairs)
    tl.store(out + 5 * N + at, left - 3 * right)
    grid = tl.trans(tl.reshape(value, (N // 8, 8)))
    r, c = tl.arange(0, 8), tl.arange(0, N // 8)
    tl.store(out + 6 * N + r[:, None] * (N // 8) + c[None, :], grid)
    tl.store(out + 7 * N + tl.arange(0, 2 * N), tl.interleave(value, at))
    tl.store(out + 9 * N + tl.arange(0, 2 * N), tl.cat(value, at, can_reorder=True))
    cube = tl.permute(tl.reshape(value, (2, 4, N // 8)), (2, 0, 1))
    tl.store(out + 11 * N + at, tl.reshape(cube, (N,)))


def test_shape_ops():
    n = 64
    x = torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(5)).int()
    at = torch.arange(n).int()
    out = torch.zeros(12 * n, dtype=torch.int32)
    shape_kernel[(1,)](x, out, N=n)
    pairs = torch.stack([x, at], 1).reshape(-1)
    want = [x.flip(0), x[(at * 7) % n], torch.bincount(x % n, minlength=n).int(), pairs,
            x - 3 * at, x.reshape(n // 8, 8).T.reshape(-1), pairs, torch.cat([x, at]),
            x.reshape(2, 4, n // 8).permute(2, 0, 1).reshape(-1)]  # fmt: skip
    assert torch.equal(out, torch.cat(want))


@triton.jit
def random_kernel(out, integers, seed, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.rand(seed, at))
    tl.store(integers + at, tl.randint(seed, at))


def philox(seed: int, counter: int) -> int:
    """Philox 4x32-10 (Salmon et al., SC'11), first output word."""
    mask = 0xFFFFFFFF
    c = [counter & mask, 0, 0, 0]
    key = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c[0]


def test_random_numbers_are_philox():
    out, integers = torch.empty(128), torch.empty(128, dtype=torch.int32)
    random_kernel[(1,)](out, integers, 1234, N=128)
    want = [philox(1234, k) for k in range(128)]
    assert [v % 2**32 for v in integers.tolist()] == want
    assert out.min() >= 0 and out.max() < 1


@triton.jit
def split_kernel(x, out, N: tl.constexpr):
    pairs = tl.load(x + tl.arange(0, N)[:, None] * 2 + tl.arange(0, 2)[None, :])
    left, right = tl.split(pairs)  # a split of loaded pairs: one of joined ones folds away
    tl.store(out + tl.arange(0, N), left - 3 * right)


def test_split_of_loaded_pairs():
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(6))
    out = torch.zeros(32)
    split_kernel[(1,)](x, out, N=32)
    assert torch.equal(out, x[:, 0] - 3 * x[:, 1])
