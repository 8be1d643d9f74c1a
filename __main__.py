"""The `kexaone` command."""

from __future__ import annotations

import sys
from typing import cast

import typer

from .autotune import commands as tuning
from .model import commands

# typer has its own copy of click in some versions and not in others: ask for what it raises
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])

app = typer.Typer(help="K-EXAONE: train, generate, inspect.", add_completion=False)
for command in (commands.demo, commands.train, commands.generate, commands.info, tuning.audit):
    app.command()(command)


def main() -> None:
    """Run the command line. Bad input ends with one line on stderr and exit code 2.

    `--debug`, anywhere on the line, shows the traceback instead.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(arguments or ["--help"], prog_name="kexaone", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        code = 130
    except (UsageError, ValueError, OSError) as error:
        if debug:
            raise
        text = error.format_message() if isinstance(error, UsageError) else str(error)
        print("error:", " ".join(text.split()), file=sys.stderr)
        code = 2
    raise SystemExit(code)


if __name__ == "__main__":
    main()
