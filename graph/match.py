"""Patterns over a captured graph, and all the ways one fits a node.

A pattern is built from `Var` (anything, remembered by name), `Op` (a call), `Cast` (a change of
dtype, or none where the dtype is already right) and `Any` (one of several). Arguments of a call
that the pattern does not mention must have their default: a pattern never looks past an `alpha`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any as Anything

import torch
from torch import Tensor
from torch.fx import Node

from .ir import arguments, name_of, value

COMMUTATIVE = ("add", "mul", "bitwise_and", "__and__", "logical_and")
IGNORED = ("layout", "device", "pin_memory", "non_blocking", "copy", "memory_format")


@dataclass(frozen=True)
class Match:
    """What each name of a pattern stands for, and the calls it consists of."""

    bound: dict[str, Anything]
    nodes: tuple[Node, ...] = ()

    def __getitem__(self, name: str) -> Anything:
        return self.bound[name]


@dataclass(frozen=True)
class Var:
    """Anything; the same thing wherever the name occurs."""

    name: str
    fits: Callable[[Anything], bool] = lambda _: True

    def match(self, found: Anything, match: Match) -> Iterator[Match]:
        if self.name in match.bound:
            if match.bound[self.name] is found or (
                not isinstance(found, Node) and match.bound[self.name] == found
            ):
                yield match
        elif self.fits(found):
            yield Match({**match.bound, self.name: found}, match.nodes)


class Op:
    """A call of one of the operators `names` (separated by |) with these arguments."""

    def __init__(self, names: str, *positional: Anything, **named: Anything) -> None:
        self.names, self.positional, self.named = names.split("|"), positional, named

    def match(self, found: Anything, match: Match) -> Iterator[Match]:
        if not isinstance(found, Node) or name_of(found) not in self.names:
            return
        given = arguments(found)
        wanted = dict(zip(given, self.positional, strict=False)) | self.named
        if len(self.positional) > len(given) or not set(self.named) <= given.keys():
            return
        if not _defaults(found, given.keys() - wanted.keys(), given):
            return
        start = Match(match.bound, (*match.nodes, found))
        orders = [wanted]
        if name_of(found) in COMMUTATIVE and len(self.positional) == 2:
            first, second = itertools.islice(wanted, 2)
            orders.append({**wanted, first: wanted[second], second: wanted[first]})
        for order in orders:
            yield from _all([(p, given[name]) for name, p in order.items()], start)


@dataclass(frozen=True)
class Cast:
    """`inside` in another dtype (`dtype` if given), or itself where that changes nothing."""

    inside: Anything
    dtype: torch.dtype | None = None

    def match(self, found: Anything, match: Match) -> Iterator[Match]:
        tensor = isinstance(found, Node) and isinstance(value(found), Tensor)
        if not tensor or self.dtype not in (None, value(found).dtype):
            return
        if name_of(found) in ("to", "_to_copy") and isinstance(found.args[0], Node):
            inner = Match(match.bound, (*match.nodes, found))
            yield from _one(self.inside, found.args[0], inner)
        yield from _one(self.inside, found, match)


class Any:
    """The first of several patterns that fits."""

    def __init__(self, *choices: Anything) -> None:
        self.choices = choices

    def match(self, found: Anything, match: Match) -> Iterator[Match]:
        for choice in self.choices:
            yield from _one(choice, found, match)


def _one(pattern: Anything, found: Anything, match: Match) -> Iterator[Match]:
    if hasattr(pattern, "match"):
        yield from pattern.match(found, match)
    elif isinstance(pattern, list | tuple):
        if isinstance(found, list | tuple) and len(found) == len(pattern):
            yield from _all(list(zip(pattern, found, strict=True)), match)
    elif not isinstance(found, Node) and pattern == found:
        yield match


def _all(pairs: list[tuple[Anything, Anything]], match: Match) -> Iterator[Match]:
    if not pairs:
        yield match
        return
    (pattern, found), *rest = pairs
    for partial in _one(pattern, found, match):
        yield from _all(rest, partial)


def _defaults(node: Node, names: set[str], given: dict[str, Anything]) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return not names
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}
    return all(given[n] == defaults[n] for n in names if n not in IGNORED)


def first(pattern: Anything, node: Anything) -> Match | None:
    """The first way in which a pattern fits a node; None if there is none."""
    return next(_one(pattern, node, Match({})), None)


def number(found: Anything) -> bool:
    """Whether an argument is a plain number."""
    return isinstance(found, int | float) and not isinstance(found, bool)
