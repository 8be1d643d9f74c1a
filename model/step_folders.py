"""The folders of a run's checkpoints, step-NNNNNNNN, under their final names only when whole."""

from __future__ import annotations

import base64
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from .parallel.checkpoint import RECORD

KEPT_CHECKPOINTS = 2


def folder_of(step: int) -> str:
    return f"step-{step:08d}"


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole step folder of a run, or None."""
    return max(whole(Path(folder)), key=step_of, default=None)


def whole(folder: Path) -> list[Path]:
    """Step folders under their final name, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if step_of(p) >= 0 and (p / RECORD).is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else -1


def remove(folder: Path, pattern: str) -> None:
    for doomed in folder.glob(pattern):
        shutil.rmtree(doomed)


def random_state(text: str) -> Tensor:
    """Torch's CPU random state from base64, checked but not set."""
    data = bytearray(base64.b64decode(text, validate=True))
    size = len(torch.get_rng_state())
    if len(data) != size:
        raise ValueError(f"the random state must have {size} bytes, got {len(data)}")
    state = torch.frombuffer(data, dtype=torch.uint8)
    torch.Generator().set_state(state)
    return state


def drop_old(folder: Path) -> None:
    """Keep the last `KEPT_CHECKPOINTS` and nothing half-written."""
    for old in whole(folder)[:-KEPT_CHECKPOINTS]:
        # renamed first: a kill in the middle must not leave half a folder under a good name
        old.rename(old.with_name(f".{old.name}.old"))
    remove(folder, ".step-*")
