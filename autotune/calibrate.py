"""Fitting a machine's description to the machine: a handful of short kernels, one factor each.

Each probe is an operation that one unit bounds: a copy for memory, a copy that stays in the cache,
matrix products by type, and a kernel that stores one number for the launch. What it reaches of the
described rate becomes the efficiency; rates that the description has too low are raised. The result
is a description of its own in the user's cache directory, used in place of the prior.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from ..kernels.lang import tl, triton
from ..kernels.launch import on
from ..kernels.table_files import cache_directory
from .compete import seconds_of
from .model import Machine, machines, to_json
from .store import locked

_MIB = 1 << 20
_SIDE = 1024
_RUNS = 5
Run = Callable[[], object]


@dataclass(frozen=True)
class Probe:
    """A short operation and what it tells: `amount` of the unit's work in one run."""

    name: str
    run: Run
    amount: float


@dataclass(frozen=True)
class Reading:
    """What a probe reached, in its unit's terms a microsecond, and how long it took."""

    name: str
    rate: float
    us: float


def probes(device: torch.device, machine: Machine) -> list[Probe]:
    """At most ten operations; types that the machine does not multiply are left out."""
    found = [Probe("launch", _launch(device), 1.0)]
    for name, size in (("memory", 256 * _MIB), ("cache", int(machine.cache_mib * _MIB) // 8)):
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        found.append(Probe(name, _copy(target, source), 2.0 * size))
    # PyTorch multiplies float16 on some CPUs one by one, which says nothing about kernels
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        if name in machine.matrix_flops_per_clock:
            a, b = (torch.ones(_SIDE, _SIDE, device=device, dtype=dtype) for _ in "ab")
            found.append(Probe(name, _product(a, b, torch.empty_like(a)), 2.0 * _SIDE**3))
    return found


@triton.jit
def _store_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


def _launch(device: torch.device) -> Run:
    one = torch.zeros(1, device=device)

    def run() -> None:
        with on(one):
            _store_kernel[(1,)](one)

    return run


def _copy(target: torch.Tensor, source: torch.Tensor) -> Run:
    return lambda: target.copy_(source)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Run:
    return lambda: torch.mm(a, b, out=out)


def measure(device: torch.device, machine: Machine, *, seconds: float = 0.5) -> list[Reading]:
    """Runs every probe for about `seconds`, but at least five times; takes medians."""
    found = []
    for probe in probes(device, machine):
        probe.run()
        times, until = [], time.perf_counter() + seconds
        while len(times) < _RUNS or time.perf_counter() < until:
            times.append(seconds_of(probe.run))
        us = statistics.median(times) * 1e6
        found.append(Reading(probe.name, probe.amount / us, us))
    return found


def fitted(machine: Machine, readings: list[Reading]) -> Machine:
    """The description that the readings agree with.

    An efficiency over 1 would say that the data sheet is wrong: then the rate itself is raised, so
    that the efficiency is 1.
    """
    rates = {r.name: r for r in readings}
    changed: dict[str, Any] = {}
    if launch := rates.get("launch"):
        changed["launch_us"] = launch.us
    for name, field in (("memory", "memory_gbps"), ("cache", "cache_gbps")):
        if reading := rates.get(name):
            described = getattr(machine, field) * 1e3
            changed[name] = min(1.0, reading.rate / described)
            changed[field] = max(described, reading.rate) / 1e3
    flops = dict(machine.matrix_flops_per_clock)
    cycles = machine.processors * machine.clock_ghz * 1e3
    reached = {n: rates[n].rate / cycles for n in flops if n in rates}
    if reached:
        part = min(1.0, max(reached[n] / flops[n] for n in reached))
        changed["matrix"] = part
        # one efficiency for all types; what a type reaches beside it is its rate
        changed["matrix_flops_per_clock"] = {
            n: reached[n] / part if n in reached else flops[n] for n in flops
        }
    return machine.calibrated(**changed)


def calibrate(name: str, device: torch.device, *, seconds: float = 0.5) -> tuple[Machine, Path]:
    """Measures, fits and saves the machine called `name`; where it is saved.

    Raises:
        ValueError: no machine of that name is described.
        OSError: the cache directory cannot be written.
    """
    known = machines()
    if name not in known:
        raise ValueError(f"no machine {name!r}; there are {', '.join(known)}")
    machine = fitted(known[name], measure(device, known[name], seconds=seconds))
    path = cache_directory() / "machines" / f"{name}.json"
    with locked(path):
        write_json(path, to_json(machine))
    machines.cache_clear()
    return machine, path
