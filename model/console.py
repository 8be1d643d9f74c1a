"""What the commands share: measurements as JSON, checked options, one progress bar."""

from __future__ import annotations

import json
import os
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


def check_folder(path: Path) -> None:
    """Fail before a long run if results could not be saved in `path`. Raises ValueError."""
    nearest = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    if not nearest.is_dir():
        raise ValueError(f"cannot save in {path}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"cannot save in {path}: no permission to write in {nearest}")


def parse_dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot use device {name!r}: {reason}") from None
