"""kexaone: kernels, autotuner, graph compiler and the complete K-EXAONE model.

The names below are the whole public API. They are loaded on first use: importing kexaone imports
neither torch nor Triton and changes no global state.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model.config import Config as Config
    from .model.transformer import KExaone as KExaone

__version__ = "0.1.0"

_HOMES = {"Config": ".model.config", "KExaone": ".model.transformer"}

__all__ = ["Config", "KExaone"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kexaone' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
