"""What the commands share: checked options, one progress bar."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")]
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
