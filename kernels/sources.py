"""A hash of a Triton kernel's source that changes when, and only when, its meaning may.

Comments, docstrings, layout and the place in the file do not count; the functions and constants
that it uses, from wherever they come, do. Unlike Triton's own cache key it is the same for every
release of Triton and Python that reads the source alike.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from importlib import import_module
from typing import Any

LENGTH = 16
# hashes of kernels by name, for those that cannot be found by it; `source_hash` adds to it
_known: dict[str, str] = {}


def name_of(kernel: Any) -> str:
    """`module:qualified name` of a `@triton.jit` kernel."""
    return f"{kernel.__module__}:{kernel.__qualname__}"


def source_hash(kernel: Any) -> str:
    """The hash of a `@triton.jit` kernel with all that it uses."""
    found = _known[name_of(kernel)] = _hash(kernel.fn)
    return found


def hash_of_name(name: str) -> str:
    """The hash of the kernel that `name_of` calls so; empty if there is none."""
    if name in _known:
        return _known[name]
    module, _, path = name.partition(":")
    try:
        found: Any = sys.modules.get(module) or import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        return source_hash(found)
    except (ImportError, AttributeError):
        return ""


@functools.lru_cache(maxsize=1024)
def _hash(function: Any) -> str:
    parts: dict[str, str] = {}
    _collect(function, parts)
    text = "\n".join(f"{name}={parts[name]}" for name in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _collect(function: Any, parts: dict[str, str]) -> None:
    """The source of a kernel's Python function, and of what it names, into `parts`."""
    name = f"{function.__module__}:{function.__qualname__}"
    if name in parts:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    first = definition.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        definition.body = definition.body[1:] or [ast.Pass()]
    parts[name] = ast.unparse(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            _refer(node.id, function.__globals__.get(node.id), parts)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            home = function.__globals__.get(node.value.id)
            _refer(f"{node.value.id}.{node.attr}", getattr(home, node.attr, None), parts)


def _is_kernel(value: Any) -> bool:
    return any(kind.__name__ == "JITFunction" for kind in type(value).__mro__)


def _refer(name: str, value: Any, parts: dict[str, str]) -> None:
    """Adds what a name stands for: a kernel with its source, a constant with its value."""
    if isinstance(value, bool | int | float | str):
        parts[f"constant {name}"] = repr(value)
    elif type(value).__name__ == "constexpr":
        parts[f"constant {name}"] = repr(value.value)
    elif _is_kernel(value) and not value.__module__.startswith("triton."):
        _collect(value.fn, parts)
