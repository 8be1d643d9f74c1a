"""The `kexaone` command."""

from __future__ import annotations

import os
import sys
from typing import cast

import typer

from .autotune import commands as auditing
from .autotune import tune_commands as tuning
from .bench import commands as measuring
from .model import commands, explain_command, generate_command

INTERRUPTED = 130
# typer has its own copy of click in some versions and not in others: ask for what it raises
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])

app = typer.Typer(help="K-EXAONE: train, generate, inspect.", add_completion=False)
for command in (
    commands.demo,
    commands.train,
    generate_command.generate,
    commands.info,
    measuring.bench,
    tuning.tune,
    auditing.audit,
):
    app.command()(command)
app.command(name="explain")(explain_command.explain_command)


def main() -> None:
    """Run the command line. Bad input ends with one line on stderr and exit code 2.

    `--debug`, anywhere on the line, shows the traceback instead.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(arguments or ["--help"], prog_name="kexaone", standalone_mode=False)
        if code == INTERRUPTED:
            # typer has turned the interrupt into a code, or raises it below: versions differ
            raise KeyboardInterrupt
    except (typer.Abort, KeyboardInterrupt):
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except (UsageError, ValueError, OSError, MemoryError, RuntimeError, SystemExit) as error:
        text = _line(error)
        if debug or text is None:
            raise
        print("error:", text, file=sys.stderr)
        code = 2
    raise SystemExit(code)


def _line(error: BaseException) -> str | None:
    """What to tell about bad input or a machine that refuses; None for a fault of the program."""
    if isinstance(error, BrokenPipeError | SystemExit):
        # typer and rich end the program without a word when nobody reads its output, and the
        # interpreter would still complain when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return "the output was closed before its end"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "not enough memory"
    if isinstance(error, RuntimeError):
        # torch tells of a full GPU by a subclass of RuntimeError
        full = type(error).__name__ == "OutOfMemoryError"
        return "not enough memory on the device" if full else None
    text = error.format_message() if isinstance(error, UsageError) else str(error)
    return " ".join(text.split())


if __name__ == "__main__":
    main()
