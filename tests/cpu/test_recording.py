"""Recorded launches run again: the same bits, new inputs, other threads left alone."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import triton
import triton.language as tl

import kexaone


@triton.jit
def _add(x, y, out, N, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    total = tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask) * scale
    tl.store(out + at, total, mask=mask)


def add(x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    out = torch.empty_like(x)
    _add[(triton.cdiv(len(x), 64),)](x, y, out, len(x), scale, BLOCK=64)
    return out


def test_replay_takes_new_inputs_and_keeps_what_it_needs() -> None:
    x, y = torch.arange(1000.0), torch.ones(1000)
    with kexaone.cpu.record() as recording:
        # the sum in between is held by nobody but the recording
        out = add(add(x, y, 3.0), x)
    assert len(recording) == 2 and torch.equal(out, 2 * x + 3)
    gc.collect()
    junk = [torch.full((1000,), float("nan")) for _ in range(8)]
    x.copy_(torch.randn(1000))
    recording.replay()
    assert torch.equal(out, x + 3 + x) and junk
    with kexaone.cpu.active():
        add(x, y)
    assert len(recording) == 2


def test_other_threads_and_empty_grids_are_not_recorded() -> None:
    x, done = torch.ones(8), []

    def elsewhere() -> None:
        with kexaone.cpu.active():
            done.append(add(x, x))

    with kexaone.cpu.record() as recording:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        add(x[:0], x[:0])
    recording.replay()
    assert len(recording) == 0 and torch.equal(done[0], torch.full((8,), 2.0))


def test_one_recording_at_a_time() -> None:
    with kexaone.cpu.record() as recording:
        with pytest.raises(RuntimeError, match="already"), kexaone.cpu.record():
            pass
        with pytest.raises(RuntimeError, match="under way"):
            recording.replay()
    with pytest.raises(KeyError), kexaone.cpu.record():
        raise KeyError
    with kexaone.cpu.record():
        pass


@triton.jit
def _gather(x, at, out):
    tl.store(out, tl.load(x + tl.load(at)))


def test_checked_replay_checks() -> None:
    x, at, out = torch.arange(4.0), torch.tensor([3]), torch.empty(1)
    with kexaone.cpu.checked(), kexaone.cpu.record() as recording:
        _gather[(1,)](x, at, out)
    assert out.item() == 3
    at.fill_(1)
    recording.replay()
    assert out.item() == 1
    at.fill_(4)
    with pytest.raises(RuntimeError, match=r"load out of bounds: .* index 4"):
        recording.replay()
