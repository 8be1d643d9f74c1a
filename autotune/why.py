"""`kexaone.why`: which implementation and which configurations a call uses, and for what reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..kernels.table_files import plain
from ..kernels.tables import recording


def why(function: Callable[..., Any], *args: Any, **named: Any) -> list[str]:
    """Calls `function` and prints, for each kernel family that it launches, one line.

    A line names the family, its problem, the configuration and the reason. Without Triton kernels
    there is one line that says so. The lines are returned too.
    """
    with recording() as found:
        function(*args, **named)
    lines = list(dict.fromkeys(
        f"{d.op} ({_text(plain(d.problem))}{f', {d.dtype}' if d.dtype else ''}): "
        f"{_text(plain(d.config))}: {d.reason}" for d in found
    )) or ["no kernel of kexaone was launched"]  # fmt: skip
    for line in lines:
        print(line)
    return lines


def _text(values: dict[str, Any]) -> str:
    return ", ".join(f"{v}" if n.isdigit() else f"{n}={v}" for n, v in values.items())
