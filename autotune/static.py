"""Tuning for a GPU that is not here: candidates are compiled for it, judged, and timed by model.

The cases of the audit run on tensors without memory; their launchers say which choices they leave
open. For each choice the first candidates are cross-compiled, in processes of their own, and those
drop out that the audit would not pass: spills, too much shared memory, narrow accesses. The rest
are timed by the cost model (`model.py`) from what is really there: bytes and trip counts from the
kernel's integer arithmetic, registers and instructions from the machine code.

A candidate takes the default's place only if it is predicted faster by more than `MARGIN`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from triton.runtime.jit import JITFunction

from ..kernels.arch import Arch, targeting
from ..kernels.sources import name_of, source_hash
from ..kernels.table_files import Entry, plain, within
from ..kernels.tables import Decision, decide, recording, triton_release, use
from .audit import Subject, executed, judge, traffic_of, useful_bytes
from .capture import Launch, bind
from .cases import Builder, Case
from .compile import Compiled, compile_all, specialise
from .model import Machine, Work, predict
from .occupancy import occupancy

MARGIN = 0.1
_WALKED = 33
"""Programs that are walked. Of grids with idle programs that finds the work to about 6 %."""


@dataclass(frozen=True)
class Estimate:
    """A candidate's predicted microseconds; `fault` says why it is not legal."""

    config: Any
    us: float = 0.0
    fault: str = ""


@dataclass(frozen=True)
class Choice:
    """What was found for one choice of a case; `entry` is None where `note` says why."""

    op: str
    problem: dict[str, Any]
    note: str
    estimates: tuple[Estimate, ...] = ()
    entry: Entry | None = None


@dataclass(frozen=True)
class _Planned:
    decision: Decision
    launch: Launch


@contextmanager
def _planning(arch: Arch) -> Iterator[list[_Planned]]:
    """Writes down launches, each with the decision that it follows, instead of making them."""
    planned: list[_Planned] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        if found:
            planned.append(_Planned(found[-1], bind(self, grid, args, named)))

    run = JITFunction.run
    with recording() as found, targeting(arch):
        JITFunction.run = record  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield planned
        finally:
            JITFunction.run = run


def _plan(case: Case, arch: Arch) -> tuple[list[_Planned], Builder]:
    builder = Builder()
    with _planning(arch) as planned:
        case.call(builder)
    return planned, builder


class StaticTuner:
    """Chooses for `machine` until its time is up; `top` candidates of each choice are compiled."""

    def __init__(
        self, machine: Machine, arch: Arch, *, seconds: float, top: int = 6,
        workers: int | None = None,
    ) -> None:  # fmt: skip
        self.machine, self.arch, self.top, self.workers = machine, arch, top, workers
        self.deadline = time.monotonic() + seconds
        self._seen: set[tuple[str, Any, str]] = set()

    def tune(self, case: Case, *, repeat: bool = False) -> list[Choice]:
        """The choices of a case that no earlier case had."""
        if case.fp8 and not self.arch.fp8:
            return []
        planned, _ = _plan(case, self.arch)
        first = {(p.decision.op, p.decision.problem, p.decision.dtype): p.decision for p in planned}
        fresh = {k: d for k, d in first.items() if k not in self._seen}
        self._seen.update(fresh)
        return [self._decide(case, d, planned, repeat) for d in fresh.values()]

    def _decide(self, case: Case, d: Decision, planned: Sequence[_Planned], repeat: bool) -> Choice:
        problem = plain(d.problem)
        candidates = list(dict.fromkeys(d.configs(d.problem, d.arch)))
        if len(candidates) < 2:
            return Choice(d.op, problem, "one candidate")
        if not repeat and self._known(d):
            return Choice(d.op, problem, "known")
        if time.monotonic() > self.deadline:
            return Choice(d.op, problem, "out of time")
        estimates = self._estimates(case, d, candidates[: self.top])
        legal = [e for e in estimates if not e.fault]
        if not legal:
            return Choice(d.op, problem, "no candidate is legal", tuple(estimates))
        # the default stays unless it is illegal or clearly slower
        limit = min(e.us for e in legal) * (1 + MARGIN)
        chosen = next(e for e in legal if e.us <= limit)
        kernels = {name_of(p.launch.kernel): source_hash(p.launch.kernel)
                   for p in planned if p.decision.op == d.op}  # fmt: skip
        release = triton_release()
        figures = {"chosen_us": round(chosen.us, 2), "default_us": round(legal[0].us, 2)}
        entry = Entry(
            d.op, self.arch.name, self.machine.devices[0], d.dtype, problem, kernels,
            (release, release), plain(chosen.config), "static", figures,
        )  # fmt: skip
        return Choice(d.op, problem, "static", tuple(estimates), entry)

    def _known(self, d: Decision) -> bool:
        entry = decide(d.op, d.configs, d.problem, d.dtype, d.arch, d.machine).entry
        return (
            entry is not None
            and dict(entry.problem) == plain(d.problem)
            and within(triton_release(), entry.triton)
        )

    def _estimates(self, case: Case, d: Decision, candidates: Sequence[Any]) -> list[Estimate]:
        """Each candidate compiled and timed; those that the time does not reach are left out."""
        subjects: list[list[Subject]] = []
        for config in candidates:
            with use(d.op, config):
                planned, builder = _plan(case, self.arch)
            mine = [p.launch for p in planned if _same(p.decision, d)]
            subjects.append([Subject(case.op, case.problem, launch, self.arch, builder.contents,
                                     case.narrow) for launch in mine])  # fmt: skip
        flat = [s for one in subjects for s in one]
        jobs = [specialise(s.launch, self.arch) for s in flat]
        results = iter(zip(flat, compile_all(jobs, workers=self.workers), strict=True))
        judged = [_judged([next(results) for _ in one]) for one in subjects]
        # where one candidate's instructions could not be counted, nobody's count against them
        known = all(math.isfinite(w.instructions) for works in judged if isinstance(works, list)
                    for w in works)  # fmt: skip
        found = []
        for config, works in zip(candidates, judged, strict=True):
            if isinstance(works, str):
                found.append(Estimate(config, fault=works))
                continue
            fair = works if known else [replace(w, instructions=0.0) for w in works]
            found.append(Estimate(config, sum(predict(w, self.machine).us for w in fair)))
        return found


