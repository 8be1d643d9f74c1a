"""One run of the tuner over many tasks: alone on its machine, and saved as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from filelock import Timeout

from ..kernels.arch import arch_of
from ..kernels.table_files import user_file
from .store import locked, save
from .tasks import Maker, Setting
from .tuner import Outcome, Tuner

_WAIT_SECONDS = 3600.0
_LOCK = ".tuning.lock"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def device_of(name: str) -> torch.device:
    """The device of that name. Raises ValueError where kernels cannot run on it."""
    if name != "cpu":
        raise ValueError(f"kernels are measured on cpu, not on {name!r}")
    return torch.device(name)


def dtype_of(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def tune_all(
    makers: Sequence[tuple[Maker, Setting]],
    *,
    seconds: float,
    top: int = 8,
    repeat: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> tuple[list[Outcome], list[str]]:
    """Outcomes of all tasks, and what went wrong in saving them; `say` is told each task's name.

    Only one process of a machine measures at a time: another waits, and then finds the entries of
    the first. So processes of one job that share a cache directory choose alike.
    """
    if not makers:
        return [], []
    arch = arch_of(makers[0][1].device).name
    outcomes, trouble, seen = [], [], set()
    with ExitStack() as stack:
        try:
            stack.enter_context(_alone(arch, say))
        except (OSError, Timeout) as error:
            trouble.append(f"tuning without a lock: {error}")
        from ..kernels import tables

        # what another process wrote while this one waited
        tables.reload()
        tuner = Tuner(seconds=seconds, top=top, **options)
        for position, (maker, setting) in enumerate(makers):
            task = maker(setting)
            say(f"{task.op} {task.problem}")
            tuned = tuner.tune(task, repeat=repeat, tasks_left=len(makers) - position)
            found = [o for o in tuned if _new(o, seen)]
            outcomes += found
            entries = [o.entry for o in found if o.entry is not None]
            if entries and (problem := save(arch, entries)) and problem not in trouble:
                trouble.append(problem + "; the choices hold in this process only")
    return outcomes, trouble


def _alone(arch: str, say: Callable[[str], None]) -> ExitStack:
    """Holds the lock under which one process of a machine measures; says so where it waits."""
    with ExitStack() as stack:
        for seconds in (0.1, _WAIT_SECONDS):
            try:
                stack.enter_context(locked(user_file(arch), seconds=seconds, suffix=_LOCK))
                break
            except Timeout:
                if seconds == _WAIT_SECONDS:
                    raise
                say("waiting for another process that tunes")
        return stack.pop_all()


def _new(outcome: Outcome, seen: set[str]) -> bool:
    """Whether a kernel and problem was not met in an earlier task."""
    name = f"{outcome.op} {outcome.problem}"
    fresh = name not in seen
    seen.add(name)
    return fresh


def calibrate(device: torch.device) -> dict[str, Any]:
    """Fits the description of a device; what its factors were and are, as plain values."""
    from . import calibrate as calibrating
    from .model import machine_for

    before = machine_for(arch_of(device).name)
    machine, path = calibrating.calibrate("cpu", device)
    pairs = [
        ("launch", before.launch_us, machine.launch_us, "us"),
        ("memory", before.memory_rate / 1e3, machine.memory_rate / 1e3, "GB/s"),
        ("cache", before.cache_rate / 1e3, machine.cache_rate / 1e3, "GB/s"),
        *(
            (kind, before.rate(before.matrix_flops_per_clock[kind], "matrix") / 1e3,
             machine.rate(flops, "matrix") / 1e3, "GFLOP/s")
            for kind, flops in machine.matrix_flops_per_clock.items()
        ),
    ]  # fmt: skip
    readings = [
        {"name": name, "before": old, "after": new, "what": f"{old:.1f} -> {new:.1f} {unit}"}
        for name, old, new, unit in pairs
    ]
    return {"file": str(path), "readings": readings}
