"""Turning the backend on in a scope: `with kexaone.cpu.active():`.

Triton keeps one driver per process. For the time that any scope is open, that driver is a proxy
which asks a context variable: threads and tasks outside the scope still reach the driver that was
there before.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_in_scope: ContextVar[bool] = ContextVar("kexaone_cpu_active", default=False)
_checking: ContextVar[bool] = ContextVar("kexaone_cpu_checking", default=False)
_lock = threading.Lock()


class _Proxy:
    """Resolves every attribute on the CPU driver inside a scope, on the former one outside."""

    def __init__(self, config: Any) -> None:
        from .driver import CpuDriver

        self._config = config
        self._former = config._active
        self._cpu = CpuDriver()
        self._scopes = 0

    def __getattr__(self, name: str) -> Any:
        if _in_scope.get():
            return getattr(self._cpu, name)
        former = self._former if self._former is not None else self._config.default
        return getattr(former, name)


@contextmanager
def active() -> Iterator[None]:
    """Triton kernels launched in this scope, by this thread or task, run on the CPU."""
    from triton.runtime import driver

    with _lock:
        proxy = driver._active
        if not isinstance(proxy, _Proxy):
            proxy = _Proxy(driver)
            driver.set_active(proxy)  # pyright: ignore[reportArgumentType]
        proxy._scopes += 1
    token = _in_scope.set(True)
    try:
        yield
    finally:
        _in_scope.reset(token)
        with _lock:
            proxy._scopes -= 1
            if proxy._scopes == 0 and driver._active is proxy:
                driver._active = proxy._former


def checking() -> bool:
    """Whether kernels compiled now carry the checks of `kexaone.cpu.checked()`."""
    return _checking.get() or os.environ.get("KEXAONE_CPU_CHECKED", "0") not in ("", "0")


@contextmanager
def checked() -> Iterator[None]:
    """`active()`, with every memory access checked. A fault raises `RuntimeError`.

    Found are accesses out of a tensor's bounds, races between programs, signed integer overflow,
    and reads of memory that `torch.empty` and its kin returned in this scope and nothing wrote.
    """
    from .poison import PoisonedEmpty

    token = _checking.set(True)
    try:
        with active(), PoisonedEmpty():
            yield
    finally:
        _checking.reset(token)
