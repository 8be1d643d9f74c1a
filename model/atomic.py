"""Replacing files and folders so that a crash leaves either the old or the new one, never a mix."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: what a killed save leaves stays until someone removes it
    fcntl = None

STALE = (".safetensors", ".safetensors.index.json")
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` when the block ends without error.

    Files that an existing `target` has and the new folder lacks are carried over, except weights
    (`*.safetensors` and their index): those would belong to another model. Symbolic links are
    followed. If the block raises, the new folder is removed and `target` stays as it was. What
    killed processes left of such folders is removed first.

    Raises:
        NotADirectoryError: if `target` is a file.
        OSError: if the file system refuses; `target` is then unchanged.
    """
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    with _new_folder(target) as new:
        try:
            yield new
            _sync_tree(new)
            if target.is_dir():
                _carry_over(target, new, top=True)
                shutil.copymode(target, new)
            _sync(new)
            _swap(new, target)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    _sync(target.parent)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace the file `path` by `data` (a string is written as UTF-8). Raises OSError."""
    path = Path(path).resolve()
    new = _sibling(path, "tmp")
    try:
        with open(new, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno:
            # a write that the system refuses does not say where it went
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync(path.parent)


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, locked while its writer lives."""
    while True:
        new = _sibling(target, "tmp")
        new.mkdir()
        with _locked(new) as held:
            # another process may have taken it for abandoned before it was locked
            if held is not False and new.exists():
                yield new
                return


@contextmanager
def _locked(path: Path) -> Iterator[bool | None]:
    """Hold the lock of a folder; a process that ends lets go of it.

    Yields False if another process holds it, None where the system has no locks.
    """
    held = None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                held = False
            except OSError:
                held = None
        yield held
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    for left in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        with contextlib.suppress(OSError), _locked(left) as held:
            if held:
                shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                _sync(path)
        _sync(Path(folder))


def _carry_over(old: Path, new: Path, *, top: bool) -> None:
    for source in old.iterdir():
        goal = new / source.name
        if top and source.name.endswith(STALE):
            continue
        if source.is_symlink():
            # a relative link stays right: the new folder ends up where the old one is
            if not goal.exists():
                goal.symlink_to(os.readlink(source))
        elif source.is_dir():
            if goal.exists() and not goal.is_dir():
                continue
            goal.mkdir(exist_ok=True)
            _carry_over(source, goal, top=False)
            _sync(goal)
        elif not goal.exists():
            try:
                os.link(source, goal)
            except OSError:
                shutil.copy2(source, goal)
                _sync(goal)


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target` and remove what was there."""
    if not target.exists():
        os.rename(new, target)
        return
    old = new
    if not _exchange(new, target):
        old = _sibling(target, "old")
        os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(old, target)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step; False where the system or file system cannot."""
    with contextlib.suppress(OSError, AttributeError):
        call = ctypes.CDLL(None).renameat2
        return call(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0
    return False
