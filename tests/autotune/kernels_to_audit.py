"""Small kernels with known faults and known traffic."""

import triton
import triton.language as tl


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n)
    tl.store(y + at, values, mask=at < n)


@triton.jit
def twice(x, y, n, BLOCK: tl.constexpr):
    """Reads every row once for each of two reasons."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * n + at, mask=at < n, other=0.0)
    mean = tl.sum(total, 0) / n
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * n + at, mask=at < n, other=0.0)
        tl.store(y + row * n + at, values - mean, mask=at < n)


@triton.jit
def columns(x, y, n, BLOCK: tl.constexpr):
    """Reads down a column of a row-major matrix."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at * n + tl.program_id(0))
    tl.store(y + tl.program_id(0) * BLOCK + at, values)


@triton.jit
def gather(x, rows, y, n, BLOCK: tl.constexpr):
    row = tl.load(rows + tl.program_id(0))
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * n + at, mask=at < n)
    tl.store(y + tl.program_id(0) * n + at, values, mask=at < n)


@triton.jit
def search(x, starts, y, count, n, BLOCK: tl.constexpr):
    """Bisects for the last start at most its program's number, and copies that row."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high + 1) // 2
        below = tl.load(starts + middle) <= tl.program_id(0)
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + low * n + at, mask=at < n)
    tl.store(y + tl.program_id(0) * n + at, values, mask=at < n)


@triton.jit
def clamped(x, y, n, BLOCK: tl.constexpr):
    """Two wide reads on one line, of which one lost its neighbours to the clamp."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at) + tl.load(y + tl.minimum(at, n - 1))
    tl.store(x + at, values)


@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of a matrix product."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK):
        left = tl.load(a + m[:, None] * K + start + k[None, :])
        right = tl.load(b + n[:, None] * K + start + k[None, :])
        total = tl.dot(left, tl.trans(right), total)
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def crowded(x, y, BLOCK: tl.constexpr):
    """A cumulative sum of far more than fits into registers."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    sums = tl.cumsum(values, 0)
    tl.store(y + at, sums * values)


@triton.jit
def broken(x):
    tl.store(x, no_such_name)  # noqa: F821
