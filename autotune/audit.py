"""Judging compiled kernels: what each needs, what it moves, and whether a default is fit to ship.

A kernel fails that does not compile, spills registers, does not fit into a processor, or accesses
memory by less than 16 bytes a thread where 16 are possible. Possible means: each time the access
was executed it covered whole aligned 16-byte pieces, and the tile has that much for every thread.
Both sides meet at the source line, which the IR and the machine code keep; as instructions may be
given another line, the narrow ones are also counted over the whole kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..kernels.arch import Arch
from .capture import Launch, capture, storage_of
from .cases import Builder, Case
from .compile import Compiled, compile_all, specialise
from .machine import MachineCode
from .occupancy import occupancy
from .traffic import PROGRAMS, WIDE, AccessCount, Traffic, measure

_ELSEWHERE = ("", -1)
_SIDES = {"load": ("load", "async", "bulk"), "store": ("store", "bulk")}


@dataclass(frozen=True)
class Width:
    """Accesses of one line, by argument, and whether they can be 16 bytes wide.

    `bytes` is 16 where there are enough instructions of that width for those that can be, else the
    width of the narrowest.
    """

    argument: str
    kind: str
    line: int
    bytes: int
    possible: bool


@dataclass(frozen=True)
class Report:
    """One kernel of one op on one target. What could not be found is None.

    `moved_per_useful`: bytes requested from memory, in 32-byte sectors and before any cache, per
    byte of the tensors it was given. Instructions are those of a warp, per KiB of these tensors and
    per thousand floating-point operations of matrix products; matrix instructions per million.
    `mma_work`: operations that the matrix instructions do per operation of the source's products;
    above 1 warps repeat each other's work or tiles are padded. `exact` is False where the kernel is
    steered by data that was not there.
    """

    op: str
    problem: str
    kernel: str
    target: str
    grid: tuple[int, ...]
    options: dict[str, Any]
    launches: int
    problems: tuple[str, ...]
    code: MachineCode | None = None
    occupancy: float | None = None
    limit: str = ""
    useful_bytes: int = 0
    flops: float | None = None
    moved_per_useful: float | None = None
    instructions_per_kib: float | None = None
    instructions_per_kiloflop: float | None = None
    mma_per_megaflop: float | None = None
    mma_work: float | None = None
    exact: bool = False
    widths: tuple[Width, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; memory instructions as counts by width."""
        plain = {k: v for k, v in asdict(self).items() if k != "code"}
        if self.code is not None:
            code = {k: getattr(self.code, k) for k in (
                "registers", "stack", "spilled", "shared", "warps", "instructions")}  # fmt: skip
            kinds = sorted({a.kind for a in self.code.accesses})
            memory = {kind: self.code.widths(kind) for kind in kinds}
            plain["code"] = {**code, "mma": dict(self.code.mma), "memory": memory}
        return plain


@dataclass(frozen=True)
class Subject:
    """A launch to judge, and what is known about it.

    `useful_bytes` are those an ideal kernel would move; None: to be found from its accesses.
    """

    op: str
    problem: str
    launch: Launch
    arch: Arch
    contents: Mapping[int, np.ndarray] = field(default_factory=dict)
    narrow: Mapping[str, str] = field(default_factory=dict)
    useful_bytes: int | None = None
    launches: int = 1


def subjects(case: Case, arch: Arch) -> list[Subject]:
    """The launches of a case on `arch`; none where its types do not exist."""
    if case.fp8 and not arch.fp8:
        return []
    narrow = {name.split(":")[-1]: why for name, why in case.narrow.items()
              if ":" not in name or name.startswith(f"{arch.name}:")}  # fmt: skip
    builder = Builder()
    found: dict[str, Subject] = {}
    for launch in capture(lambda: case.call(builder), arch):
        key = repr(specialise(launch, arch))
        subject = Subject(case.op, case.problem, launch, arch, builder.contents, narrow)
        found[key] = replace(subject, launches=found[key].launches + 1) if key in found else subject
    return list(found.values())


def audit(
    found: Sequence[Subject], *, workers: int | None = None, done: Callable[[], None] = lambda: None
) -> Iterator[Report]:
    """Compile and judge each launch, in order; `done` is called after each."""
    jobs = [specialise(s.launch, s.arch) for s in found]
    results = compile_all(jobs, workers=workers, done=done)
    for subject, compiled in zip(found, results, strict=True):
        yield judge(subject, compiled)


