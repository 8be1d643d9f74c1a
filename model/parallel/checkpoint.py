"""Checkpoints that several ranks write together (torch.distributed.checkpoint).

Every rank writes what it holds; any number of ranks, one included, reads it back.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from .ranks import Ranks

STATE, RECORD = "state", "trainer.json"


def save_state(state: Mapping[str, Tensor], target: Path, ranks: Ranks, text: str) -> None:
    """Write the folder `target` with `state` and, in trainer.json, `text`: whole or not at all.

    All ranks must call it.

    Raises:
        OSError: on every rank, if one cannot write; `target` is unchanged.
    """
    new = target.with_name(f".{target.name}.tmp-shared")
    failure: str | None = None
    try:
        if ranks.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
    except OSError as error:
        failure = str(error)
    _agree(failure, ranks, new)
    try:
        save(dict(state), checkpoint_id=new / STATE, no_dist=ranks.world == 1)
        if ranks.rank == 0:
            (new / RECORD).write_text(text)
    except (OSError, CheckpointException) as error:
        failure = _reason(error)
    _agree(failure, ranks, new)
    failure = None
    try:
        if ranks.rank == 0:
            _sync(new)
            if target.exists():
                old = target.with_name(f".{target.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            new.rename(target)
            _sync_folder(target.parent)
    except OSError as error:
        failure = str(error)
    _agree(failure, ranks, new)


def load_state(state: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Fill the tensors of `state` from a folder; their sharding may be another than the saved.

    Raises:
        ValueError: the folder is damaged or holds other tensors.
    """
    try:
        with warnings.catch_warnings():
            # said of one process even when it is told so
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(dict(state), checkpoint_id=folder / STATE, no_dist=ranks.world == 1)
    except (Exception, CheckpointException) as error:  # the reader's errors have no common type
        raise ValueError(f"cannot read {folder / STATE}: {_reason(error)}") from error


def _agree(failure: str | None, ranks: Ranks, new: Path) -> None:
    """Raise OSError on all ranks if one has failed, once none writes any more."""
    found = [what for what in ranks.gather(failure) if what]
    if not found:
        return
    if ranks.rank == 0:
        shutil.rmtree(new, ignore_errors=True)
    if ranks.world > 1:
        dist.barrier()
    raise OSError(f"cannot save {new.name.removesuffix('.tmp-shared')[1:]}: {found[0]}")


def _reason(error: BaseException) -> str:
    """The cause of what a rank of the checkpoint library has reported, in a line."""
    failures = getattr(error, "failures", None) or {}
    for rank, (cause, *_) in failures.items():
        return f"rank {rank}: {_reason(cause)}"
    text = " ".join(str(error).split()) or type(error).__name__
    # torch's writer of archives does not say what the system has told it
    return "the file system refuses to write" if "inline_container" in text else text


def _sync(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            _sync_folder(Path(folder, name))
        _sync_folder(Path(folder))


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
