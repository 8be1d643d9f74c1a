"""What the commands share: measurements as JSON, checked options, one progress bar."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .atomic import atomic_write

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def console() -> Console:
    """Standard output for people: no markup, so that model output cannot style the terminal."""
    return Console(markup=False, highlight=False)


def progress(terminal: Console) -> Progress:
    """A progress bar with a free text field named `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=terminal,
    )


def write_json(path: Path | None, value: Mapping[str, Any]) -> None:
    """Write the measurements where `--json` asked for them."""
    if path is not None:
        atomic_write(path, json.dumps(value, indent=2) + "\n")


def check_writable(*paths: Path | None) -> None:
    """Fail before a long run, not after it. Raises OSError or ValueError."""
    for path in paths:
        if path is None:
            continue
        parent = path.resolve().parent
        if not parent.is_dir():
            raise ValueError(f"cannot write {path}: no such folder {parent}")
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder")
        _try_to_write(parent, f"cannot write {path}")


def check_folder(path: Path) -> None:
    """Fail before a long run if results could not be saved in `path`. Raises ValueError."""
    nearest = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    if not nearest.is_dir():
        raise ValueError(f"cannot save in {path}: {nearest} is a file")
    _try_to_write(nearest, f"cannot save in {path}")


def _try_to_write(folder: Path, refusal: str) -> None:
    # permissions alone do not tell: the file system may be read-only, or none that holds files
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{refusal}: {error.strerror} in {folder}") from None


def check_memory(needed: int, purpose: str) -> None:
    """Fail before the system ends the program. Raises ValueError."""
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return
    if needed > installed:
        raise ValueError(
            f"{purpose} takes {needed / 2**30:,.1f} GiB of memory, this machine has "
            f"{installed / 2**30:,.1f}"
        )


def parse_dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    try:
        # reading a value back tells devices that hold none
        return torch.empty(0, device=name).cpu().to(name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot use device {name!r}: {reason}") from None
