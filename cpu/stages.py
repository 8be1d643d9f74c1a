"""The three stages of a compilation: Triton's own passes, C++ source, shared object."""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir, passes

from . import store
from .emitter import emit_module
from .parser import parse_module
from .target import binary_key, build


def make_ttir(module: Any, metadata: dict, options: Any) -> Any:
    """Inline, rewrite descriptors and block pointers to pointers, and clean up."""
    manager = ir.pass_manager(module.context)
    manager.enable_debug()
    passes.common.add_inliner(manager)
    passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
    if hasattr(passes.ttir, "add_rewrite_tensor_pointer"):
        passes.ttir.add_rewrite_tensor_pointer(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.common.add_symbol_dce(manager)
    passes.ttir.add_loop_unroll(manager)
    passes.ttir.add_triton_licm(manager)
    passes.common.add_canonicalizer(manager)
    passes.common.add_cse(manager)
    manager.run(module, "make_ttir")
    return module


def make_cpp(module: Any, metadata: dict, options: Any) -> str:
    """C++ of the kernel.

    Raises:
        Unsupported: the kernel uses what the backend refuses; the message names op and line.
    """
    parsed = parse_module(str(module))
    metadata["name"] = parsed.kernel.name
    metadata["shared"] = 0
    metadata["arguments"] = len(parsed.kernel.arguments)
    return emit_module(parsed, checked=options.checked)


def make_so(source: str, metadata: dict) -> bytes:
    """Shared object of the kernel, from the cache if the same C++ was built before.

    Triton's key has the argument properties in it; most of them leave no trace in the C++.
    """
    # a launch with checks is short: what counts is when it starts
    level = "-O1" if metadata["checked"] else "-O2"
    key = f"{binary_key()}|{level}|{source}"
    return store.kept(key, "kernel.so", lambda: build(source, level)).read_bytes()


def convert_custom_float(*args: Any, **kwargs: Any) -> Any:
    """fp8e4b15 is a software format of one GPU generation."""
    raise TypeError("fp8e4b15 is not supported on CPUs; use float8e4nv or float8e5")
