"""How many warps of a kernel one processor holds at a time.

Sources: CUDA programming guide, table of technical specifications per compute capability, and the
occupancy calculator's allocation units; AMD CDNA3 and CDNA4 instruction set references.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.arch import Arch

_KIB = 1024
_MOST_PROGRAMS = {"sm_80": 32, "sm_89": 24, "sm_90": 32, "sm_100": 32, "sm_120": 24}
_SIMDS = 4  # of a compute unit, or sub-partitions of an SM: a warp's registers lie in one


@dataclass(frozen=True)
class Occupancy:
    """`programs` on one processor, and what keeps it from holding more."""

    programs: int
    warps: int
    fraction: float
    limit: str


def occupancy(arch: Arch, *, registers: int, shared: int, warps: int) -> Occupancy:
    """Programs that fit on one processor, from each resource; 0 if one does not fit at all.

    `registers` per thread, `shared` bytes per program, `warps` per program.
    """
    nvidia = arch.backend == "cuda"
    unit = 8  # registers are given to a thread in eights on both vendors' parts
    per_thread = max(unit, -(-registers // unit) * unit)
    # a warp's registers lie in the file of one of the four parts
    per_part = arch.registers // _SIMDS // (per_thread * arch.warp_size)
    # CUDA reserves 1 KiB of shared memory for itself in each program
    reserved = _KIB if nvidia else 0
    memory = arch.shared_bytes + reserved
    limits = {
        "warps": arch.warps // warps,
        "registers": per_part * _SIMDS // warps,
        "shared memory": memory // (shared + reserved) if shared + reserved else 1 << 30,
        "programs": _MOST_PROGRAMS.get(arch.name, 32),
    }
    limit = min(limits, key=lambda name: limits[name])
    programs = limits[limit]
    return Occupancy(programs, programs * warps, programs * warps / arch.warps, limit)
