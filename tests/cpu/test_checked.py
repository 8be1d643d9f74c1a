"""Checked mode finds planted faults at their line, and nothing in correct kernels."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import triton
import triton.language as tl

import kexaone


@pytest.fixture(autouse=True)
def checks(cpu_backend):
    with kexaone.cpu.checked():
        yield


def fault(kernel, grid, *args, **meta) -> str:
    with pytest.raises(RuntimeError) as caught:
        kernel[grid](*args, **meta)
    return str(caught.value)


def line_of(kernel, text: str) -> int:
    """Number of the source line of a kernel that holds `text`."""
    lines, first = inspect.getsourcelines(kernel.fn)
    return first + next(i for i, line in enumerate(lines) if text in line)


def expect(message: str, kernel, text: str, *parts: str) -> None:
    assert re.search(rf"test_checked\.py:{line_of(kernel, text)}\b", message), message
    assert all(part in message for part in parts), message


@triton.jit
def no_mask_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(out + at, value, mask=at < n)


def test_load_out_of_bounds():
    x, out = torch.ones(100), torch.zeros(100)
    message = fault(no_mask_kernel, (2,), x, out, 100, BLOCK=64)
    expect(message, no_mask_kernel, "tl.load", "load out of bounds", "program (1, 0, 0)",
           "argument 'x', index 100")  # fmt: skip


def test_a_view_is_checked_against_its_own_extent():
    x, out = torch.ones(200)[:100], torch.zeros(100)
    assert "index 100" in fault(no_mask_kernel, (2,), x, out, 100, BLOCK=64)


@triton.jit
def before_kernel(out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at - 1, at)


def test_store_before_the_start():
    message = fault(before_kernel, (1,), torch.zeros(64).int(), BLOCK=64)
    expect(message, before_kernel, "tl.store", "store out of bounds", "argument 'out', index -1")


@triton.jit
def racing_kernel(x, total, ATOMIC: tl.constexpr):
    value = tl.load(x + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(total, value)
    else:
        tl.store(total, tl.load(total) + value)


def test_two_programs_write_one_element():
    x, total = torch.ones(8), torch.zeros(1)
    message = fault(racing_kernel, (8,), x, total, ATOMIC=False)
    expect(message, racing_kernel, "tl.store", "race", "program (1, 0, 0)", "argument 'total'",
           "other program (0, 0, 0)")  # fmt: skip


def test_atomics_do_not_race():
    x, total = torch.ones(8), torch.zeros(1)
    racing_kernel[(8,)](x, total, ATOMIC=True)
    assert total.item() == 8


@triton.jit
def neighbour_kernel(x, n):
    pid = tl.program_id(0)
    value = tl.load(x + (pid + 1) % n)
    tl.store(x + pid, value)


def test_reading_what_a_neighbour_writes():
    message = fault(neighbour_kernel, (4,), torch.arange(4.0), 4)
    assert "race" in message and "argument 'x'" in message


@triton.jit
def lock_kernel(lock, value):
    while tl.atomic_cas(lock, 0, 1, sem="acquire") == 1:
        pass
    tl.store(value, tl.load(value) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0, sem="release")


@triton.jit
def broken_lock_kernel(lock, value):
    while tl.atomic_cas(lock, 0, 1, sem="relaxed") == 1:
        pass
    tl.store(value, tl.load(value) + 1)
    tl.atomic_xchg(lock, 0, sem="relaxed")


def test_a_lock_orders_what_it_guards_unless_it_is_relaxed():
    lock, value = torch.zeros(1).int(), torch.zeros(1).int()
    lock_kernel[(20,)](lock, value)
    assert value.item() == 20
    assert "race" in fault(broken_lock_kernel, (20,), lock, value)


@triton.jit
def overflow_kernel(x, out, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) + 70_000
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + row * stride * 0 + at))


def test_int32_overflow_of_an_address():
    x, out = torch.ones(16), torch.zeros(16)
    message = fault(overflow_kernel, (1,), x, out, 40_000, BLOCK=16)
    expect(message, overflow_kernel, "row * stride", "overflow")


@triton.jit
def scale_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def test_memory_that_nothing_wrote():
    x, out = torch.empty(64), torch.empty(64)
    x[:40] = 1
    message = fault(scale_kernel, (2,), x, out, 64, BLOCK=32)
    expect(message, scale_kernel, "tl.load", "nothing wrote", "argument 'x', index 40")
    x[40:] = 1
    scale_kernel[(2,)](x, out, 64, BLOCK=32)
    assert (out == 2).all()


@triton.jit
def product_kernel(a, b, out, N: tl.constexpr):
    r, c = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(a + r * N + c), tl.load(b + r * N + c)
    tl.store(out + r * N + c, tl.dot(x, y) + tl.sum(x, 1)[:, None])


def test_correct_kernels_compute_as_always():
    a, b, out = torch.randn(32, 32), torch.randn(32, 32), torch.empty(32, 32)
    product_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a @ b + a.sum(1, keepdim=True))


@triton.jit
def few_rows_kernel(x, w, out, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                    TURNED: tl.constexpr):  # fmt: skip
    """A weight is loaded before integer arithmetic that checked mode asserts about."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    if TURNED:
        b = tl.trans(tl.load(w + n[:, None] * K + k[None, :]))
    else:
        b = tl.load(w + n[None, :] * K + k[:, None])
    row = m * stride
    a = tl.load(x + row + k[None, :])
    tl.store(out + m * N + n[None, :], tl.dot(a, b, input_precision="ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("turned", [False, True])
def test_products_add_in_the_same_order_as_without_the_checks(dtype, rows, turned):
    x, w = torch.randn(rows, 96).to(dtype), torch.randn(32, 64).to(dtype)
    found = []
    for checked in (True, False):
        out = torch.zeros(rows, 32)
        few_rows_kernel[(1,)](x, w, out, 96, M=rows, N=32, K=64, TURNED=turned, checked=checked)
        found.append(out)
    assert torch.equal(*found)
