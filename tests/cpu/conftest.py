"""Every test here runs its kernels on the CPU backend."""

from __future__ import annotations

import pytest

import kexaone


@pytest.fixture(autouse=True)
def cpu_backend():
    with kexaone.cpu.active():
        yield
