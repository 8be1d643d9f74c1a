"""Warm launches: what Triton's own launches compute, found without it, for every argument."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton import knobs
from triton.runtime.jit import JITFunction

import kexaone.cpu
from kexaone.cpu.warm import MOST, jit


@jit
def _scaled_kernel(x, bias, out, n, start, factor, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + start + at, mask=at < n, other=0).to(tl.float32) * factor
    if HAS_BIAS:
        value += tl.load(bias + at, mask=at < n, other=0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@jit(do_not_specialize=["n"])
def _filled_kernel(out, n, value, BLOCK: tl.constexpr = 16):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, value, mask=at < n)


class _Counted:
    """Counts the launches that go through Triton."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, run = 0, JITFunction.run

        def counted(kernel: Any, *args: Any, **named: Any) -> Any:
            self.count += 1
            return run(kernel, *args, **named)

        monkeypatch.setattr(JITFunction, "run", counted)
        # what the kernels compare with, so that this is not taken for something that watches
        monkeypatch.setattr("kexaone.cpu.warm._run", counted)


def _check(x: torch.Tensor, bias: torch.Tensor | None, n: int, start: int, factor: Any) -> None:
    out = torch.full((n,), torch.nan, dtype=x.dtype)
    with kexaone.cpu.active():
        _scaled_kernel[(_blocks(n),)](x, bias, out, n, start, factor,
                                            HAS_BIAS=bias is not None, BLOCK=16)  # fmt: skip
    expected = x[start : start + n].float() * factor
    if bias is not None:
        expected = expected + bias[:n].float()
    assert torch.equal(out, expected.to(x.dtype))


def _blocks(n: int) -> int:
    return -(-n // 16)


@settings(deadline=None)
@given(st.data())
def test_launches_compute_what_their_own_arguments_say(data: st.DataObject) -> None:
    """Calls that differ in dtype, alignment, presence and class of every argument, interleaved."""
    storage = torch.arange(200)
    for _ in range(data.draw(st.integers(1, 6))):
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
        x = storage.to(dtype)[data.draw(st.sampled_from([0, 1, 16])) :]
        n, start = (
            data.draw(st.sampled_from([1, 2, 16, 33, 48])),
            data.draw(st.sampled_from([0, 1, 7])),
        )
        bias = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
        _check(x, None if bias is None else storage.to(bias), n, start,
               data.draw(st.sampled_from([0.5, 2.0, 3])))  # fmt: skip


def test_a_known_launch_does_not_go_through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    out, counted = torch.zeros(64), _Counted(monkeypatch)
    with kexaone.cpu.active():
        for n in (48, 33, 2**31 + 16, 48, 33):
            _filled_kernel[(4,)](out[:48] if n < 2**31 else out, n, float(n), BLOCK=16)
            assert out[47 if n == 48 else 32] == float(n)
        assert counted.count == 2  # narrow and wide n
        _filled_kernel[(4,)](out, 5, 7.0)
        assert counted.count == 3
        _filled_kernel[(4,)](out, 6, 7.0)
        assert counted.count == 3
        _filled_kernel[(4,)](out, 5, 7)
        assert counted.count == 4


def test_a_kernel_remembers_so_many_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    @jit
    def _tagged_kernel(out, TAG: tl.constexpr):
        tl.store(out, 1.0)

    out, counted = torch.zeros(1), _Counted(monkeypatch)
    compiled = _compile_once(_tagged_kernel, out, monkeypatch)
    for tag in range(MOST + 3):
        compiled(tag)
    seen = counted.count
    compiled(MOST + 2)
    compiled(0)
    assert counted.count == seen + 1


def _compile_once(kernel: Any, out: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launches for every tag with the kernel compiled for one."""
    compile, held = type(kernel)._do_compile, []

    def once(self: Any, key: Any, *args: Any, **named: Any) -> Any:
        if not held:
            held.append(compile(self, key, *args, **named))
        return held[0]

    monkeypatch.setattr(JITFunction, "_do_compile", once)

    def launch(tag: int) -> None:
        with kexaone.cpu.active():
            kernel[(1,)](out, TAG=tag)

    return launch


def test_what_watches_launches_sees_them() -> None:
    out, seen = torch.zeros(16), []
    with kexaone.cpu.active():
        _filled_kernel[(1,)](out, 16, 1.0)
        _filled_kernel[(1,)](out, 16, 2.0)
        hook = knobs.runtime.launch_enter_hook
        hook.add(seen.append)
        try:
            _filled_kernel[(1,)](out, 16, 3.0)
        finally:
            hook.remove(seen.append)
    assert len(seen) == 1
    assert torch.equal(out, torch.full((16,), 3.0))


def test_checked_mode_checks_a_warm_kernel() -> None:
    out = torch.zeros(16)
    with kexaone.cpu.active():
        _filled_kernel[(2,)](out, 16, 1.0)
        _filled_kernel[(2,)](out, 16, 2.0)
    with kexaone.cpu.checked(), pytest.raises(RuntimeError, match="test_warm"):
        _filled_kernel[(2,)](out, 32, 1.0)


def test_a_tensor_of_another_device_is_refused() -> None:
    out = torch.zeros(16)
    with kexaone.cpu.active():
        _filled_kernel[(1,)](out, 16, 1.0)
        with pytest.raises(Exception, match="host memory"):
            _filled_kernel[(1,)](out.to("meta"), 16, 1.0)


def test_threads_launch_one_kernel_at_once() -> None:
    storage, wrong = torch.arange(4096).float(), []

    def work(seed: int) -> None:
        for step in range(200):
            n = (16, 33, 1, 48)[(seed + step) % 4]
            try:
                _check(storage, storage if step % 3 else None, n, step % 8, 0.5 + seed)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
