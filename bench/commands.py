"""The `kexaone bench` command."""

from __future__ import annotations

import dataclasses
import platform
from json import loads
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

from ..files import check_writable, write_json
from ..model.allocator import keep_freed_memory
from ..model.config import Config
from ..model.console import console, progress
from .measure import matmul_rate
from .predictions import show_predictions
from .registry import JOBS
from .rows import measure

SHAPES = {"mid": "mid", "236b": "k-exaone-236b", "mini": "mini"}


def bench(
    op: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    shapes: Annotated[str, typer.Option(help="mini, mid or 236b.")] = "mid",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per call.")] = 2048,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each row.")] = 2.0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 keeps PyTorch's.")] = 0,
    list_ops: Annotated[bool, typer.Option("--list", help="Only list what there is.")] = False,
    predict: Annotated[
        Path | None,
        typer.Option(
            help="Measure nothing: hold the cost model against published times (a CSV) or "
            "published choices of tiles (a folder)."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here, after each op.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what --json PATH has from here, measure the rest."),
    ] = False,
) -> None:
    """Time every op, forward and backward, against its peers on this machine.

    All sides of a row run in turn, in an order drawn anew each time; figures are medians, ratios
    above 1 are in our favour. Correctness is checked first. Ctrl-C ends it with what there is.
    """
    if predict is not None:
        check_writable(json)
        write_json(json, show_predictions(predict))
        return
    from . import jobs_matrix, jobs_rows  # noqa: F401  (they fill JOBS)

    names = op or list(JOBS)
    unknown = sorted(set(names) - JOBS.keys())
    if unknown:
        raise ValueError(f"unknown op {', '.join(unknown)}; there are: {', '.join(JOBS)}")
    if shapes not in SHAPES:
        raise ValueError(f"unknown shapes {shapes!r}; there are: {', '.join(SHAPES)}")
    if resume and json is None:
        raise ValueError("--resume needs --json PATH, the file to go on with")
    terminal = console()
    if list_ops:
        for name in names:
            terminal.print(name)
        return
    check_writable(json)
    if threads:
        torch.set_num_threads(threads)
    report = _Report(shapes, tokens)
    if resume and json is not None and json.exists():
        report.take(json)
    rate = matmul_rate(torch.bfloat16, torch.device("cpu"))
    cfg = Config.preset(SHAPES[shapes])
    terminal.print(_line("op", "ms", "best peer", "ms", "ratio", "GB/s", "copy", "matmul"))
    with keep_freed_memory(), progress(terminal) as bar:
        task = bar.add_task("bench", total=len(names), note="")
        for name in names:
            bar.update(task, note=name)
            rows = [row for row in report.rows if row["op"] == name]
            if not rows:
                found = measure(name, JOBS[name](cfg, tokens), seconds=seconds, matmul_flops=rate)
                rows = [dataclasses.asdict(row) for row in found]
                report.rows += rows
                write_json(json, report.content(complete=name == names[-1]))
            for row in rows:
                bar.console.print(_line(*_cells(row)), highlight=False, markup=False)
            bar.advance(task)


class _Report:
    """Rows measured here, and what they depend on."""

    def __init__(self, shapes: str, tokens: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.conditions = {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "shapes": shapes,
            "tokens": tokens,
        }

    def take(self, path: Path) -> None:
        """Go on with a file. Raises ValueError if it was measured under other conditions."""
        try:
            found = loads(path.read_text())
            conditions, rows = found["conditions"], list(found["rows"])
            _ = [_cells(row) for row in rows]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is no report of this benchmark") from None
        for name, value in self.conditions.items():
            if conditions.get(name) != value:
                raise ValueError(
                    f"{path} was measured with {name} {conditions.get(name)}, this would be {value}"
                )
        self.rows = rows

    def content(self, *, complete: bool) -> dict[str, Any]:
        return {"conditions": self.conditions, "complete": complete, "rows": self.rows}


_WIDTHS = (-23, 8, -15, 8, 6, 6, 6, 7)


def _line(*cells: str) -> str:
    return " ".join(
        cell.ljust(-width) if width < 0 else cell.rjust(width - 1)
        for cell, width in zip(cells, _WIDTHS, strict=True)
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Bandwidth as the part of a copy's, arithmetic as that of the library's matrix product."""
    return (
        row["op"] + (" bwd" if row["direction"] == "backward" else ""),
        f"{row['ours']['median']:.4g}",
        row["best_peer"],
        f"{row['peers'][row['best_peer']]['median']:.4g}",
        f"{row['ratio']:.2f}",
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['bandwidth']:.0%}",
        f"{row['compute']:.0%}" if row["compute"] else "",
    )
