"""`kexaone tune --target sm_90 --static`: progress, table and file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..files import write_json
from ..kernels.arch import ARCHS
from ..kernels.table_files import plain
from .cases import CASES
from .model import machine_for
from .static import Choice, StaticTuner
from .store import save

_WIDTH = 250


def tune(
    target: str, ops: list[str], *, seconds: float, top: int, repeat: bool, out: Path | None,
    json: Path | None,
) -> list[Choice]:  # fmt: skip
    """Chooses for every case of the ops, all if none is named, and saves as it goes.

    Raises:
        ValueError: no such target or op.
    """
    if target not in ARCHS:
        raise ValueError(f"no target {target!r}; there are {', '.join(ARCHS)}")
    known = {case.op for case in CASES}
    if unknown := sorted(set(ops) - known):
        raise ValueError(f"no op {unknown[0]!r}; there are {', '.join(sorted(known))}")
    cases = [case for case in CASES if not ops or case.op in ops]
    tuner = StaticTuner(machine_for(target), ARCHS[target], seconds=seconds, top=top)
    choices: list[Choice] = []
    terminal = Console(stderr=True, markup=False, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=terminal, transient=True) as bar:
        task = bar.add_task("compile", total=len(cases))
        for case in cases:
            bar.update(task, description=f"{case.op} {case.problem}")
            found = tuner.tune(case, repeat=repeat)
            choices += found
            entries = [c.entry for c in found if c.entry is not None]
            if entries and (trouble := save(target, entries, out)):
                terminal.print(trouble, soft_wrap=True)
            bar.advance(task)
    Console(markup=False, highlight=False, width=_WIDTH).print(_table(choices))
    value = {"target": target, "choices": [dataclasses.asdict(c) for c in choices]}
    write_json(json, value, default=plain)
    return choices


def _table(choices: list[Choice]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("kernel", "problem", "default us", "chosen us", "faster", "legal", "chosen", ""):
        side = "right" if name in ("default us", "chosen us", "faster", "legal") else "left"
        table.add_column(name, justify=side, no_wrap=True)
    for choice in choices:
        legal = sum(not e.fault for e in choice.estimates)
        count = f"{legal} of {len(choice.estimates)}" if choice.estimates else ""
        cells = ["", "", "", count, ""]
        if choice.entry is not None:
            chosen, default = (choice.entry.figures[n] for n in ("chosen_us", "default_us"))
            cells = [f"{default:.1f}", f"{chosen:.1f}", f"{default / chosen:.2f}x", count,
                     _pairs(dict(choice.entry.config))]  # fmt: skip
        table.add_row(choice.op, _pairs(choice.problem), *cells, choice.note)
    return table


def _pairs(values: dict) -> str:
    return " ".join(f"{v}" if n.isdigit() else f"{n}={v}" for n, v in values.items())
