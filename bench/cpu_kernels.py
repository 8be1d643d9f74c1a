"""Triton kernels that the CPU backend is measured with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * n + at, mask=at < n, other=-float("inf"))
    top = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * n + at, top / tl.sum(top, 0), mask=at < n)


@triton.jit
def rms_norm_kernel(x, weight, out, n, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * n + at, mask=at < n, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / n + eps)
    w = tl.load(weight + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + row * n + at, (value * scale * w).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def qk_norm_rope_kernel(x, weight, cos, sin, out, heads, eps, DIM: tl.constexpr):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, half = tl.arange(0, DIM // 2), DIM // 2
    base = (token * heads + head) * DIM
    a = tl.load(x + base + at).to(tl.float32)
    b = tl.load(x + base + half + at).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a) + tl.sum(b * b)) / DIM + eps)
    a = a * scale * tl.load(weight + at).to(tl.float32)
    b = b * scale * tl.load(weight + half + at).to(tl.float32)
    c, s = tl.load(cos + token * half + at), tl.load(sin + token * half + at)
    tl.store(out + base + at, (a * c - b * s).to(out.dtype.element_ty))
    tl.store(out + base + half + at, (b * c + a * s).to(out.dtype.element_ty))


@triton.jit
def matmul_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    wide = tl.cdiv(N, BN)
    m = tl.program_id(0) // wide * BM + tl.arange(0, BM)
    n = tl.program_id(0) % wide * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left, right = a + m[:, None] * K + k[None, :], b + k[:, None] * N + n[None, :]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        x = tl.load(left, mask=(m[:, None] < M) & (k[None, :] < K - start), other=0.0)
        y = tl.load(right, mask=(k[:, None] < K - start) & (n[None, :] < N), other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
        left += BK
        right += BK * N
    out = total.to(c.dtype.element_ty)
    tl.store(c + m[:, None] * N + n[None, :], out, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def window_attention_kernel(q, k, v, out, tokens, scale, window, HEADS: tl.constexpr,
                            GROUPS: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr,
                            BN: tl.constexpr):  # fmt: skip
    first, head = tl.program_id(0) * BM, tl.program_id(1)
    group = head // (HEADS // GROUPS)
    m, d = first + tl.arange(0, BM), tl.arange(0, DIM)
    rows = m[:, None] < tokens
    query = tl.load(q + m[:, None] * (HEADS * DIM) + head * DIM + d[None, :], mask=rows, other=0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total, acc = tl.zeros((BM,), tl.float32), tl.zeros((BM, DIM), tl.float32)
    begin = tl.maximum(0, (first - window + 1) // BN * BN)
    for start in range(begin, tl.minimum(first + BM, tokens), BN):
        n = start + tl.arange(0, BN)
        at = n[:, None] * (GROUPS * DIM) + group * DIM + d[None, :]
        key = tl.load(k + at, mask=n[:, None] < tokens, other=0.0)
        s = tl.dot(query, tl.trans(key)) * scale
        seen = (n[None, :] <= m[:, None]) & (m[:, None] - n[None, :] < window)
        s = tl.where(seen, s, -1.0e30)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(v + at, mask=n[:, None] < tokens, other=0.0)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
        top = higher
    tl.store(out + m[:, None] * (HEADS * DIM) + head * DIM + d[None, :],
             (acc / total[:, None]).to(out.dtype.element_ty), mask=rows)  # fmt: skip
