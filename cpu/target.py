"""The machine and the C++ compiler: what to build for, and how.

Features are read at run time. `KEXAONE_CPU_ISA` (avx512, avx2, baseline) narrows them, and `CXX`
names the compiler; both are part of every cache key.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Contraction is off so that TTIR's mulf + addf stay two roundings; NaN and signed zero rules stay.
_FLAGS = [
    "-O2", "-std=gnu++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off",
    "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fno-strict-aliasing",
    # a loop that waits for another program must not be taken to end
    "-fno-finite-loops", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-w",
]  # fmt: skip
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")


@dataclass(frozen=True)
class Isa:
    """Instruction set: compiler flags and bytes per vector register."""

    name: str
    vector_bytes: int
    flags: tuple[str, ...]


def choose_isa(machine: str, features: frozenset[str], limit: str = "") -> Isa:
    """The widest instruction set that the features allow, no wider than `limit`."""
    if machine in ("aarch64", "arm64"):
        # not bf16: bfdot rounds otherwise than every other machine here
        return Isa("neon", 16, ("-march=armv8-a" + "+lse" * ("atomics" in features),))
    common = tuple(f"-m{f}" for f in ("fma", "f16c", "bmi2") if f in features)
    if limit in ("", "avx512") and features.issuperset(_AVX512):
        optional = tuple(
            flag
            for feature, flag in (("avx512_bf16", "-mavx512bf16"), ("avx512vbmi", "-mavx512vbmi"))
            if feature in features
        )
        flags = (*common, *(f"-m{f}" for f in _AVX512), *optional, "-mprefer-vector-width=512")
        return Isa("avx512", 64, flags)
    if limit in ("", "avx512", "avx2") and {"avx2", "fma", "f16c"} <= features:
        return Isa("avx2", 32, ("-mavx2", *common))
    return Isa("baseline", 16, ())


@functools.lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """Feature words of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    rows = (line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(rows, "").split())


def host_isa() -> Isa:
    return _host_isa(os.environ.get("KEXAONE_CPU_ISA", ""))


@functools.lru_cache(maxsize=8)
def _host_isa(limit: str) -> Isa:
    return choose_isa(platform.machine(), host_features(), limit)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command with the program's absolute path, and its version."""

    command: tuple[str, ...]
    version: str


def host_compiler() -> Compiler:
    """$CXX, which may have arguments; g++ or clang++ where it is not set.

    Raises:
        RuntimeError: $CXX is not to be found or does not run; without it, neither is installed.
    """
    return _compiler(os.environ.get("CXX", "").strip())


@functools.lru_cache(maxsize=8)
def _compiler(asked: str) -> Compiler:
    if not asked:
        path = shutil.which("g++") or shutil.which("clang++")
        if path is None:
            raise RuntimeError("the CPU backend needs a C++ compiler: install g++ or clang++")
        return _compiler(shlex.quote(path))
    program, *arguments = [asked] if shutil.which(asked) else shlex.split(asked)
    path = shutil.which(program)
    if path is None:
        raise RuntimeError(f"the C++ compiler that CXX asks for is not installed: {asked}")
    command = (os.path.abspath(path), *arguments)
    said = _run((*command, "--version")).splitlines()
    return Compiler(command, said[0] if said else "")


def _run(command: tuple[str, ...], **variables: str) -> str:
    """What a run of the compiler prints.

    Raises:
        RuntimeError: it fails; its own words are in the message.
        OSError: it fails for want of room.
    """
    # its words are looked at below
    environment = {**os.environ, "LC_ALL": "C", **variables}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise RuntimeError(f"the C++ compiler {command[0]} does not run: {error}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        for full in (errno.ENOSPC, errno.EDQUOT):
            if any(os.strerror(full) in line for line in said):
                raise OSError(full, os.strerror(full))
        errors = [line for line in said if "error" in line]
        reason = (errors or said[-1:] or [f"exit status {done.returncode}"])[0]
        raise RuntimeError(f"the C++ compiler {command[0]} failed: {reason}")
    return done.stdout


@functools.lru_cache(maxsize=2)
def _digest(suffixes: tuple[str, ...]) -> str:
    """Digest of this folder's files with one of the suffixes."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*")):
        if file.suffix in suffixes:
            digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def plugin_digest() -> str:
    """Digest of every source file of this backend: Triton's own key does not cover plug-ins."""
    return _digest((".py", ".h", ".c"))


def build_key() -> str:
    """What a compiled kernel depends on besides its own source."""
    return f"{plugin_digest()}|{_toolchain()}"


def binary_key() -> str:
    """What a shared object depends on besides its C++."""
    return f"{_digest(('.h',))}|{'|'.join(_FLAGS)}|{_toolchain()}"


def _toolchain() -> str:
    compiler, isa = host_compiler(), host_isa()
    return "|".join((*compiler.command, compiler.version, isa.name, *isa.flags))


def build(source: str, *extra: str, language: str = "c++") -> bytes:
    """Compile one translation unit to a shared object and return its bytes.

    Raises:
        RuntimeError: the compiler fails, and its first error is in the message; or the folder for
            temporary files is full or missing.
    """
    isa, compiler = host_isa(), host_compiler()
    runtime = Path(__file__).parent / "runtime"
    with temporary_folder() as folder:
        file, output = (
            Path(folder, "kernel.c" + "pp" * (language != "c")),
            Path(folder, "kernel.so"),
        )
        file.write_text(source)
        try:
            _run((*compiler.command, *_FLAGS, *isa.flags,
                  f"-DKX_VECTOR_BYTES={isa.vector_bytes}", f"-I{runtime}", *extra, str(file),
                  "-o", str(output)), TMPDIR=folder)  # fmt: skip
        except RuntimeError:
            if wanted := os.environ.get("KEXAONE_CPU_KEEP"):
                Path(wanted).write_text(source)
            raise
        return output.read_bytes()


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder that is gone afterwards.

    Raises:
        RuntimeError: what is done in it runs into a full disk or the like; the folder that it lies
            in is named.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="kexaone-cpu-") as folder:
            yield folder
    except OSError as error:
        if error.errno is None:  # the loader of shared objects has words of its own
            raise
        named = f"the folder for temporary files {tempfile.gettempdir()}"
        raise RuntimeError(f"{named} cannot be used: {error.strerror}") from None
