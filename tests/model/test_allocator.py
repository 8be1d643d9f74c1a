"""Memory that stays with the process, by the page faults of allocating the same again."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from kexaone.model.allocator import keep_freed_memory

PAGES = 2**26 // resource.getpagesize()


def _faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(2**26, dtype=torch.uint8).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_the_same_memory_is_used_again_in_the_scope_and_given_back_after_it() -> None:
    without = _faults()
    with keep_freed_memory():
        _faults()
        within = _faults()
        kept = _resident()
    after = _resident()
    assert within < without / 4
    assert after <= kept - PAGES // 2
    assert _faults() > without / 2
