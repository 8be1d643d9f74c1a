"""What a kernel's configuration depends on: the features of the processor it will run on."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Arch:
    """One instruction-set generation.

    `processors` are streaming multiprocessors (compute units, cores) of its largest part,
    `shared_bytes` the shared memory one program may use, `registers` the 32-bit registers of one
    processor, `warps` the most warps one processor holds. `shared_operands`: matrix instructions
    read both operands from shared memory, so registers hold sums only. `fnuz`: float8 products
    take e4m3fnuz, whose bits mean half of what they mean in e4m3fn. `direct_copies`: loads go to
    shared memory without registers, so that every pipeline stage has memory of its own.
    """

    name: str
    backend: str
    processors: int
    warp_size: int
    shared_bytes: int
    registers: int = 65_536
    warps: int = 64
    fp8: bool = True
    descriptors: bool = False
    shared_operands: bool = False
    fnuz: bool = False
    direct_copies: bool = True

    def buffers(self, stages: int) -> int:
        """How often a pipeline of `stages` stages holds its operands in shared memory."""
        return stages if self.direct_copies else stages - 1

    @property
    def is_cpu(self) -> bool:
        return self.backend == "cpu"


_KIB = 1024
ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", "cuda", 108, 32, 163 * _KIB, fp8=False),
        Arch("sm_89", "cuda", 142, 32, 99 * _KIB, warps=48),
        Arch("sm_90", "cuda", 132, 32, 227 * _KIB, descriptors=True, shared_operands=True),
        Arch("sm_100", "cuda", 148, 32, 227 * _KIB, descriptors=True, shared_operands=True),
        Arch("sm_120", "cuda", 188, 32, 99 * _KIB, warps=48, descriptors=True),
        Arch(
            "gfx942",
            "hip",
            304,
            64,
            64 * _KIB,
            registers=131_072,
            warps=32,
            fnuz=True,
            direct_copies=False,
        ),
        Arch("gfx950", "hip", 256, 64, 160 * _KIB, registers=131_072, warps=32),
    )
}


class _Scope:
    """What meta tensors stand for; only `targeting` writes it, and takes back what it wrote."""

    meta: Arch | None = None


_scope = _Scope()


@contextmanager
def targeting(arch: Arch) -> Iterator[None]:
    """In this scope a launcher that is given meta tensors runs, and plans for `arch`.

    Nothing can be executed: the caller intercepts the launches. Holds for the whole process.
    """
    former, _scope.meta = _scope.meta, arch
    try:
        yield
    finally:
        _scope.meta = former


def targeted() -> Arch | None:
    """What meta tensors stand for, inside `targeting`."""
    return _scope.meta


def arch_of(device: torch.device) -> Arch:
    """The generation of a device. An unknown GPU gets the newest older one of its backend."""
    return (device.type == "meta" and _scope.meta) or _detect(device)


@functools.lru_cache(maxsize=64)
def _detect(device: torch.device) -> Arch:
    if device.type != "cuda":
        return Arch("cpu", "cpu", os.cpu_count() or 1, 1, 1 << 30)
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return ARCHS.get(name, ARCHS["gfx942"])
    major, minor = torch.cuda.get_device_capability(device)
    older = [
        a for a in ARCHS.values() if a.backend == "cuda" and int(a.name[3:]) <= major * 10 + minor
    ]
    return max(older, key=lambda a: int(a.name[3:]), default=ARCHS["sm_80"])
