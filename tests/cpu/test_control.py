"""Loops, branches, atomics and memory order."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def swap_kernel(x, y, n, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    for _ in range(n):
        a, b = b, a + b
    tl.store(x + at, a)
    tl.store(y + at, b)


def test_loop_carried_tiles_are_assigned_in_parallel():
    x, y = torch.arange(32.0), torch.arange(32.0) + 1
    a, b = x.clone(), y.clone()
    for _ in range(7):
        a, b = b, a + b
    swap_kernel[(1,)](x, y, 7, N=32)
    assert torch.equal(x, a) and torch.equal(y, b)


@triton.jit
def transposing_kernel(x, n, N: tl.constexpr):
    r = tl.arange(0, N)
    at = r[:, None] * N + r[None, :]
    a = tl.load(x + at)
    for _ in range(n):
        a = tl.trans(a) + tl.sum(a, 1)[:, None]
    tl.store(x + at, a)


def test_a_carried_tile_read_through_a_view_is_not_overwritten_early():
    x = torch.randint(-3, 4, (16, 16)).float()
    want = x.clone()
    for _ in range(4):
        want = want.T + want.sum(1)[:, None]
    transposing_kernel[(1,)](x, 4, N=16)
    assert torch.equal(x, want)


@triton.jit
def collatz_kernel(x, steps, N: tl.constexpr):
    pid = tl.program_id(0)
    value = tl.load(x + pid)
    count = 0
    while value != 1:
        if value % 2 == 0:  # noqa: SIM108  (both forms of a branch are compiled differently)
            value = value // 2
        else:
            value = 3 * value + 1
        count += 1
    if count > 100:
        tl.store(steps + pid, -1)
        return
    tl.store(steps + pid, count)


def test_while_if_and_early_return():
    x = torch.arange(1, 40, dtype=torch.int32)
    steps = torch.zeros_like(x)
    collatz_kernel[(len(x),)](x, steps, N=1)

    def count(v: int) -> int:
        n = 0
        while v != 1:
            v, n = (v // 2 if v % 2 == 0 else 3 * v + 1), n + 1
        return n if n <= 100 else -1

    assert steps.tolist() == [count(v) for v in x.tolist()]


@triton.jit
def tile_branch_kernel(x, flag, out, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    if tl.load(flag) > 0:  # noqa: SIM108
        value = tl.exp(value)
    else:
        value = value * 2 + tl.sum(value)
    tl.store(out + at, value)


@pytest.mark.parametrize("flag", [0, 1])
def test_branches_yield_tiles(flag):
    x, out = torch.randn(64), torch.empty(64)
    tile_branch_kernel[(1,)](x, torch.tensor([flag]), out, N=64)
    torch.testing.assert_close(out, x.exp() if flag else x * 2 + x.sum())


@triton.jit
def in_place_kernel(x, residual, out, N: tl.constexpr):
    at = tl.arange(0, N)
    h = tl.load(x + at) + tl.load(residual + at)
    tl.store(residual + at, h)
    scale = tl.sum(h * h)
    tl.store(out + at, h * scale)


def test_values_read_before_a_store_keep_their_value_after_it():
    x = torch.randint(-3, 4, (512,)).float()
    residual, out = x.clone(), torch.empty(512)
    in_place_kernel[(1,)](residual, residual, out, N=512)  # both arguments are one tensor
    h = x + x
    assert torch.equal(residual, h) and torch.equal(out, h * (h * h).sum())


@triton.jit
def load_after_store_kernel(x, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at)
    tl.store(x + at, a + 1)
    b = tl.load(x + (N - 1 - at))
    tl.store(x + at, a * 100 + b)


def test_loads_after_a_store_see_it():
    x = torch.arange(64.0)
    load_after_store_kernel[(1,)](x, N=64)
    a = torch.arange(64.0)
    assert torch.equal(x, a * 100 + (a + 1).flip(0))


@triton.jit
def atomic_kernel(x, total, high, low, bits, count, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + at)
    tl.atomic_add(total + value % 4, value)
    tl.atomic_max(high + value % 4, value)
    tl.atomic_min(low + value % 4, value)
    tl.atomic_or(bits + value % 4, value, mask=value > 5)
    tl.atomic_add(count, 1.0)


def test_atomics_of_many_programs():
    x = torch.randint(0, 1000, (4096,)).int()
    total, high = torch.zeros(4).int(), torch.full((4,), -1).int()
    low, bits, count = torch.full((4,), 9999).int(), torch.zeros(4).int(), torch.zeros(1)
    atomic_kernel[(64,)](x, total, high, low, bits, count, N=64)
    for k in range(4):
        part = x[x % 4 == k]
        assert total[k] == part.sum() and high[k] == part.max() and low[k] == part.min()
        want = 0
        for v in part[part > 5].tolist():
            want |= v
        assert bits[k] == want
    assert count.item() == 64


@triton.jit
def look_back_kernel(x, out, sums, flags, N: tl.constexpr):
    pid = tl.program_id(0)
    at = pid * N + tl.arange(0, N)
    value = tl.load(x + at)
    before = 0
    if pid > 0:
        while tl.atomic_add(flags + pid - 1, 0, sem="acquire") == 0:
            pass
        before = tl.load(sums + pid - 1)
    tl.store(sums + pid, before + tl.sum(value))
    tl.debug_barrier()
    tl.atomic_xchg(flags + pid, 1, sem="release")
    tl.store(out + at, tl.cumsum(value) + before)


def test_decoupled_look_back_terminates():
    x = torch.randint(0, 100, (200 * 64,)).int()
    out, sums, flags = torch.empty_like(x), torch.zeros(200).int(), torch.zeros(200).int()
    look_back_kernel[(200,)](x, out, sums, flags, N=64)
    assert torch.equal(out.long(), x.long().cumsum(0))


@triton.jit
def running_sum_kernel(x, y, z, sums, n, N: tl.constexpr, FORM: tl.constexpr):
    at = tl.arange(0, N)
    total, former = tl.zeros((N,), tl.float32), tl.full((N,), 5.0, tl.float32)
    for i in range(n):
        value = tl.load(x + i * N + at)
        new = total + value
        tl.store(y + i * N + at, value * 2)
        if FORM == "late":
            tl.store(z + i * N + at, total)
        if FORM == "former":
            tl.store(z + i * N + at, former)
            former = total
        if FORM == "turned":
            tl.store(z + i * N + at, tl.flip(total, 0))
        total = new
    tl.store(sums + at, total)
    tl.store(z + n * N + at, former)


@pytest.mark.parametrize("form", ["plain", "late", "former", "turned"])
def test_a_sum_that_a_store_follows_is_kept_in_place_only_where_the_old_one_is_not_read(form):
    n, width = 5, 64
    x = torch.randint(-9, 9, (n, width)).float()
    y, z, sums = torch.empty(n, width), torch.zeros(n + 1, width), torch.empty(width)
    running_sum_kernel[(1,)](x, y, z, sums, n, N=width, FORM=form)
    before = torch.cat([torch.zeros(1, width), x.cumsum(0)])
    assert torch.equal(sums, before[n]) and torch.equal(y, 2 * x)
    five = torch.full((1, width), 5.0)
    want = {"plain": torch.zeros(n, width), "late": before[:n], "turned": before[:n].flip(1),
            "former": torch.cat([five, before[: n - 1]])}  # fmt: skip
    assert torch.equal(z[:n], want[form])
    assert torch.equal(z[n:], before[n - 1 : n] if form == "former" else five)


@triton.jit
def cas_kernel(lock, value):
    while tl.atomic_cas(lock, 0, 1, sem="acquire") == 1:
        pass
    tl.store(value, tl.load(value) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0, sem="release")


def test_a_lock_of_compare_and_swap_excludes():
    lock, value = torch.zeros(1).int(), torch.zeros(1).int()
    cas_kernel[(500,)](lock, value)
    assert value.item() == 500


@triton.jit(noinline=True)
def helper(a, b):
    return a * 3 + b


@triton.jit
def call_kernel(out):
    pid = tl.program_id(0)
    tl.store(out + pid, helper(pid, 5))


def test_functions_that_are_not_inlined():
    out = torch.zeros(8).int()
    call_kernel[(8,)](out)
    assert out.tolist() == [3 * k + 5 for k in range(8)]


@triton.jit
def assert_kernel(x):
    value = tl.load(x + tl.program_id(0))
    tl.device_assert(value < 3, "value is too large")
    tl.device_print("value {of: x} -> loc(", value)


def test_device_assert_raises_with_its_line(capfd):
    assert_kernel[(2,)](torch.tensor([1, 2]).int(), debug=True)
    assert "value {of: x} -> loc(: (operand 0) 1" in capfd.readouterr().out
    with pytest.raises(RuntimeError, match=r"test_control.py:\d+: .*value is too large"):
        assert_kernel[(2,)](torch.tensor([1, 5]).int(), debug=True)


@triton.jit
def assembly_kernel(x):
    at = tl.arange(0, 16)
    y = tl.inline_asm_elementwise("add.u32 $0, $1, 1;", "=r,r", [tl.load(x + at)], dtype=tl.int32,
                                  is_pure=True, pack=1)  # fmt: skip
    tl.store(x + at, y)


def test_inline_assembly_is_refused_with_its_line():
    with pytest.raises(Exception, match=r"test_control.py:\d+.*elementwise_inline_asm"):
        assembly_kernel[(1,)](torch.zeros(16).int())


@triton.jit
def wait_kernel(flags, tile_flags, out, N: tl.constexpr):
    pid = tl.program_id(0)
    at = tl.arange(0, N)
    if pid > 0:
        seen = tl.load(flags + pid - 1, volatile=True)
        while seen == 0:
            seen = tl.load(flags + pid - 1, volatile=True)
        tile = tl.load(tile_flags + (pid - 1) * N + at, volatile=True)
        while tl.min(tile, 0) == 0:
            tile = tl.load(tile_flags + (pid - 1) * N + at, volatile=True)
        tl.store(out + pid, seen * 1000 + tl.sum(tile, 0))
        tl.store(flags + pid, seen + 1)
        tl.store(tile_flags + pid * N + at, tile + 1)
    else:
        tl.store(flags, 1)
        tl.store(tile_flags + at, at * 0 + 1)


def test_volatile_loads_look_at_memory_each_time():
    n, programs = 16, 64
    for _ in range(10):
        flags = torch.zeros(programs, dtype=torch.int32)
        tiles = torch.zeros(programs, n, dtype=torch.int32)
        out = torch.zeros(programs, dtype=torch.int32)
        wait_kernel[(programs,)](flags, tiles, out, N=n)
        assert torch.equal(out, torch.arange(programs, dtype=torch.int32) * (1000 + n))
