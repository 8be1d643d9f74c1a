"""The kernels that every Triton user writes first, in our words, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


def test_vector_add():
    x, y, out = torch.randn(98_765), torch.randn(98_765), torch.empty(98_765)
    add_kernel[lambda meta: (triton.cdiv(98_765, meta["BLOCK"]),)](x, y, out, 98_765, BLOCK=1024)
    assert torch.equal(out, x + y)


@triton.jit
def softmax_kernel(x, out, rows, columns, step: tl.constexpr, BLOCK: tl.constexpr):
    for row in tl.range(tl.program_id(0), rows, step, num_stages=2):
        at = tl.arange(0, BLOCK)
        value = tl.load(x + row * columns + at, mask=at < columns, other=-float("inf"))
        top = tl.exp(value - tl.max(value, axis=0))
        tl.store(out + row * columns + at, top / tl.sum(top, axis=0), mask=at < columns)


def test_persistent_softmax():
    x = torch.randn(57, 781) * 5
    out = torch.full_like(x, float("nan"))
    softmax_kernel[(8,)](x, out, 57, 781, step=8, BLOCK=1024)
    torch.testing.assert_close(out, x.softmax(1), rtol=1e-5, atol=1e-7)


@triton.jit
def leaky(x):
    return tl.where(x >= 0, x, 0.01 * x)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, am, ak, bk, bn, cm, cn, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, GROUP: tl.constexpr, ACTIVATE: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    tall, wide = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * wide) * GROUP
    height = min(tall - first, GROUP)
    pid_m = first + pid % (GROUP * wide) % height
    pid_n = pid % (GROUP * wide) // height
    m, n = (pid_m * BM + tl.arange(0, BM)) % M, (pid_n * BN + tl.arange(0, BN)) % N
    k = tl.arange(0, BK)
    left, right = a + m[:, None] * am + k[None, :] * ak, b + k[:, None] * bk + n[None, :] * bn
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BK)):
        x = tl.load(left, mask=k[None, :] < K - step * BK, other=0.0)
        y = tl.load(right, mask=k[:, None] < K - step * BK, other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
        left += BK * ak
        right += BK * bk
    if ACTIVATE:
        total = leaky(total)
    m, n = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    out = total.to(c.dtype.element_ty)
    tl.store(c + m[:, None] * cm + n[None, :] * cn, out, mask=(m[:, None] < M) & (n[None, :] < N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nn", "nt", "tn"])
def test_matmul(dtype, layout):
    m, n, k = 130, 190, 97
    generator = torch.Generator().manual_seed(9)
    a = torch.randint(-4, 5, (m, k), generator=generator).to(dtype)
    b = torch.randint(-4, 5, (k, n), generator=generator).to(dtype)
    if layout[0] == "t":
        a = a.T.contiguous().T
    if layout[1] == "t":
        b = b.T.contiguous().T
    c = torch.full((m, n), float("nan"), dtype=dtype)
    matmul_kernel[(triton.cdiv(m, 64) * triton.cdiv(n, 64),)](
        a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(), BM=64, BN=64, BK=32, GROUP=2,
        ACTIVATE=True,
    )  # fmt: skip
    # the sum is exact in fp32; the slope and the result round once each
    want = F.leaky_relu((a.double() @ b.double()).float(), 0.01).to(dtype)
    assert torch.equal(c, want)


@triton.jit
def dropout_kernel(x, out, n, p, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    keep = tl.rand(seed, at) > p
    tl.store(out + at, tl.where(keep, value / (1 - p), 0.0), mask=at < n)


def test_seeded_dropout():
    x = torch.ones(10_000)
    first, again, other = (torch.empty_like(x) for _ in range(3))
    for out, seed in ((first, 1), (again, 1), (other, 2)):
        dropout_kernel[(10,)](x, out, 10_000, 0.25, seed, BLOCK=1024)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # six standard deviations of a binomial
    assert abs((first > 0).float().mean().item() - 0.75) < 6 * (0.25 * 0.75 / 10_000) ** 0.5


@triton.jit
def layer_norm_kernel(x, w, b, out, mean_out, rstd_out, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * n + at, mask=at < n, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / n
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * n + at, mask=at < n, other=0.0).to(tl.float32)
        value = tl.where(at < n, value - mean, 0.0)
        squares += value * value
    rstd = 1 / tl.sqrt(tl.sum(squares, axis=0) / n + eps)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        scale, shift = tl.load(w + at, mask=inside), tl.load(b + at, mask=inside)
        value = tl.load(x + row * n + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * n + at, (value - mean) * rstd * scale + shift, mask=inside)


@triton.jit
def layer_norm_backward_kernel(dy, x, w, mean, rstd, dx, dw, db, locks, n, GROUP: tl.constexpr,
                               BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + row * n + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * n + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(w + at, mask=inside).to(tl.float32)
    m, r = tl.load(mean + row), tl.load(rstd + row)
    normal = tl.where(inside, (value - m) * r, 0.0)
    weighted = tl.where(inside, scale * grad, 0.0)
    c1, c2 = tl.sum(normal * weighted, axis=0) / n, tl.sum(weighted, axis=0) / n
    tl.store(dx + row * n + at, (weighted - (normal * c1 + c2)) * r, mask=inside)
    lock, count = locks + row % GROUP, locks + GROUP + row % GROUP
    part_w, part_b = grad * normal, grad
    to = row % GROUP * n + at
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    if tl.load(count) == 0:
        tl.atomic_xchg(count, 1)
    else:
        part_w += tl.load(dw + to, mask=inside)
        part_b += tl.load(db + to, mask=inside)
    tl.store(dw + to, part_w, mask=inside)
    tl.store(db + to, part_b, mask=inside)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


def test_layer_norm_forward_and_backward():
    rows, n, group = 37, 300, 4
    x, w, b = torch.randn(rows, n, requires_grad=True), torch.randn(n), torch.randn(n)
    w.requires_grad_(), b.requires_grad_()
    out, mean, rstd = torch.empty(rows, n), torch.empty(rows), torch.empty(rows)
    layer_norm_kernel[(rows,)](x.detach(), w.detach(), b.detach(), out, mean, rstd, n, 1e-5,
                               BLOCK=128)  # fmt: skip
    want = F.layer_norm(x, (n,), w, b)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    dy = torch.randn(rows, n)
    want.backward(dy)
    dx, locks = torch.empty(rows, n), torch.zeros(2 * group, dtype=torch.int32)
    dw, db = torch.full((group, n), float("nan")), torch.full((group, n), float("nan"))
    layer_norm_backward_kernel[(rows,)](dy, x.detach(), w.detach(), mean, rstd, dx, dw, db, locks,
                                        n, GROUP=group, BLOCK=512)  # fmt: skip
    torch.testing.assert_close(dx, x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dw.sum(0), w.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(db.sum(0), b.grad, rtol=1e-4, atol=1e-4)


@triton.jit
def grouped_kernel(addresses, sizes, groups, programs: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    done = 0
    for g in range(groups):
        M, N, K = tl.load(sizes + g * 3), tl.load(sizes + g * 3 + 1), tl.load(sizes + g * 3 + 2)
        wide = tl.cdiv(N, BN)
        tiles = tl.cdiv(M, BM) * wide
        while tile >= done and tile < done + tiles:
            a = tl.load(addresses + g * 3).to(tl.pointer_type(tl.float16))
            b = tl.load(addresses + g * 3 + 1).to(tl.pointer_type(tl.float16))
            c = tl.load(addresses + g * 3 + 2).to(tl.pointer_type(tl.float16))
            m = (tile - done) // wide * BM + tl.arange(0, BM)
            n = (tile - done) % wide * BN + tl.arange(0, BN)
            total = tl.zeros((BM, BN), dtype=tl.float32)
            for start in range(0, tl.cdiv(K, BK)):
                k = start * BK + tl.arange(0, BK)
                x = tl.load(a + m[:, None] * K + k[None, :],
                            mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
                y = tl.load(b + k[:, None] * N + n[None, :],
                            mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)  # fmt: skip
                total += tl.dot(x, y)
            tl.store(c + m[:, None] * N + n[None, :], total.to(tl.float16),
                     mask=(m[:, None] < M) & (n[None, :] < N))  # fmt: skip
            tile += programs
        done += tiles


def test_grouped_gemm_through_a_table_of_addresses():
    shapes = [(40, 64, 32), (128, 20, 50), (33, 70, 16)]
    tensors = []
    for m, n, k in shapes:
        a, b = torch.randint(-4, 5, (m, k)).half(), torch.randint(-4, 5, (k, n)).half()
        tensors.append((a, b, torch.full((m, n), float("nan"), dtype=torch.float16)))
    addresses = torch.tensor([[t.data_ptr() for t in row] for row in tensors])
    sizes = torch.tensor(shapes).int()
    grouped_kernel[(4,)](addresses, sizes, len(shapes), programs=4, BM=32, BN=32, BK=16)
    for a, b, c in tensors:
        assert torch.equal(c, (a.float() @ b.float()).half())


@triton.jit
def descriptor_kernel(a_desc, b_desc, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr,
                      BK: tl.constexpr):  # fmt: skip
    out = tl.make_tensor_descriptor(c, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    wide = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * wide, tl.num_programs(0), flatten=True):
        m, n = tile // wide * BM, tile % wide * BN
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(tl.cdiv(K, BK)):
            total = tl.dot(a_desc.load([m, k * BK]), b_desc.load([n, k * BK]).T, total)
        out.store([m, n], total.to(tl.bfloat16))


def test_persistent_matmul_with_descriptors():
    m, n, k = 100, 72, 80
    a, b = torch.randint(-4, 5, (m, k)).bfloat16(), torch.randint(-4, 5, (n, k)).bfloat16()
    c = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    descriptor_kernel[(3,)](TensorDescriptor.from_tensor(a, [32, 32]),
                            TensorDescriptor.from_tensor(b, [32, 32]), c, m, n, k, BM=32, BN=32,
                            BK=32)  # fmt: skip
    assert torch.equal(c, (a.float() @ b.float().T).bfloat16())


@triton.jit
def attention_kernel(q, k, v, out, lse, T, scale, D: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    base = tl.program_id(1).to(tl.int64) * T * D
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    rows = m[:, None] < T
    query = tl.load(q + base + m[:, None] * D + d[None, :], mask=rows, other=0.0)
    top, total = tl.full([BM], -float("inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    last = tl.minimum((tl.program_id(0) + 1) * BM, T) if CAUSAL else T
    for start in range(0, last, BN):
        n = start + tl.arange(0, BN)
        columns = n[:, None] < T
        key = tl.load(k + base + n[:, None] * D + d[None, :], mask=columns, other=0.0)
        value = tl.load(v + base + n[:, None] * D + d[None, :], mask=columns, other=0.0)
        s = tl.dot(query, key.T) * scale
        seen = n[None, :] < T
        if CAUSAL:
            seen = seen & (n[None, :] <= m[:, None])
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
        top = higher
    tl.store(out + base + m[:, None] * D + d[None, :], acc / total[:, None], mask=rows)
    tl.store(lse + tl.program_id(1) * T + m, top + tl.log(total), mask=m < T)


@triton.jit
def attention_backward_kernel(q, k, v, out, lse, do, dq, dk, dv, T, scale, D: tl.constexpr,
                              B: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    base, row = tl.program_id(1).to(tl.int64) * T * D, tl.program_id(1) * T
    n, d = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, D)
    at = base + n[:, None] * D + d[None, :]
    key = tl.load(k + at, mask=n[:, None] < T, other=0.0)
    value = tl.load(v + at, mask=n[:, None] < T, other=0.0)
    grad_k, grad_v = tl.zeros([B, D], tl.float32), tl.zeros([B, D], tl.float32)
    for start in range(0, T, B):
        m = start + tl.arange(0, B)
        to = base + m[:, None] * D + d[None, :]
        rows = m[:, None] < T
        query, grad = tl.load(q + to, mask=rows, other=0.0), tl.load(do + to, mask=rows, other=0.0)
        delta = tl.sum(grad * tl.load(out + to, mask=rows, other=0.0), 1)
        log_sum = tl.load(lse + row + m, mask=m < T, other=0.0)
        seen = (n[:, None] < T) & (m[None, :] < T)
        if CAUSAL:
            seen = seen & (n[:, None] <= m[None, :])
        p = tl.where(seen, tl.exp(tl.dot(key, query.T) * scale - log_sum[None, :]), 0.0)
        grad_v = tl.dot(p, grad, grad_v)
        ds = p * (tl.dot(value, grad.T) - delta[None, :]) * scale
        grad_k = tl.dot(ds, query, grad_k)
        tl.atomic_add(dq + to, tl.dot(ds.T, key), mask=rows)
    tl.store(dk + at, grad_k, mask=n[:, None] < T)
    tl.store(dv + at, grad_v, mask=n[:, None] < T)


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_forward_and_backward(causal):
    heads, tokens, dim = 3, 75, 32
    q, k, v = (torch.randn(heads, tokens, dim, requires_grad=True) for _ in "qkv")
    out, lse = torch.full((heads, tokens, dim), float("nan")), torch.empty(heads, tokens)
    grid = (triton.cdiv(tokens, 32), heads)
    plain = [t.detach() for t in (q, k, v)]
    attention_kernel[grid](*plain, out, lse, tokens, dim**-0.5, D=dim, BM=32, BN=16, CAUSAL=causal)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    want.backward(grad)
    dq, dk, dv = torch.zeros_like(out), torch.empty_like(out), torch.empty_like(out)
    attention_backward_kernel[grid](*plain, out, lse, grad, dq, dk, dv, tokens, dim**-0.5, D=dim,
                                    B=32, CAUSAL=causal)  # fmt: skip
    for got, leaf in ((dq, q), (dk, k), (dv, v)):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-5)
