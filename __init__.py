"""kexaone: kernels, autotuner, graph compiler and the complete K-EXAONE model.

The names below are the whole public API. They are loaded on first use: importing kexaone imports
neither torch nor Triton and changes no global state.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import cpu as cpu
from . import ops as ops

if TYPE_CHECKING:
    from .autotune.user_kernels import tune as tune
    from .autotune.why import why as why
    from .graph.backend import optimize as optimize
    from .graph.huggingface import register_with_transformers as register_with_transformers
    from .kernels.dispatch import impl as impl
    from .model.config import Config as Config
    from .model.transformer import KExaone as KExaone

__version__ = "0.1.0"

# `cpu` has no __init__.py (it would shadow a foreign package of that name in a checkout on the
# path), so its public names are resolved from here.
_CPU_HOMES = {"active": ".activation", "checked": ".activation", "record": ".recording"}
_HOMES = {
    "Config": ".model.config",
    "KExaone": ".model.transformer",
    "impl": ".kernels.dispatch",
    "optimize": ".graph.backend",
    "register_with_transformers": ".graph.huggingface",
    "tune": ".autotune.user_kernels",
    "why": ".autotune.why",
}

__all__ = [
    "Config",
    "KExaone",
    "cpu",
    "impl",
    "ops",
    "optimize",
    "register_with_transformers",
    "tune",
    "why",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kexaone' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def _cpu_name(name: str) -> Any:
    if name not in _CPU_HOMES:
        raise AttributeError(f"module 'kexaone.cpu' has no attribute {name!r}")
    return getattr(import_module(_CPU_HOMES[name], cpu.__name__), name)


cpu.__dict__["__getattr__"] = _cpu_name


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
