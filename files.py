"""Replacing files and folders so that a crash leaves either the old or the new one, never a mix.

Every part may import this module; it imports none of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    with _temporary(target, Path.mkdir) as new:
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
    """Replace the file `path` by `data` (a string is written as UTF-8); a pipe is written to.

    Raises OSError, which names the path.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    if _is_pipe(path):
        path.write_bytes(content)
        return
    path = path.resolve()
    _remove_abandoned(path)
    try:
        with _temporary(path, Path.touch) as new:
            _write_over(path, new, content)
    except OSError as error:
        if error.filename is None and error.errno:
            # a write that the system refuses does not say where it went
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync(path.parent)


def _write_over(path: Path, new: Path, content: bytes) -> None:
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_json(
    path: Path | None, value: Any, *, default: Callable[[Any], Any] | None = None
) -> None:
    """Write measurements where `--json` asked for them; `default` as for `json.dumps`."""
    if path is not None:
        atomic_write(path, json.dumps(value, indent=2, default=default) + "\n")


def check_writable(*paths: Path | None) -> None:
    """Fail before a long run, not after it. Raises OSError or ValueError."""
    for path in paths:
        if path is None or _is_pipe(path):
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


def _is_pipe(path: Path) -> bool:
    """Whether it is there, and nothing that could be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _try_to_write(folder: Path, refusal: str) -> None:
    # permissions alone do not tell: the file system may be read-only, or none that holds files
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{refusal}: {error.strerror} in {folder}") from None


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def _temporary(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """What `make` makes beside `target`, locked while its writer lives."""
    while True:
        new = _sibling(target, "tmp")
        make(new)
        # another process may take it for abandoned before it is locked
        with _locked(new) as held:
            if held is not False and new.exists():
                yield new
                return


@contextmanager
def _locked(path: Path) -> Iterator[bool | None]:
    """Hold the lock of a file or folder; a process that ends lets go of it.

    Yields False if another process holds or has removed it, None where the system has no locks.
    """
    held = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
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
            if held and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif held:
                left.unlink()


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
