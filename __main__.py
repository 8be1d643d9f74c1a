"""The `kexaone` command."""

from __future__ import annotations

import sys

import click
import typer

from .model import commands

app = typer.Typer(
    help="K-EXAONE: train, generate, inspect.", no_args_is_help=True, add_completion=False
)
for command in (commands.demo, commands.train, commands.generate, commands.info):
    app.command()(command)


def main() -> None:
    """Run the command line. Bad input ends with one line on stderr and exit code 2.

    `--debug`, anywhere on the line, shows the traceback instead.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(arguments, prog_name="kexaone", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        code = 2
    except (click.Abort, KeyboardInterrupt):
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        code = 130
    except (click.ClickException, ValueError, OSError) as error:
        if debug:
            raise
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print("error:", " ".join(text.split()), file=sys.stderr)
        code = 2
    raise SystemExit(code)


if __name__ == "__main__":
    main()
