"""Launches recorded once and run again without Python: what CUDA graphs are on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from .activation import active


class Recording(Protocol):
    """Launches with the arguments they had; the tensors among them stay alive with it."""

    def replay(self) -> None:
        """Run all launches again, in order. Raises RuntimeError on what checked mode finds."""
        ...

    def __len__(self) -> int: ...


@contextmanager
def record() -> Iterator[Recording]:
    """Record the Triton launches of this thread in this scope; they also run.

    Only launches are recorded. A replay reads and writes the same memory as before, so new inputs
    are copied into the old ones, and whatever PyTorch's own operators did in between is not done
    again. One recording at a time in a process.

    Raises:
        RuntimeError: another recording is under way.
    """
    from .launch import launcher_module

    module = launcher_module()
    recording = module.begin()
    try:
        with active():
            yield recording
    finally:
        module.end()
