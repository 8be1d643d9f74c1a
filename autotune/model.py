"""How long a kernel takes on a machine that need not be here: a roofline with the corners rounded.

A machine is a small data file (`machines/`): rates of its memory, caches and processors, and
factors in (0, 1] for how much of each is reached. A kernel is its `Work`: what it moves, computes
and issues, in how many programs. Its time is

    launch + latency + max(work of each unit / rate of that unit) + what does not overlap

where the units inside processors count the busiest processor: with P programs of equal size on S
processors that has ceil(P / S) of them (wave quantisation). Memory is shared by all and knows no
waves, but is only as fast as the bytes in flight allow (Little's law).

Nothing here is fitted to kernels: the factors are the same for all of them.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "machines"


@dataclass(frozen=True)
class Machine:
    """Rates per second are those of the whole part, rates per clock those of one processor.

    `latency_us` is that of a load from memory, `launch_us` the duration of an empty kernel.
    `efficiency` holds the reached part of `memory`, `cache`, `matrix`, `vector` and `issue` rates.
    """

    name: str
    arch: str
    devices: tuple[str, ...]
    processors: int
    clock_ghz: float
    memory_gbps: float
    cache_mib: float
    cache_gbps: float
    matrix_flops_per_clock: Mapping[str, float]
    vector_ops_per_clock: float
    special_ops_per_clock: float
    issue_per_clock: float
    latency_us: float
    launch_us: float
    efficiency: Mapping[str, float]
    sources: str = ""

    def rate(self, per_clock: float, unit: str) -> float:
        """What all processors do of something in a microsecond."""
        return self.processors * per_clock * self.clock_ghz * 1e3 * self.efficiency[unit]

    @property
    def memory_rate(self) -> float:
        """Bytes in a microsecond."""
        return self.memory_gbps * 1e3 * self.efficiency["memory"]

    @property
    def cache_rate(self) -> float:
        return self.cache_gbps * 1e3 * self.efficiency["cache"]

    def calibrated(self, **factors: Any) -> Machine:
        """The same with other values: efficiencies by their names, else fields."""
        own = {k: v for k, v in factors.items() if k not in self.efficiency}
        efficiency = {**self.efficiency, **{k: v for k, v in factors.items() if k not in own}}
        return replace(self, efficiency=efficiency, **own)


def parse(text: str) -> Machine:
    """A machine from its file. Raises ValueError with what is wrong in it."""
    data = json.loads(text)
    try:
        machine = Machine(**{**data, "devices": tuple(data["devices"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"no description of a machine: {error}") from None
    if machine.processors == 0:
        machine = replace(machine, processors=os.cpu_count() or 1)
    positive = [v for v in vars(machine).values() if isinstance(v, int | float)]
    if min(positive) <= 0 or not all(0 < f <= 1 for f in machine.efficiency.values()):
        raise ValueError(f"{machine.name}: rates must be positive and efficiencies in (0, 1]")
    return machine


@functools.lru_cache(maxsize=1)
def machines() -> dict[str, Machine]:
    """The described machines by the name of their file, and those of `KEXAONE_CACHE_DIR`."""
    from ..kernels.table_files import cache_directory

    found = {}
    for folder in (_FOLDER, cache_directory() / "machines"):
        for path in sorted(folder.glob("*.json")):
            found[path.stem] = parse(path.read_text())
    return found


def machine_for(arch: str) -> Machine:
    """The machine that stands for an architecture: the largest of it. Raises ValueError."""
    found = [machine for machine in machines().values() if machine.arch == arch]
    if not found:
        raise ValueError(f"no machine with architecture {arch!r} is described")
    return max(found, key=lambda machine: machine.processors)


@dataclass(frozen=True)
class Work:
    """What a kernel does, all programs together.

    `read` and `written` are bytes that have to cross the memory bus, `requested` those that
    programs ask of the cache. `matrix` operations are of type `kind` and include padding; `vector`,
    `special` and `instructions` (of a warp) count what runs beside them. `resident` programs run on
    a processor at once, each with `in_flight` bytes under way. `overlap` says how much of the
    lesser work of a processor's units hides behind the greatest (1: all). `tail` are bytes written
    at the end of a processor's programs, with nothing to hide behind.
    """

    programs: float
    read: float
    written: float
    requested: float = 0.0
    matrix: float = 0.0
    kind: str = "bf16"
    vector: float = 0.0
    special: float = 0.0
    instructions: float = 0.0
    resident: int = 1
    in_flight: float = math.inf
    overlap: float = 1.0
    tail: float = 0.0
    launches: int = 1


@dataclass(frozen=True)
class Prediction:
    """Microseconds, and the part that each unit would take alone."""

    us: float
    parts: Mapping[str, float]

    @property
    def bound(self) -> str:
        """The unit that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def predict(work: Work, machine: Machine) -> Prediction:
    """The time of one kernel."""
    load = imbalance(work.programs, machine.processors)
    per_clock = machine.matrix_flops_per_clock.get(work.kind, 0.0)
    if work.matrix and not per_clock:
        raise ValueError(f"{machine.name} does not multiply {work.kind}")
    inside = {
        "matrix": load * work.matrix / machine.rate(per_clock, "matrix") if work.matrix else 0.0,
        "vector": load * work.vector / machine.rate(machine.vector_ops_per_clock, "vector"),
        "special": load * work.special / machine.rate(machine.special_ops_per_clock, "vector"),
        "issue": load * work.instructions / machine.rate(machine.issue_per_clock, "issue"),
    }
    outside = {
        "memory": (work.read + work.written) / machine.memory_rate,
        "cache": (work.requested + work.written) / machine.cache_rate,
        "flight": _flight(work, machine),
    }
    busiest = max(inside.values())
    compute = busiest + (1 - work.overlap) * (sum(inside.values()) - busiest)
    compute += work.tail / machine.memory_rate
    longest = max(compute, *outside.values())
    fixed = work.launches * machine.launch_us + machine.latency_us
    return Prediction(fixed + longest, {**inside, **outside, "launch": fixed})


def imbalance(programs: float, processors: int) -> float:
    """How much more the busiest processor has to do than the average one."""
    if programs <= 0:
        return 1.0
    return math.ceil(programs / processors) * processors / programs


def _flight(work: Work, machine: Machine) -> float:
    """The time that the bytes asked for take when only so many are under way."""
    if math.isinf(work.in_flight):
        return 0.0
    at_once = min(work.programs, machine.processors * work.resident) * work.in_flight
    asked = max(work.requested, work.read)
    return asked / max(1.0, at_once) * machine.latency_us


def to_json(machine: Machine) -> dict[str, Any]:
    """The description as its file holds it."""
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(machine).items()}
