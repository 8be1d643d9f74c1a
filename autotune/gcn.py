"""AMD machine code, read from the assembly that LLVM writes.

Registers and spills are in the kernel's metadata at the end, source lines in `.loc` directives.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from .machine import Access, MachineCode, Product, loops_of

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"')
_SOURCE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_LABEL = re.compile(r"^(\.?\w+):")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w*)\b(.*)$")
_MEMORY = re.compile(r"^(global|buffer|flat)_(load|store|atomic)(_lds)?_(\w+)$")
_WIDTHS = {
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2,
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip
_SPILL = re.compile(r"^scratch_(?:load|store)_(\w+)$")
_MMA = re.compile(r"^v_s?mfma")
_SHAPE = re.compile(r"_(\d+)x(\d+)x(\d+)")


def width(suffix: str) -> int:
    """Bytes per lane: `dwordx4` is 16, `ubyte_d16_hi` 1."""
    return _WIDTHS.get(suffix.split("_")[0], 4)


def parse(assembly: str) -> MachineCode:
    """The kernel in an assembly file with its metadata."""
    files: dict[str, str] = {}
    mma: Counter[str] = Counter()
    accesses: list[Access] = []
    products: list[Product] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    where, count, spilled = ("", 0), 0, 0
    body, _, metadata = assembly.partition(".amdgpu_metadata")
    for raw in body.splitlines():
        line = raw.split(";")[0].rstrip()
        if found := _FILE.match(line):
            files[found[1]] = Path(found[2]).name
        elif found := _SOURCE.match(line):
            where = files.get(found[1], ""), int(found[2])
        elif found := _LABEL.match(line):
            labels[found[1]] = count
        elif found := _INSTRUCTION.match(line):
            mnemonic, operands = found.groups()
            if mnemonic == "s_nop":
                continue
            if _MMA.match(mnemonic):
                mma["MFMA"] += 1
                products.append(Product(count, _flops(mnemonic)))
            elif memory := _MEMORY.match(mnemonic):
                lds = memory[3] or " lds" in operands
                kind = "async" if lds and memory[2] == "load" else memory[2]
                accesses.append(Access(kind, width(memory[4].removeprefix("lds_")), where))
            elif spill := _SPILL.match(mnemonic):
                spilled += width(spill[1])
            elif mnemonic.startswith(("s_cbranch", "s_branch")):
                jumps.append((count, operands.strip()))
            count += 1
    registers, stack = (
        _field(metadata, "vgpr_count"),
        _field(metadata, "private_segment_fixed_size"),
    )
    spilled = max(spilled, 4 * _field(metadata, "vgpr_spill_count"))
    loops = loops_of([(at, labels[target]) for at, target in jumps if target in labels])
    return MachineCode(
        registers, stack, spilled, count, mma, tuple(accesses), tuple(products), loops
    )


def _flops(mnemonic: str) -> float | None:
    """`v_mfma_f32_32x32x8_bf16` is one wave's 32 x 32 x 8."""
    shape = _SHAPE.search(mnemonic)
    return 2.0 * int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else None


def _field(metadata: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", metadata)
    if found is None:
        raise ValueError(f"no {name} in the kernel's metadata")
    return int(found[1])


def read(assembly: str) -> MachineCode:
    """Parse the assembly of a kernel."""
    return parse(assembly)
