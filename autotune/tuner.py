"""Tuning by measurement: what a call launches, each way to configure it, and which is fastest.

The call runs once, and its launchers say which kernels it takes and which problems they solve. For
each such choice the candidates run one by one: their results are checked, their launches are kept
with all arguments, and then the launches alone compete (`compete.py`), from a cold cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import tables
from ..kernels.arch import Arch
from ..kernels.dispatch import impl, implementations
from ..kernels.launch import on
from ..kernels.sources import name_of, source_hash
from ..kernels.table_files import Entry, plain, within
from ..kernels.tables import Decision, recording, triton_release, use
from .accuracy import Oracle, outputs
from .audit import Subject
from .capture import bind, storage_of
from .compete import Clock, Verdict, compete, seconds_of
from .model import machine_for, predict
from .static import work_of_source
from .tasks import Task


@dataclass(frozen=True)
class Held:
    """A launch with its arguments, to be made again."""

    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    named: dict[str, Any]
    ttir: str = ""

    def again(self) -> None:
        self.kernel[self.grid](*self.args, **self.named)


@dataclass
class Knob:
    """One choice of a call: the kernel family `op` and the problem it is given."""

    decision: Decision
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[Any, ...]:
        d = self.decision
        return d.op, d.problem, d.dtype, d.arch, d.machine


@dataclass(frozen=True)
class Outcome:
    """What was found for one knob; `entry` is None where nothing had to be or could be found."""

    op: str
    problem: dict[str, Any]
    note: str
    entry: Entry | None = None
    verdict: Verdict | None = None
    tried: int = 0


@contextmanager
def launches_of(op: str | None = None) -> Any:
    """Keeps the launches made in this scope, by the decision they follow; of one op or of all."""
    from triton.runtime.jit import JITFunction

    run, held = JITFunction.run, []

    def keep(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=warmup, **named)
        if found and op in (None, found[-1].op):
            ttir = str(getattr(compiled, "asm", {}).get("ttir", ""))
            held.append((found[-1], Held(self, grid, args, named, ttir)))
        return compiled

    with recording() as found:
        JITFunction.run = keep  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield held
        finally:
            JITFunction.run = run


def knobs_of(call: Callable[[], object]) -> list[Knob]:
    """The choices that a call leaves open, each once, with the kernels that they configure."""
    found: dict[tuple[Any, ...], Knob] = {}
    with launches_of() as held, impl("triton"):
        call()
    kernels = {}
    for decision, launch in held:
        fresh = Knob(decision)
        knob = found.setdefault(fresh.identity, fresh)
        knob.kernels[name_of(launch.kernel)] = source_hash(launch.kernel)
        kernels |= knob.kernels
    with recording() as decisions:
        call()
    whole = [Knob(d, kernels) for d in decisions if d.configs is implementations]
    return [*found.values(), *{k.identity: k for k in whole}.values()]


def settled(knob: Knob) -> bool:
    """Whether a table already answers, from measurement, for exactly this problem."""
    d = knob.decision
    entry = tables.decide(d.op, d.configs, d.problem, d.dtype, d.arch, d.machine).entry
    return (
        entry is not None
        and entry.provenance == "measured"
        and entry.machine == d.machine
        and dict(entry.problem) == plain(d.problem)
        and within(triton_release(), entry.triton)
    )


class Tuner:
    """Tunes tasks on a device until its time is up.

    `rank` orders the candidates of a decision, the most promising first, and `top` of them are
    tried, the default always among them. `share` is the most that one contest takes. `clock` times
    one run.
    """

    def __init__(
        self,
        *,
        seconds: float,
        top: int = 8,
        rank: Callable[[Decision, Sequence[Any]], list[Any]] = lambda _, candidates: [*candidates],
        clock: Clock = seconds_of,
        share: float = 3.0,
    ) -> None:
        self.deadline = time.monotonic() + seconds
        self.top, self.rank, self.clock, self.share = top, rank, clock, share
        self.flush = Flush()

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def tune(self, task: Task, *, repeat: bool = False, tasks_left: int = 1) -> list[Outcome]:
        """The outcome for every knob of a task; with `repeat` also for those that are settled.

        What time is left is divided among `tasks_left` tasks, this one included, and its knobs.
        """
        call = _call(task)
        found, oracle = [], None
        until = time.monotonic() + self.left / tasks_left
        knobs = knobs_of(call)
        for position, knob in enumerate(knobs):
            d = knob.decision
            candidates = self.rank(d, list(dict.fromkeys(d.configs(d.problem, d.arch))))
            problem = plain(d.problem)
            if len(candidates) < 2:
                found.append(Outcome(d.op, problem, "one candidate"))
            elif not repeat and settled(knob):
                found.append(Outcome(d.op, problem, "known"))
            elif self.left <= 0:
                found.append(Outcome(d.op, problem, "out of time"))
            else:
                oracle = oracle or Oracle(task)
                seconds = (until - time.monotonic()) / (len(knobs) - position)
                found.append(self._decide(knob, candidates, call, oracle, max(1.0, seconds)))
        return found

    def _decide(
        self, knob: Knob, ranked: list[Any], call: Callable[[], list[Tensor]], oracle: Oracle,
        seconds: float,
    ) -> Outcome:  # fmt: skip
        """The outcome for one knob: half of the time is for compiling and checking."""
        d = knob.decision
        default = d.configs(d.problem, d.arch)[0]
        # the default first: between equals it stays
        order = [default, *(c for c in ranked[: self.top] if c != default)]
        runs, tried, made, refused = [], [], [], 0
        enough = time.monotonic() + seconds / 2
        for candidate in order:
            if len(runs) > 1 and time.monotonic() > enough:
                break
            launches = self._prepare(knob, candidate, call, oracle)
            if launches is None:
                refused += 1
                continue
            tried.append(candidate)
            made.append(launches)
            whole = d.configs is implementations
            runs.append(_whole(d.op, candidate, call) if whole else _together(launches))
        problem = plain(d.problem)
        if not tried or tried[0] != default:
            return Outcome(d.op, problem, "the default fails the accuracy check")
        with torch.no_grad():
            verdict = compete(runs, seconds=min(self.share, max(0.3, seconds / 2)),
                              between=self.flush, clock=self.clock)  # fmt: skip
        predicted = sum(predicted_us(held, d.arch) for held in made[verdict.winner])
        best, first = verdict.medians[verdict.winner], verdict.medians[0]
        entry = Entry(
            d.op, d.arch.name, d.machine, d.dtype, problem, knob.kernels,
            (triton_release(), triton_release()), plain(tried[verdict.winner]), "measured",
            {"chosen_us": round(best * 1e6, 2), "default_us": round(first * 1e6, 2),
             "predicted_us": round(predicted, 2)},
        )  # fmt: skip
        note = "certain" if verdict.certain else "the best so far"
        note += f", {refused} refused" if refused else ""
        return Outcome(d.op, problem, note, entry, verdict, len(tried))

    def _prepare(
        self, knob: Knob, candidate: Any, call: Callable[[], list[Tensor]], oracle: Oracle
    ) -> list[Held] | None:
        """A candidate's launches; None if it does not compile or is not accurate."""
        d = knob.decision
        try:
            scope = nullcontext() if d.configs is implementations else impl("triton")
            with use(d.op, candidate), scope, launches_of(d.op) as held:
                result = call()
        except Exception:  # whatever the compiler raises; the default has been seen to work
            return None
        if not oracle.accepts(result):
            return None
        return [launch for decision, launch in held if decision.problem == d.problem]


