"""The command `kexaone tune`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..files import check_writable, write_json

if TYPE_CHECKING:
    from .tasks import Maker, Setting
    from .tuner import Outcome

_Texts = list[str] | None
_DECODING_TOKENS = (1, 8)
_WIDTH = 250


def tune(
    op: Annotated[_Texts, typer.Option(help="Only this op; repeatable.")] = None,
    preset: Annotated[str, typer.Option(help="k-exaone-236b, mid or mini.")] = "mid",
    device: Annotated[str, typer.Option(help="The device to measure on.")] = "cpu",
    target: Annotated[
        str | None, typer.Option(help="A GPU that is not here, as sm_90; needs --static.")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Choose by compiling and by the cost model.")
    ] = False,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a step; repeatable; default 512.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    budget: Annotated[str, typer.Option(help="Time to spend, as 60s or 5m.")] = "120s",
    top: Annotated[int, typer.Option(min=1, help="Candidates tried of each kernel.")] = 8,
    repeat: Annotated[bool, typer.Option(help="Also what is tuned already.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --static: the table to write; default the user's.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Only fit the cost model to this device.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the outcomes here.")] = None,
) -> None:
    """Find the fastest configuration of every kernel, and keep it for all later runs.

    Kernels that are tuned for this machine, source and Triton already cost nothing.
    """
    if static != (target is not None):
        raise ValueError("--target and --static go together")
    seconds = parse_seconds(budget)
    check_writable(json)
    if target is not None:
        from . import static_commands

        static_commands.tune(target, op or [], seconds=seconds, top=top, repeat=repeat, out=out,
                             json=json)  # fmt: skip
        return
    if calibrate:
        value = _calibrate(device)
    else:
        makers = _makers(op or [], preset, tokens or [512], device, dtype)
        outcomes = _run(makers, seconds=seconds, top=top, repeat=repeat)
        # a row is kept whole where the terminal is narrower
        Console(markup=False, highlight=False, width=_WIDTH).print(table_of(outcomes))
        value = {"outcomes": [to_json(outcome) for outcome in outcomes]}
    write_json(json, value)


def _makers(
    ops: list[str], preset: str, tokens: list[int], device: str, dtype: str
) -> list[tuple[Maker, Setting]]:
    """What is to be tuned, and at which sizes. Raises ValueError."""
    from . import session
    from .tasks import DECODING, OPS, SHAPES, TRAINING, Setting

    if unknown := sorted(set(ops) - set(OPS)):
        raise ValueError(f"no op {unknown[0]!r} to tune; there are {', '.join(OPS)}")
    if preset not in SHAPES:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(SHAPES)}")
    where, kind = session.device_of(device), session.dtype_of(dtype)
    return [
        (maker, Setting(SHAPES[preset], count, where, kind))
        for table, counts in ((TRAINING, tokens), (DECODING, _DECODING_TOKENS))
        for name, listed in table.items()
        if not ops or name in ops
        for maker in listed
        for count in counts
    ]


def _calibrate(device: str) -> dict[str, Any]:
    """Fits the cost model and prints what changed."""
    from . import session

    value = session.calibrate(session.device_of(device))
    terminal = Console(markup=False, highlight=False, width=_WIDTH)
    for line in value["readings"]:
        terminal.print(f"{line['name']}: {line['what']}")
    terminal.print(f"kept in {value['file']}")
    return value


def _run(
    makers: Sequence[tuple[Maker, Setting]], *, seconds: float, top: int, repeat: bool
) -> list[Outcome]:
    """Tunes with a progress bar; what could not be saved is said on stderr."""
    from . import session

    terminal = Console(stderr=True, markup=False, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=terminal, transient=True) as bar:
        task = bar.add_task("tune", total=len(makers))
        outcomes, trouble = session.tune_all(
            makers, seconds=seconds, top=top, repeat=repeat,
            say=lambda name: bar.update(task, advance=1, description=name),
        )  # fmt: skip
    for line in trouble:
        terminal.print(line, soft_wrap=True)
    return outcomes


def parse_seconds(text: str) -> float:
    """Seconds from `60`, `60s`, `5m` or `1h`. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"a time is given as 60s, 5m or 1h, got {text!r}")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """One line for each kernel and problem."""
    table = Table(box=None, pad_edge=False)
    for name in (
        "kernel",
        "problem",
        "default us",
        "chosen us",
        "predicted",
        "faster",
        "tried",
        "chosen",
        "",
    ):
        side = "left" if name in ("kernel", "problem", "chosen", "") else "right"
        table.add_column(name, justify=side, no_wrap=True)
    for outcome in outcomes:
        table.add_row(*_row(outcome))
    return table


def _row(outcome: Outcome) -> list[str]:
    problem = pairs(outcome.problem)
    entry = outcome.entry
    if entry is None:
        return [outcome.op, problem, *[""] * 6, outcome.note]
    default, chosen, predicted = (
        entry.figures[name] for name in ("default_us", "chosen_us", "predicted_us")
    )
    return [
        outcome.op, problem, f"{default:.0f}", f"{chosen:.0f}", f"{predicted:.0f}",
        f"{default / chosen:.2f}x", str(outcome.tried), pairs(entry.config), outcome.note,
    ]  # fmt: skip


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Plain values of an outcome."""
    return {
        "op": outcome.op,
        "problem": outcome.problem,
        "note": outcome.note,
        "tried": outcome.tried,
        "entry": dataclasses.asdict(outcome.entry) if outcome.entry else None,
        "medians_us": [m * 1e6 for m in outcome.verdict.medians] if outcome.verdict else [],
    }


def pairs(values: Any) -> str:
    """`name=value` texts; the name is left out where it is a position."""
    return " ".join(f"{v}" if n.isdigit() else f"{n}={v}" for n, v in values.items())
