"""Loading shared objects and building the launcher of a compiled kernel."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from . import store
from .target import build, build_key, temporary_folder

# cache key and file name of the kernel that Triton loads next in this thread
_next = threading.local()

# kinds of the C launcher, one letter per argument
_FLOAT_KINDS = {"fp64": "d", "fp32": "f", "f32": "f", "fp16": "h", "bf16": "y"}


def load(name: str, binary: bytes) -> tuple[ctypes.CDLL, int]:
    """Load a kernel and return the library (which keeps it alive) and the entry's address.

    Raises:
        RuntimeError: the kernel is damaged, and what it was built from as well.
    """
    if not store.is_whole(binary):
        binary = _rebuild(name, binary)
    with temporary_folder() as folder:
        file = Path(folder, "kernel.so")
        file.write_bytes(binary)
        library = ctypes.CDLL(str(file))
    address = ctypes.cast(getattr(library, "kx_entry"), ctypes.c_void_p).value  # noqa: B009
    assert address is not None
    return library, address


def _rebuild(name: str, damaged: bytes) -> bytes:
    """Build a kernel again from the C++ that Triton keeps beside it, and put it in its place."""
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    key, file = getattr(_next, "kernel", ("", ""))
    cache = get_cache_manager(key)
    binary, source = (cache.get_file(f"{file}.{ending}") for ending in ("so", "cpp"))
    try:
        if not (binary and source) or Path(binary).read_bytes() != damaged:
            raise RuntimeError("its source is not there")
        built = store.seal(build(Path(source).read_text()))
    except (RuntimeError, UnicodeDecodeError) as error:
        where = f"is damaged in Triton's cache folder {knobs.cache.dir}"
        raise RuntimeError(f"the kernel {name} {where}: delete that folder") from error
    cache.put(built, f"{file}.so", binary=True)
    return built


@functools.lru_cache(maxsize=1)
def launcher_module() -> ModuleType:
    """The C launcher, built once per machine and kept in Triton's cache folder."""
    name = "kexaone_cpu_launcher"
    include = sysconfig.get_paths()["include"]
    key = f"{build_key()}|{include}|{sysconfig.get_config_var('SOABI')}"

    def make() -> bytes:
        here = Path(__file__).parent
        source = (here / "launcher.c").read_text()
        return build(source, f"-I{include}", f"-I{here}", "-x", "c", "-std=gnu11", language="c")

    path = store.kept(key, f"{name}.so", make)
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def span(value: Any) -> tuple[int, int]:
    """First address and end of a tensor; all memory for raw addresses."""
    if not hasattr(value, "element_size"):
        return 0, 2**64 - 1
    start = value.data_ptr()
    if value.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return start, start + value.element_size() * (last + 1)


def _kind(ty: str) -> str:
    if ty == "constexpr":
        return "-"
    if ty.startswith("*"):
        return "p"
    return _FLOAT_KINDS.get(ty, "i")


def _flatten(ty: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Kinds and plain values of one argument: tuples and host descriptors are expanded."""
    if isinstance(ty, tuple):
        for inner_type, inner in zip(ty, value, strict=True):
            yield from _flatten(inner_type, inner)
    elif ty.startswith("tensordesc"):
        yield "p", value.base
        sizes = [*value.shape, *value.strides]
        yield from (("i", size) for size in sizes)
        yield "i", getattr(value, "padding", "zero") == "nan"
        if hasattr(value, "round_f32_to_tf32"):  # from Triton 3.7
            yield "i", value.round_f32_to_tf32
        yield from (("i", size) for size in sizes)
    else:
        yield _kind(ty), value


def make_launcher(source: Any, metadata: Any) -> Callable[..., None]:
    """The callable that Triton uses for `kernel[grid](...)` (see launcher.c for its arguments)."""
    # Triton makes a kernel's launcher right before it loads the kernel
    _next.kernel = metadata.hash, source.name[:150]
    signature = tuple(source.signature.values())
    make = launcher_module().make
    spans = span if metadata.checked else None
    if not any(isinstance(t, tuple) or str(t).startswith("tensordesc") for t in signature):
        return make("".join(_kind(t) for t in signature), spans)
    launchers: dict[str, Callable[..., None]] = {}

    def launch(*arguments: Any) -> None:
        flat = [p for t, v in zip(signature, arguments[9:], strict=True) for p in _flatten(t, v)]
        kinds = "".join(kind for kind, _ in flat)
        if kinds not in launchers:
            if len(kinds) - kinds.count("-") != metadata.arguments:
                raise RuntimeError(f"the descriptors of {source.name} are not those of this Triton")
            launchers[kinds] = make(kinds, spans)
        launchers[kinds](*arguments[:9], *(value for _, value in flat))

    return launch
