"""Running `kexaone ...` in this process."""

from __future__ import annotations

import sys

import pytest

from kexaone.__main__ import main


def run_command(monkeypatch, capsys, *arguments):
    """Exit code, output and error output of `kexaone` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["kexaone", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err
