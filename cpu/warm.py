"""`jit`: Triton's own, with warm launches on CPU tensors that take no path through Python.

A launch finds its compiled kernel by what its arguments specialise to. Triton works that out in
Python, in about 15 microseconds where its code is in the caches and ten times that where it is not.
Here each kernel remembers its launches, and C compares the arguments with them (`warm.c`). The
guards are as strict as Triton's own rules or stricter: the type, a tensor's dtype and whether its
address is a multiple of 16, whether an integer is 1, a multiple of 16, or takes 64 bits, and the
value of every constant. Whatever is new goes through Triton, as do checked mode, hooks, and
launches that something else watches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from triton import knobs
from triton.runtime.jit import JITFunction

from .activation import checking, in_scope

MOST = 64
"""Launches that a kernel remembers."""
_run = JITFunction.run


class Kernel(JITFunction):
    """A kernel that remembers how it was launched."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, *args: Any, **named: Any) -> Any:
        if not in_scope() or _watched(self) or checking() or type(grid) is not tuple:
            return self.run(*args, grid=grid, warmup=False, **named)
        memory = self.__dict__.get("_warm")
        if memory is None:
            from .launch import launcher_module

            memory = self.__dict__["_warm"] = launcher_module().warm()
        compiled = memory(grid, *args, **named)
        if compiled is None:
            compiled = self.run(*args, grid=grid, warmup=False, **named)
            if all(type(size) is int for size in grid):
                self._remember(memory, compiled, args, named)
        return compiled

    def _remember(self, memory: Any, compiled: Any, args: tuple, named: dict[str, Any]) -> None:
        launcher = compiled.run
        if type(launcher).__name__ != "Launcher" or len(memory) >= MOST:
            return
        names = [*self.arg_names[: len(args)], *named]
        by_name = {p.name: p for p in self.params}
        rules = "".join(_rule(by_name.get(n), v) for n, v in zip(names, (*args, *named.values()),
                                                                 strict=True))  # fmt: skip
        constant = [kind == "constexpr" for kind in compiled.src.signature.values()]
        taken = [n for n, left_out in zip(self.arg_names, constant, strict=True) if not left_out]
        if "?" in rules or not set(taken) <= set(names):
            return
        sources = bytes(names.index(name) for name in taken)
        memory.add((*args, *named.values()), tuple(named), rules, sources, launcher,
                   compiled.function, compiled)  # fmt: skip


def _watched(kernel: Kernel) -> bool:
    """Whether something expects to see the launch, or to change what is compiled."""
    runtime = knobs.runtime
    return bool(
        JITFunction.run is not _run
        or kernel.pre_run_hooks
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.add_stages_inspection_hook is not None
    )


def _rule(parameter: Any, value: Any) -> str:
    """The letter of the guard of one argument (see warm.c); `?` for one that no guard describes."""
    if parameter is None or parameter.is_constexpr or value is None or isinstance(value, bool):
        return "e"
    if isinstance(value, int):
        return "r" if parameter.do_not_specialize else "i"
    if isinstance(value, float):
        return "f"
    return "t" if hasattr(value, "data_ptr") else "?"


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, for kernels that are launched often; takes the same options."""
    from triton import jit as plain

    if function is None:
        return functools.partial(jit, **options)
    kernel = plain(function, **options)
    if type(kernel) is JITFunction:
        kernel.__class__ = Kernel
    return kernel