def _whole(op: str, candidate: Any, call: Callable[[], object]) -> Callable[[], None]:
    """A call by one implementation."""

    def again() -> None:
        with use(op, candidate):
            call()

    return again


def _together(launches: list[Held]) -> Callable[[], None]:
    """Several launches as one call."""
    tensors = (v for held in launches for v in (*held.args, *held.named.values()))
    at = next((v for v in tensors if isinstance(v, Tensor)), torch.empty(0))

    def again() -> None:
        with on(at):
            for launch in launches:
                launch.again()

    return again


def predicted_us(held: Held, arch: Arch) -> float:
    """What the cost model says of a launch on this machine's CPU."""
    launch = bind(held.kernel, held.grid, held.args, held.named)
    contents = {storage_of(t): t.contiguous().numpy() for t in launch.tensors.values()
                if not t.is_floating_point()}  # fmt: skip
    subject = Subject("", "", launch, arch, contents)
    machine = machine_for(arch.name).calibrated(processors=torch.get_num_threads())
    return predict(work_of_source(subject, held.ttir), machine).us


class Flush:
    """Overwrites as much memory as the largest cache holds."""

    def __init__(self, size: int = 64 << 20) -> None:
        self._memory = torch.zeros(size // 4, dtype=torch.int32)

    def __call__(self) -> None:
        self._memory.add_(1)


def _call(task: Task) -> Callable[[], list[Tensor]]:
    return lambda: outputs(task.function, task.inputs, trains=task.trains)
