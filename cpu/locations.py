"""Source positions from the `#locN = loc(...)` lines of textual TTIR."""

from __future__ import annotations

import re

from .ir import Location

_DEFINITION = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_FILE = re.compile(r'^"(.*)":(\d+):(\d+)$')
_NAME = re.compile(r'^"([^"]*)"(?:\((.*)\))?$')
_CALL = re.compile(r"^callsite\((.*) at (.*)\)$")


def split_location(line: str) -> tuple[str, str]:
    """`text loc(inner)` -> (text, inner); inner is empty where the line has no location."""
    start = line.rfind(" loc(")
    while start >= 0 and not _closes_at_end(line, start + 4):
        start = line.rfind(" loc(", 0, start)
    return (line, "") if start < 0 else (line[:start], line[start + 5 : -1])


def _closes_at_end(line: str, start: int) -> bool:
    depth = 0
    for at in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[at], 0)
        if depth == 0:
            return at == len(line) - 1
    return False


class Locations:
    """Resolves location expressions against the aliases of one module text."""

    def __init__(self, text: str) -> None:
        matches = (_DEFINITION.match(line) for line in text.splitlines() if line.startswith("#loc"))
        self._aliases = {m[1]: m[2] for m in matches if m}
        self._resolved: dict[str, Location] = {}

    def resolve(self, expression: str) -> Location:
        """The innermost file and line, the variable name, and the chain of call sites."""
        if expression not in self._resolved:
            self._resolved[expression] = self._resolve(expression)
        return self._resolved[expression]

    def _resolve(self, expression: str) -> Location:
        if expression in self._aliases:
            return self.resolve(self._aliases[expression])
        if m := _FILE.match(expression):
            return Location(m[1], int(m[2]))
        if m := _CALL.match(expression):
            callee, caller = self.resolve(m[1]), self.resolve(m[2])
            outer = ((caller.file, caller.line), *caller.callers)
            return Location(callee.file, callee.line, caller.name, (*callee.callers, *outer))
        if m := _NAME.match(expression):
            inner = self.resolve(m[2]) if m[2] else Location()
            return Location(inner.file, inner.line, m[1], inner.callers)
        if expression.startswith("fused"):
            parts = re.findall(r"#loc\d*", expression)
            return self.resolve(parts[0]) if parts else Location()
        return Location()
