"""The `kexaone bench` command."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from rich.table import Table

from ..files import check_writable, write_json
from ..model.allocator import keep_freed_memory
from ..model.config import Config
from ..model.console import console, progress
from .measure import matmul_rate
from .predictions import show_predictions
from .registry import JOBS
from .rows import Row, measure

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
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Time every op, forward and backward, against its peers on this machine.

    All sides of a row run alternately; figures are medians. Correctness is checked first.
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
    terminal = console()
    if list_ops:
        for name in names:
            terminal.print(name)
        return
    check_writable(json)
    if threads:
        torch.set_num_threads(threads)
    cfg = Config.preset(SHAPES[shapes])
    rate = matmul_rate(torch.bfloat16, torch.device("cpu"))
    rows: list[Row] = []
    with keep_freed_memory(), progress(terminal) as bar:
        task = bar.add_task("bench", total=len(names), note="")
        for name in names:
            bar.update(task, note=name)
            rows += measure(name, JOBS[name](cfg, tokens), seconds=seconds, matmul_flops=rate)
            bar.advance(task)
    terminal.print(_table(rows))
    machine = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "bf16_gflops": rate / 1e9,
    }
    write_json(json, {"machine": machine, "shapes": shapes, "tokens": tokens,
                      "rows": [dataclasses.asdict(row) for row in rows]})  # fmt: skip


def _table(rows: list[Row]) -> Table:
    table = Table()
    for name in ("op", "ms", "best peer", "ms", "ratio", "GB/s", "of copy", "of matmul"):
        table.add_column(
            name, no_wrap=True, justify="left" if name in ("op", "best peer") else "right"
        )
    for row in rows:
        table.add_row(
            row.op if row.direction == "forward" else f"{row.op} backward",
            f"{row.ours.median:.3f}",
            row.best_peer,
            f"{row.peers[row.best_peer].median:.3f}",
            f"{row.ratio:.2f}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.bandwidth:.0%}",
            f"{row.compute:.0%}" if row.compute else "",
        )
    return table
