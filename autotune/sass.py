"""NVIDIA machine code, read from what `cuobjdump` and `nvdisasm` print.

Both programs come with Triton. `nvdisasm -g` prints the source line before the instructions made
from it; widths, matrix instructions and jumps are in the mnemonics.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from triton import knobs
from triton.runtime.cache import get_cache_manager

from .machine import Access, MachineCode, Product, loops_of

_SOURCE = re.compile(r'//## File "([^"]*)", line (\d+)')
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_JUMP = re.compile(r"`\((\.L_\w+)\)")
_KINDS = {
    "LDG": "load", "LD": "load", "STG": "store", "ST": "store", "LDGSTS": "async",
    "UTMALDG": "bulk", "UTMASTG": "bulk", "UTMAREDG": "bulk", "UBLKCP": "bulk",
    "ATOMG": "atomic", "ATOM": "atomic", "RED": "atomic", "REDG": "atomic",
}  # fmt: skip
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_JUMPS = ("BRA", "BRX", "JMP")
_GROUP_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
_WARP_SHAPES = {
    "884": (8, 8, 4), "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16),
    "16832": (16, 8, 32), "16864": (16, 8, 64),
}  # fmt: skip


def width(mnemonic: str) -> int:
    """Bytes per thread: `LDG.E.128` moves 16, `LDG.E` 4."""
    return next((_WIDTHS[p] for p in reversed(mnemonic.split(".")) if p in _WIDTHS), 4)


def product_flops(mnemonic: str) -> float | None:
    """What one warp does: `HMMA.16816.F32` is 16 x 8 x 16, `HGMMA.64x128x16` done by four."""
    if shape := _GROUP_SHAPE.search(mnemonic):
        m, n, k = (int(x) for x in shape.groups())
        return 2 * m * n * k / 4
    found = next((_WARP_SHAPES[p] for p in mnemonic.split(".") if p in _WARP_SHAPES), None)
    return None if found is None else 2.0 * found[0] * found[1] * found[2]


def parse_resources(text: str) -> tuple[int, int]:
    """Registers and stack bytes per thread, from `cuobjdump --dump-resource-usage`."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError("no resource usage in what cuobjdump printed")
    return int(found[1]), int(found[2])


def parse(disassembly: str, resources: str) -> MachineCode:
    """The kernel in what `nvdisasm -c -g` and `cuobjdump --dump-resource-usage` printed."""
    mma: Counter[str] = Counter()
    accesses: list[Access] = []
    products: list[Product] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    where, count, spilled = ("", 0), 0, 0
    for line in disassembly.splitlines():
        if source := _SOURCE.search(line):
            where = Path(source[1]).name, int(source[2])
        elif label := _LABEL.match(line):
            labels[label[1]] = count
        elif found := _INSTRUCTION.search(line):
            mnemonic, operands = found.groups()
            base = mnemonic.split(".")[0]
            if base == "NOP":
                continue
            if base.endswith("MMA"):
                mma[base] += 1
                products.append(Product(count, product_flops(mnemonic)))
            elif base in _KINDS:
                kind = _KINDS[base]
                accesses.append(Access(kind, 0 if kind == "bulk" else width(mnemonic), where))
            elif base in ("LDL", "STL"):
                spilled += width(mnemonic)
            elif base in _JUMPS and (target := _JUMP.search(operands)):
                jumps.append((count, target[1]))
            count += 1
    registers, stack = parse_resources(resources)
    loops = loops_of([(at, labels[target]) for at, target in jumps if target in labels])
    return MachineCode(
        registers, stack, spilled, count, mma, tuple(accesses), tuple(products), loops
    )


def read(cubin: bytes) -> MachineCode:
    """Disassemble and parse a cubin. The listing is kept in Triton's cache."""
    cache = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    found = [cache.get_file(name) for name in ("kernel.sass", "kernel.usage")]
    if found[0] and found[1]:
        return parse(Path(found[0]).read_text(), Path(found[1]).read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", "-g", file.name)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    cache.put(listing, "kernel.sass", binary=False)
    cache.put(usage, "kernel.usage", binary=False)
    return parse(listing, usage)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{Path(command[0]).name}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
