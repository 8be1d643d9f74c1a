"""Triton for the kernel files, which can be imported, and run their plain code, without it.

Triton has no wheels for macOS and Windows. There every op runs its reference (`dispatch.explain`
says so), and what `@triton.jit` decorates is never called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    from ..cpu.warm import jit
else:
    try:
        import triton
        import triton.language as tl

        from ..cpu.warm import jit
    except ImportError as error:
        _reason = str(error)

        class _Missing:
            """Stands for any object of Triton's where kernels are only defined."""

            def __getattr__(self, name: str) -> _Missing:
                return self

            def __call__(self, *args: Any, **kwargs: Any) -> _Missing:
                return self

            def __getitem__(self, key: Any) -> None:
                raise ImportError(f"Triton kernels cannot be launched here: {_reason}")

        triton = tl = jit = _Missing()

__all__ = ["jit", "tl", "triton"]
