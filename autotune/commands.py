"""The command `kexaone audit`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..files import check_writable, write_json
from ..kernels.arch import ARCHS, Arch

if TYPE_CHECKING:
    from .audit import Report
    from .cases import Case

_WIDTH = 250
_Texts = list[str] | None


def audit(
    kernel: Annotated[
        str | None, typer.Argument(help="Your own @triton.jit kernel, as module:function.")
    ] = None,
    target: Annotated[
        _Texts, typer.Option(help=f"Repeatable; default all: {', '.join(ARCHS)}.")
    ] = None,
    op: Annotated[_Texts, typer.Option(help="Only this op; repeatable.")] = None,
    arg: Annotated[
        _Texts,
        typer.Option(help="Own kernel: NAME=*bf16:16 (a pointer, aligned), i32:16 or a number."),
    ] = None,
    const: Annotated[_Texts, typer.Option(help="Own kernel: NAME=VALUE of a constexpr.")] = None,
    grid: Annotated[str, typer.Option(help="Own kernel: programs, as 8192 or 64,48.")] = "1",
    useful_bytes: Annotated[
        int, typer.Option(help="Own kernel: bytes of its inputs and outputs together.")
    ] = 0,
    num_warps: Annotated[int, typer.Option(help="Own kernel: warps.")] = 4,
    num_stages: Annotated[int, typer.Option(help="Own kernel: pipeline stages.")] = 3,
    workers: Annotated[int, typer.Option(help="Compilations at a time; 0: one per core.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the reports here.")] = None,
) -> None:
    """Compile kernels for GPUs that need not be here, and judge their machine code.

    Exit status 1: a kernel spills, does not fit, does not compile or lost its 16-byte accesses.
    """
    import triton

    from . import audit as auditing
    from .user_kernel import user_launch, user_subject

    archs = [_arch(name) for name in target or ARCHS]
    check_writable(json)
    if workers < 0 or useful_bytes < 0:
        raise ValueError("--workers and --useful-bytes must not be negative")
    if kernel is not None:
        if op:
            raise ValueError("give either a kernel or --op")
        options = {"num_warps": num_warps, "num_stages": num_stages}
        launch = user_launch(kernel, arg or (), const or (), grid, options)
        found = [user_subject(kernel, launch, arch, useful_bytes) for arch in archs]
    else:
        if arg or const:
            raise ValueError("--arg and --const describe a kernel of your own: name it")
        cases = _cases(op or [])
        found = [s for arch in archs for case in cases for s in auditing.subjects(case, arch)]
    with _progress() as bar:
        task = bar.add_task("compile", total=len(found))
        reports = list(
            auditing.audit(found, workers=workers or os.cpu_count(), done=lambda: bar.advance(task))
        )
    show(reports, archs)
    failures = sum(bool(report.problems) for report in reports)
    found_json = [report.to_json() for report in reports]
    write_json(json, {"triton": triton.__version__, "failures": failures, "reports": found_json})
    if failures:
        raise typer.Exit(1)


def _cases(names: list[str]) -> list[Case]:
    """The registered cases of some ops, all if none is named."""
    from .cases import CASES

    known = {case.op for case in CASES}
    for name in names:
        if name not in known:
            raise ValueError(f"no op {name!r}; there are {', '.join(sorted(known))}")
    return [case for case in CASES if not names or case.op in names]


def _arch(name: str) -> Arch:
    if name not in ARCHS:
        raise ValueError(f"no target {name!r}; there are {', '.join(ARCHS)}")
    return ARCHS[name]


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)


def show(reports: Sequence[Report], archs: Sequence[Arch]) -> None:
    """A table per target, then what is wrong, one line each."""
    console = Console(markup=False, highlight=False)
    # a row is kept whole where the terminal is narrower
    wide = Console(markup=False, highlight=False, width=_WIDTH)
    for arch in archs:
        table = Table(title=arch.name, title_justify="left", box=None, pad_edge=False)
        for name in (
            "op", "kernel", "regs", "spill", "smem", "warps", "occ", "mma", "load", "store",
            "async", "instr", "/KiB", "/kflop", "moved",
        ):  # fmt: skip
            side = "left" if name in ("op", "kernel") else "right"
            table.add_column(name, justify=side, no_wrap=True)
        for report in reports:
            if report.target == arch.name:
                table.add_row(*_row(report))
        wide.print(table)
    console.print(
        "load, store: instructions x bytes per thread; async: copies, and bulk copies (TMA); "
        "/KiB, /kflop: instructions of a warp per useful KiB (each byte of the tensors it touches, "
        "once) and per 1000 operations of matrix products; moved: bytes requested per useful byte "
        "(~: steered by data that is not there)."
    )
    for report in reports:
        for problem in report.problems:
            text = f"FAIL {report.target} {report.op} {report.kernel}: {problem}"
            console.print(text, soft_wrap=True)
    wrong = sum(bool(report.problems) for report in reports)
    console.print(f"{len(reports) - wrong} of {len(reports)} kernels pass")


def _row(report: Report) -> list[str]:
    name = f"{report.op} {report.problem}".strip()
    code = report.code
    if code is None:
        return [name, report.kernel, *("-" for _ in range(13))]

    def optional(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def widths(kind: str) -> str:
        return " ".join(f"{n}x{size}" for size, n in reversed(code.widths(kind).items())) or "-"

    copies, bulk = code.count("async"), code.count("bulk")
    moved = optional(report.moved_per_useful, 2)
    return [
        name, f"{report.kernel} x{report.launches}" if report.launches > 1 else report.kernel,
        str(code.registers), str(code.spilled), str(code.shared),
        str(code.warps), f"{report.occupancy:.0%}",
        " ".join(f"{k} {n}" for k, n in code.mma.items()) or "-",
        widths("load"), widths("store"), f"{copies}+{bulk}" if copies + bulk else "-",
        str(code.instructions), optional(report.instructions_per_kib),
        optional(report.instructions_per_kiloflop),
        moved if report.exact or moved == "-" else f"~{moved}",
    ]  # fmt: skip
