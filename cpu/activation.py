"""Turning the backend on in a scope: `with kexaone.cpu.active():`.

Triton keeps one driver per process. From the first scope on, that driver is a proxy which asks a
context variable: threads and tasks outside a scope still reach the driver that was there before.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_in_scope: ContextVar[bool] = ContextVar("kexaone_cpu_active", default=False)
_checking: ContextVar[bool] = ContextVar("kexaone_cpu_checking", default=False)
_lock = threading.Lock()
_installed: list[_Proxy] = []


class _Proxy:
    """Resolves every attribute on the CPU driver inside a scope, on the former one outside.

    Once installed it stays: a kernel that is collected after the last scope still asks the driver
    to unload it, and must not reach a foreign driver, nor one that cannot be built.
    """

    def __init__(self, config: Any) -> None:
        from .driver import CpuDriver

        self._config = config
        self._former = config._active
        self._cpu = CpuDriver()

    def _outside(self) -> Any:
        return self._former if self._former is not None else self._config.default

    @property
    def utils(self) -> Any:
        return self._cpu.utils if _in_scope.get() else _Utilities(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu if _in_scope.get() else self._outside(), name)


class _Utilities:
    """The former driver's utilities, never given a module of ours."""

    def __init__(self, proxy: _Proxy) -> None:
        self._proxy = proxy

    def unload_module(self, module: Any) -> None:
        if not isinstance(module, ctypes.CDLL):
            self._proxy._outside().utils.unload_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proxy._outside().utils, name)


def _install() -> None:
    """Make the proxy Triton's driver, also where Inductor put ours in its place for good."""
    if _installed and _installed[0]._config._active is _installed[0]:
        return
    from triton.runtime import driver

    with _lock:
        proxy = _installed[0] if _installed else _Proxy(driver)
        if not isinstance(driver._active, type(proxy._cpu) | _Proxy):
            proxy._former = driver._active
        _installed[:] = [proxy]
        driver.set_active(proxy)  # pyright: ignore[reportArgumentType]


class active:
    """Triton kernels launched in this scope, by this thread or task, run on the CPU."""

    # no generator: every op of ours enters it
    def __enter__(self) -> None:
        _install()
        self._token = _in_scope.set(True)

    def __exit__(self, *_: object) -> None:
        _in_scope.reset(self._token)
        _install()


def in_scope() -> bool:
    """Whether launches of this thread or task run on the CPU."""
    return _in_scope.get()


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
