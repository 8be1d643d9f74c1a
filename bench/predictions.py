"""The tables of `kexaone bench --predict`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table

from ..model.console import console, progress
from . import published, ranking

_LEGEND = (
    "within 5 %: problems where the published winner is predicted so near the predicted best; "
    "first 8: its tile is among them; median: of its predicted time over the best; equal: part of "
    "all tiles that are within 5 % of the best (where it is large, the model says little); "
    "no worse: problems where the pick is predicted no slower than the framework's default."
)
TARGETS = {"memory": 0.15, "tensor": 0.25}


def show_predictions(path: Path) -> dict[str, Any]:
    """Prints how the cost model does on published data; the same as plain values.

    Raises:
        ValueError: the path is neither such a table nor such a folder.
    """
    if path.is_dir():
        return _show_ranking(path)
    if not path.is_file():
        raise ValueError(f"no such file or folder: {path}")
    results, left = published.evaluate(published.read(path))
    terminal = console()
    table = _table("family", "bound", "tier", "rows", "prior", "calibrated", "worst", "target")
    found = published.summaries(results)
    for s in found:
        target = TARGETS[s.bound]
        met = (" met" if s.calibrated <= target else " no") if s.tier == "A" else ""
        table.add_row(s.family, s.bound, s.tier, str(s.rows), f"{s.prior:.1%}",
                      f"{s.calibrated:.1%}", f"{s.worst:.0%}", f"{target:.0%}{met}")  # fmt: skip
    terminal.print(table)
    terminal.print("median |predicted / published - 1|: with the priors, and calibrated by")
    for result in results:
        if result.calibrates:
            sizes = ", ".join(f"{n}={v:g}" for n, v in result.row.sizes.items())
            terminal.print(f"  {result.calibrates}: {result.row.kernel}, {sizes}, "
                           f"{result.row.value:g} {result.row.metric}")  # fmt: skip
    terminal.print(f"{len(results)} rows predicted, {left} of no family or GPU that is described")
    return {
        "families": [dataclasses.asdict(s) for s in found],
        "rows": [dataclasses.asdict(r) for r in results],
        "left_out": left,
    }


def _show_ranking(folder: Path) -> dict[str, Any]:
    problems = ranking.layers(folder)
    terminal, verdicts = console(), []
    with progress(terminal) as bar:
        task = bar.add_task("rank", total=len(problems), note="")
        for problem in problems:
            verdict = ranking.judge(*problem)
            verdicts += [verdict] if verdict is not None else []
            bar.advance(task)
    table = _table("GPU", "type", "problems", "within 5 %", "first 8", "median", "equal",
                   "no worse")  # fmt: skip
    found = ranking.rankings(verdicts)
    for r in found:
        table.add_row(r.gpu, r.kind, str(r.problems), f"{r.close:.0%}", f"{r.top:.0%}",
                      f"{r.median:.2f}", f"{r.equal:.0%}", f"{r.beats_default:.0%}")  # fmt: skip
    terminal.print(table)
    terminal.print(_LEGEND, soft_wrap=True)
    return {
        "groups": [dataclasses.asdict(r) for r in found],
        "problems": [dataclasses.asdict(v) for v in verdicts],
    }


def _table(*names: str) -> Table:
    """A table without lines, so that it fits a terminal."""
    table = Table(box=None, pad_edge=False)
    for name in names:
        side = "left" if name in ("family", "bound", "tier", "GPU", "type") else "right"
        table.add_column(name, no_wrap=True, justify=side)
    return table