def _judged(built: Sequence[tuple[Subject, Compiled]]) -> list[Work] | str:
    """The work of a candidate's launches, or why the audit would not pass one."""
    works = []
    for subject, compiled in built:
        report = judge(subject, compiled)
        if report.problems:
            return report.problems[0]
        works.append(work_of(subject, compiled, report.useful_bytes))
    return works


def _same(a: Decision, b: Decision) -> bool:
    return (a.op, a.problem, a.dtype) == (b.op, b.problem, b.dtype)


def work_of(subject: Subject, compiled: Compiled, size: int) -> Work:
    """What a compiled launch does; only its tensors count where its code is not understood.

    `instructions` are infinite where the loops of source and machine code do not match.
    """
    code, launch, arch = compiled.code, subject.launch, subject.arch
    assert code is not None
    held = occupancy(arch, registers=code.registers, shared=code.shared, warps=max(1, code.warps))
    useful = size or sum(launch.sizes.values())
    work = Work(
        launch.programs, useful, 0.0, useful, resident=max(1, held.programs),
        in_flight=max(code.shared, 16.0 * 4 * arch.warp_size * code.warps),
    )  # fmt: skip
    traffic = traffic_of(subject, compiled, _WALKED)
    if traffic is None:
        return work
    count = executed(code, traffic) or math.inf
    stored = sum(a.wanted for a in traffic.accesses.values() if a.kind == "store")
    written = min(stored, useful)
    return replace(
        work, read=useful - written, written=written, requested=max(useful, traffic.moved),
        matrix=traffic.flops, kind=_kind(subject),
        instructions=count * code.warps * launch.programs,
        # threads that load are the ones that multiply: half of the lesser work is hidden
        overlap=0.5, tail=written if held.programs == 1 and traffic.flops else 0.0,
    )  # fmt: skip


def work_of_source(subject: Subject, ttir: str) -> Work:
    """What a launch does as far as its intermediate code says: bytes and matrix products."""
    launch = subject.launch
    traffic = traffic_of(subject, Compiled(ttir=ttir), _WALKED)
    if traffic is None:
        size = float(sum(launch.sizes.values()))
        return Work(launch.programs, size, 0.0, size)
    useful = useful_bytes(subject, traffic) or sum(launch.sizes.values())
    written = min(useful, sum(a.wanted for a in traffic.accesses.values() if a.kind == "store"))
    return Work(launch.programs, useful - written, written, max(useful, traffic.moved),
                matrix=traffic.flops, kind=_kind(subject))  # fmt: skip


def _kind(subject: Subject) -> str:
    """The type that is multiplied: the narrowest floating-point type among the tensors."""
    sizes = [t.dtype.itemsize for t in subject.launch.tensors.values() if t.is_floating_point()]
    wide = "fp32" if subject.arch.is_cpu else "tf32"
    return {1: "fp8", 2: "bf16"}.get(min(sizes, default=4), wide)
