"""Built files in Triton's cache folder: whole or not used, and clear words where none can be kept.

Triton renames what it has written whole, so a process killed in between leaves no half file. A file
can still be damaged later, by a full disk, a crash of the machine or a careless copy; loading it
could end the process. Each built file therefore ends with a digest of itself, which the loader of
shared objects does not look at.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from triton import knobs
from triton.runtime.cache import get_cache_manager

_SEAL_BYTES = 32
# more than any kernel; as much must be free before one is built
_ROOM_BYTES = 1 << 18


def seal(built: bytes) -> bytes:
    """A built file with the digest that `is_whole` looks for."""
    return built + hashlib.sha256(built).digest()


def is_whole(sealed: bytes) -> bool:
    built, digest = sealed[:-_SEAL_BYTES], sealed[-_SEAL_BYTES:]
    return bool(built) and hashlib.sha256(built).digest() == digest


def kept(key: str, name: str, make: Callable[[], bytes]) -> Path:
    """The sealed file of a key, made and put into the cache if it is not there whole."""
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    found = cache.get_file(name)
    if found is not None and is_whole(Path(found).read_bytes()):
        return Path(found)
    made = seal(make())
    try:
        return Path(cache.put(made, name, binary=True))
    except OSError as error:
        raise _refuse(error) from None


def require_folder() -> None:
    """Refuse a cache folder that is no folder and cannot become one, before Triton stumbles on it.

    Raises:
        RuntimeError: names the folder and the reason.
    """
    try:
        os.makedirs(knobs.cache.dir, exist_ok=True)
    except OSError as error:
        raise _refuse(error) from None


def require_room() -> None:
    """Refuse a cache folder that takes no new files.

    Raises:
        RuntimeError: names the folder and the reason.
    """
    probe = Path(knobs.cache.dir, f"tmp.kexaone_{os.getpid()}_{os.urandom(4).hex()}")
    try:
        try:
            probe.write_bytes(bytes(_ROOM_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _refuse(error) from None


def _refuse(error: OSError) -> RuntimeError:
    return RuntimeError(
        f"Triton's cache folder {knobs.cache.dir} cannot be used: {error.strerror}. "
        "Set TRITON_CACHE_DIR to a folder that can be written to."
    )