def judge(subject: Subject, compiled: Compiled) -> Report:
    """The report on one compiled launch."""
    launch, arch, code = subject.launch, subject.arch, compiled.code
    known: dict[str, Any] = {
        "op": subject.op, "problem": subject.problem, "kernel": launch.name, "target": arch.name,
        "grid": launch.grid, "options": launch.options, "launches": subject.launches,
    }  # fmt: skip
    if code is None:
        return Report(**known, problems=(f"does not compile: {compiled.error}",))
    traffic = traffic_of(subject, compiled)
    held = occupancy(arch, registers=code.registers, shared=code.shared, warps=max(1, code.warps))
    widths = _widths(traffic, code, arch) if traffic else ()
    lost = _unexplained(traffic, code, arch) if traffic else {}
    per_warp = executed(code, traffic) if traffic else None
    useful, flops = useful_bytes(subject, traffic), traffic.flops if traffic else None
    total = per_warp and per_warp * code.warps * launch.programs
    matrix = _products(code, traffic, launch.programs)
    return Report(
        **known, problems=tuple(_problems(code, held.programs, widths, lost, subject)), code=code,
        occupancy=held.fraction, limit=held.limit, useful_bytes=useful, flops=flops,
        moved_per_useful=traffic.moved / useful if traffic and useful else None,
        instructions_per_kib=total / useful * 1024 if total and useful else None,
        instructions_per_kiloflop=total / flops * 1000 if total and flops else None,
        mma_per_megaflop=matrix[0], mma_work=matrix[1],
        exact=traffic is not None and traffic.exact, widths=widths,
    )  # fmt: skip


def _problems(
    code: MachineCode,
    programs: int,
    widths: Sequence[Width],
    lost: Mapping[str, int],
    subject: Subject,
) -> Iterator[str]:
    if code.spilled:
        yield f"spills {code.spilled} bytes per thread"
    if code.shared > subject.arch.shared_bytes:
        yield f"needs {code.shared} bytes of shared memory, {subject.arch.shared_bytes} exist"
    elif not programs:
        yield f"{code.warps} warps of {code.registers} registers do not fit a processor"
    for width in widths:
        least = _least(width.kind, code, subject.arch)
        if width.possible and width.bytes < least and width.argument not in subject.narrow:
            verb = "loaded" if width.kind == "load" else "stored"
            yield f"{width.argument} is {verb} by {width.bytes} bytes (line {width.line})"
            lost = {k: n for k, n in lost.items() if k != width.kind}
    for kind, count in lost.items():
        if not subject.narrow:
            yield f"{count} narrow {kind}s more than its narrow accesses explain"


def traffic_of(subject: Subject, compiled: Compiled, programs: int = PROGRAMS) -> Traffic | None:
    """What a compiled launch asks of memory; None if that was not understood."""
    launch = subject.launch
    arguments, contents = _integers(launch), _contents(subject)
    return measure(compiled.ttir, arguments, launch.grid, contents, programs)


def _integers(launch: Launch) -> dict[str, int]:
    """Values of the integers, and offsets of the tensors into their memory."""
    values = {n: t.data_ptr() - t.untyped_storage().data_ptr() for n, t in launch.tensors.items()}
    known = {n: v for n, v in launch.arguments.items() if n not in launch.unknown}
    return values | {n: int(v) for n, v in known.items() if isinstance(v, int)}


def _least(kind: str, code: MachineCode, arch: Arch) -> int:
    """Bytes per thread that a wide access has at least."""
    # four numbers of an MFMA accumulator are neighbours: in 16 bits a lane stores 8 bytes at once
    return 8 if arch.backend == "hip" and code.mma and kind == "store" else WIDE


def _unexplained(traffic: Traffic, code: MachineCode, arch: Arch) -> dict[str, int]:
    """How many narrow instructions of each kind no access calls for that has to be narrow.

    An instruction moves at least one element (of an 8-byte one perhaps the half that is used), and
    compilers make up to eight of one by unrolling and pipelining.
    """
    threads, lost = code.warps * arch.warp_size, {}
    for kind, sides in _SIDES.items():
        least = _least(kind, code, arch)
        made = [a.bytes for a in code.accesses if a.kind in sides and 0 < a.bytes < least]
        narrow = [a for a in traffic.accesses.values() if a.kind == kind and not _able(a, threads)]
        smallest = min((min(4, a.size) for a in narrow), default=WIDE)
        copies = 8 * sum(-(-a.elements // threads) for a in narrow)
        count = max(sum(size < smallest for size in made), len(made) - copies)
        if count > 0:
            lost[kind] = count
    return lost


def _able(access: AccessCount, threads: int) -> bool:
    """Whether an access can be 16 bytes wide in each thread."""
    return access.wide and access.elements * access.size >= WIDE * threads


def useful_bytes(subject: Subject, traffic: Traffic | None) -> int:
    """What it reads of its tensors, once, and what it writes, once.

    That is no more than their sizes, nor than what it asks for. 0: it goes through addresses that
    it reads from a table, and what is behind them is not known.
    """
    if subject.useful_bytes is not None:
        return subject.useful_bytes
    sizes = subject.launch.sizes
    if traffic is not None and any(not a.argument for a in traffic.accesses.values()):
        return 0
    if traffic is None or not traffic.exact:
        return sum(sizes.values())
    tensors = subject.launch.tensors
    wanted: dict[tuple[int, str], float] = defaultdict(float)
    for access in traffic.accesses.values():
        if access.argument in tensors:
            wanted[storage_of(tensors[access.argument]), access.kind] += access.wanted
    return round(sum(min(sizes[storage], size) for (storage, _), size in wanted.items()))


def _contents(subject: Subject) -> dict[str, np.ndarray]:
    tensors = subject.launch.tensors.items()
    return {n: subject.contents[storage_of(t)] for n, t in tensors
            if storage_of(t) in subject.contents}  # fmt: skip


def _widths(traffic: Traffic, code: MachineCode, arch: Arch) -> tuple[Width, ...]:
    """Each source line that accesses memory, with the narrowest instruction made from it.

    The compiler gives some instructions another line of the same loop: what is left over on either
    side is taken together.
    """
    threads = code.warps * arch.warp_size
    found = []
    for kind, sides in _SIDES.items():
        made: dict[tuple[str, int], list[int]] = defaultdict(list)
        for access in code.accesses:
            if access.kind in sides:
                made[access.where].append(WIDE if access.kind == "bulk" else access.bytes)
        lines: dict[tuple[str, int], list[AccessCount]] = defaultdict(list)
        for access in traffic.accesses.values():
            if access.kind == kind and access.times:
                lines[access.where if access.where in made else _ELSEWHERE].append(access)
        left = [size for where, sizes in made.items() if where not in lines for size in sizes]
        for where, accesses in lines.items():
            sizes = left if where == _ELSEWHERE else made[where]
            able = [a for a in accesses if _able(a, threads)]
            needed = sum(a.elements * a.size // (WIDE * threads) for a in able)
            enough = sum(size >= WIDE for size in sizes) >= needed > 0
            names = "+".join(sorted({a.argument for a in able or accesses if a.argument}))
            if sizes:
                smallest = WIDE if enough else min(sizes)
                found.append(Width(names, kind, accesses[0].where[1], smallest, bool(able)))
    return tuple(found)


def executed(code: MachineCode, traffic: Traffic) -> float | None:
    """Instructions that one warp executes, from the trip counts; None if the loops do not match."""
    times = _times(code, traffic)
    return None if times is None else float(times.sum())


def _products(
    code: MachineCode, traffic: Traffic | None, programs: int
) -> tuple[float | None, float | None]:
    """Matrix instructions executed per million operations asked for, and what these do per one."""
    times = _times(code, traffic) if traffic is not None else None
    if times is None or traffic is None or not traffic.flops or not code.products:
        return None, None
    each = [float(times[p.at]) * code.warps * programs for p in code.products]
    sizes = [p.flops for p in code.products if p.flops is not None]
    work = sum(t * s for t, s in zip(each, sizes, strict=False)) / traffic.flops
    return sum(each) / traffic.flops * 1e6, work if len(sizes) == len(each) else None


def _times(code: MachineCode, traffic: Traffic) -> np.ndarray | None:
    """How often one warp executes each instruction.

    Loops are matched by their order in the program, so as many must be left in the machine code as
    there are in the source.
    """
    trips = list(traffic.trips.values())
    if len(trips) != len(code.loops):
        return None
    weights = np.ones(code.instructions)
    for loop, count in zip(code.loops, trips, strict=True):
        weights[loop.first : loop.last + 1] = count
    return weights
