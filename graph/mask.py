"""What an attention mask says, read off the graph that computes it.

A mask is a function of the places b, h, i, j of its elements. Evaluating its graph with affine
functions of the places instead of tensors gives, for masks made of `arange`, comparisons and
`and`, a list of conditions c_0 b + c_1 h + c_2 i + c_3 j + c >= 0. Conditions that leave "j up to
i + offset" and "j above i + offset - window" are what the attention kernel does without a mask;
anything that depends on data is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from . import shim
from .ir import Refused, arguments, name_of, value

LOWEST = {torch.finfo(d).min for d in (torch.float16, torch.bfloat16, torch.float32)} | {-math.inf}


@dataclass(frozen=True)
class Affine:
    """sum over dimensions of slope * place, plus a constant."""

    slopes: tuple[int, ...]
    constant: Any

    def at(self, sizes: Any) -> Affine:
        """Broadcast to `sizes`' rank: a dimension of size one has no slope."""
        slopes = (0,) * (len(sizes) - len(self.slopes)) + self.slopes
        return replace(self, slopes=slopes)

    def minus(self, other: Affine) -> Affine:
        rank = max(len(self.slopes), len(other.slopes))
        a, b = self.at(range(rank)), other.at(range(rank))
        return Affine(tuple(x - y for x, y in zip(a.slopes, b.slopes, strict=True)),
                      a.constant - b.constant)  # fmt: skip


@dataclass(frozen=True)
class Where:
    """True where every condition is >= 0. `additive`: zero there, and minus infinity elsewhere.

    `denied`: false where every condition is >= 0, and true elsewhere.
    """

    conditions: tuple[Affine, ...]
    rank: int
    additive: bool = False
    denied: bool = False


@dataclass(frozen=True)
class Seen:
    """Query i sees keys up to i + offset, and with window > 0 only the last `window` of these."""

    offset: Any
    window: int


def read(mask: Node) -> Seen:
    """What queries see under a mask [B or 1, H or 1, T, S].

    Raises:
        Refused: the mask is no causal or windowed one, or depends on data.
    """
    found = _condition(_evaluate(mask, {}))
    *_, queries, keys = value(mask).shape
    single = bool(shim.known(queries == 1))
    offset, below = None, None
    for condition in found.conditions:
        *others, i, j = condition.at(range(max(4, len(condition.slopes)))).slopes
        if not any((*others, i, j)) and shim.known(condition.constant >= 0):
            continue
        # the only query's place is 0
        i = -j if single else i
        if any(others) or (i, j) not in ((1, -1), (-1, 1)):
            raise Refused("the mask is neither causal nor a window")
        if (i, j) == (1, -1) and offset is None:
            offset = condition.constant
        elif (i, j) == (-1, 1) and below is None:
            below = condition.constant
        else:
            raise Refused("the mask has several limits")
    if offset is None:
        if not single:
            raise Refused("the mask is not causal")
        offset = keys - 1
    window = 0 if below is None else offset + below + 1
    if not isinstance(window, int) or window < 0:
        raise Refused("the window is not a fixed number")
    return Seen(offset, window)


Found = Affine | Where


def _evaluate(node: Any, known: dict[Node, Found]) -> Found:
    if not isinstance(node, Node):
        if isinstance(node, bool | float):
            raise Refused("the mask is not a condition on positions")
        return Affine((), node)
    if isinstance(value(node), int | torch.SymInt):
        return Affine((), value(node))
    if node not in known:
        rule = RULES.get(name_of(node))
        if rule is None:
            raise Refused(f"the mask depends on {name_of(node) or node.name}")
        known[node] = _squeezed(rule(node, arguments(node), lambda n: _evaluate(n, known)), node)
    return known[node]


def _squeezed(found: Found, node: Node) -> Found:
    """Without slopes along dimensions of size one, whose only place is 0."""
    sizes = value(node).shape

    def drop(affine: Affine) -> Affine:
        pairs = zip(affine.at(sizes).slopes, sizes, strict=True)
        return replace(affine, slopes=tuple(0 if shim.known(n == 1) else s for s, n in pairs))

    if isinstance(found, Affine):
        return drop(found)
    return replace(found, conditions=tuple(drop(c) for c in found.conditions), rank=len(sizes))


Rule = Callable[[Node, dict[str, Any], Callable[[Any], Found]], Found]


def _map(found: Found, change: Callable[[Affine], Affine]) -> Found:
    if isinstance(found, Affine):
        return change(found)
    return replace(found, conditions=tuple(change(c) for c in found.conditions))


def _affine(found: Found) -> Affine:
    if not isinstance(found, Affine):
        raise Refused("the mask calculates with conditions")
    return found


def _condition(found: Found) -> Where:
    if not isinstance(found, Where):
        raise Refused("the mask is not a condition on positions")
    if found.denied:
        raise Refused("the mask denies several conditions")
    return found


def _arange(node: Node, given: dict[str, Any], _: Any) -> Affine:
    if value(node).dtype.is_floating_point:
        raise Refused("the mask calculates with fractions")
    return Affine((value(given.get("step", 1)),), value(given.get("start", 0)))


def _sum(sign: int) -> Rule:
    def rule(node: Node, given: dict[str, Any], of: Any) -> Found:
        a, b = _affine(of(given["self"])), _affine(of(given["other"]))
        if given.get("alpha", 1) != 1:
            raise Refused("the mask calculates with factors")
        negative = Affine(tuple(-s for s in b.slopes), -b.constant)
        return a.minus(negative if sign > 0 else b)

    return rule


def _compare(left: int, margin: int, both: bool = False) -> Rule:
    """left * (a - b) - margin >= 0, and with `both` its mirror image."""

    def rule(node: Node, given: dict[str, Any], of: Any) -> Where:
        a, b = _affine(of(given["self"])), _affine(of(given["other"]))
        first = a.minus(b) if left > 0 else b.minus(a)
        first = replace(first, constant=first.constant - margin)
        mirrored = (Affine(tuple(-s for s in first.slopes), -first.constant),) if both else ()
        return Where((first, *mirrored), 0)

    return rule


def _not_equal(node: Node, given: dict[str, Any], of: Any) -> Where:
    difference = _affine(of(given["self"])).minus(_affine(of(given["other"])))
    if any(difference.slopes) or not shim.known(difference.constant == 0):
        raise Refused("the mask depends on which positions differ")
    return Where((Affine(difference.slopes, -1),), 0)


def _and(node: Node, given: dict[str, Any], of: Any) -> Where:
    a, b = _condition(of(given["self"])), _condition(of(given["other"]))
    rank = range(max(a.rank, b.rank))
    return Where(tuple(c.at(rank) for c in (*a.conditions, *b.conditions)), len(rank))


def _not(node: Node, given: dict[str, Any], of: Any) -> Where:
    found = of(given["self"])
    if not isinstance(found, Where) or found.additive:
        raise Refused("the mask is not a condition on positions")
    if len(found.conditions) != 1 or found.denied:
        return replace(found, denied=not found.denied)
    (c,) = found.conditions
    return replace(found, conditions=(Affine(tuple(-s for s in c.slopes), -c.constant - 1),))


def _axis(dim: int, rank: int) -> int:
    return dim % rank


def _unsqueeze(node: Node, given: dict[str, Any], of: Any) -> Found:
    at = _axis(given["dim"], value(node).dim())
    return _map(of(given["self"]), lambda a: replace(a, slopes=(*a.slopes[:at], 0, *a.slopes[at:])))


def _slice(node: Node, given: dict[str, Any], of: Any) -> Found:
    at, start = _axis(given["dim"], value(node).dim()), value(given["start"]) or 0
    if isinstance(start, int) and start < 0:
        raise Refused("the mask is cut from its end")

    def cut(a: Affine) -> Affine:
        slope = a.slopes[at]
        slopes = (*a.slopes[:at], slope * given["step"], *a.slopes[at + 1 :])
        return Affine(slopes, a.constant + slope * start)

    return _map(of(given["self"]), cut)


def _same(node: Node, given: dict[str, Any], of: Any) -> Found:
    rank = value(node).dim()
    return _map(of(given["self"]), lambda a: a.at(range(rank)))


def _cast(node: Node, given: dict[str, Any], of: Any) -> Found:
    found = of(given["self"])
    if isinstance(found, Where) and found.additive and value(node).dtype.is_floating_point:
        return found
    if (value(node).dtype == torch.bool) != isinstance(found, Where):
        raise Refused("the mask turns numbers into conditions")
    if value(node).dtype.is_floating_point:
        raise Refused("the mask calculates with fractions")
    return found


def _ones(node: Node, given: dict[str, Any], of: Any) -> Found:
    if value(node).dtype == torch.bool and given.get("fill_value", True) is True:
        return Where((), value(node).dim())
    raise Refused("the mask is not a condition on positions")


def _triangle(sign: int) -> Rule:
    def rule(node: Node, given: dict[str, Any], of: Any) -> Where:
        found = _condition(of(given["self"]))
        slopes = (0,) * (value(node).dim() - 2) + (sign, -sign)
        return replace(found, conditions=(*found.conditions,
                                          Affine(slopes, sign * given["diagonal"])))  # fmt: skip

    return rule


def _index(node: Node, given: dict[str, Any], of: Any) -> Affine:
    table = _affine(of(given["self"]))
    places = given["indices"]
    if len(places) != len(table.slopes) or any(p is None for p in places):
        raise Refused("the mask looks up only some dimensions")
    rank, total = value(node).dim(), Affine((0,) * value(node).dim(), table.constant)
    for slope, place in zip(table.slopes, places, strict=True):
        at = _affine(of(place)).at(range(rank))
        total = total.minus(Affine(tuple(-slope * s for s in at.slopes), -slope * at.constant))
    return total


def _diff(node: Node, given: dict[str, Any], of: Any) -> Affine:
    x, rank = _affine(of(given["self"])), value(node).dim()
    at = _axis(given["dim"], rank)
    if given["n"] != 1 or given["append"] is not None:
        raise Refused("the mask takes other differences than of neighbours")
    if given["prepend"] is not None:
        jump = x.minus(_affine(of(given["prepend"])))
        along = jump.slopes[:at] + jump.slopes[at + 1 :]
        one = shim.known(value(given["prepend"]).shape[at] == 1)
        if not one or any(along) or not shim.known(jump.constant == x.slopes[at]):
            raise Refused("the mask depends on where sequences begin")
    return Affine((0,) * rank, x.slopes[at])


def _cumsum(node: Node, given: dict[str, Any], of: Any) -> Affine:
    found = of(given["self"])
    if isinstance(found, Where):
        never = any(not any(c.slopes) and shim.known(c.constant < 0) for c in found.conditions)
        zero = never
    else:
        zero = not any(found.slopes) and shim.known(found.constant == 0)
    if not zero:
        raise Refused("the mask depends on where sequences begin")
    return Affine((0,) * value(node).dim(), 0)


def _scalar(found: Any) -> float | None:
    """The number that a node or argument is everywhere."""
    if isinstance(found, Node):
        name = name_of(found)
        if name in ("zeros", "new_zeros", "zeros_like"):
            return 0.0
        if name in ("full", "full_like", "scalar_tensor", "new_full"):
            given = arguments(found)
            found = given.get("fill_value", given.get("s"))
    return float(found) if isinstance(found, int | float) else None


def _choose(node: Node, given: dict[str, Any], of: Any) -> Where:
    if _scalar(given["self"]) != 0 or _scalar(given["other"]) not in LOWEST:
        raise Refused("the mask adds other numbers than zero and the lowest")
    return replace(_condition(of(given["condition"])), additive=True)


def _fill(node: Node, given: dict[str, Any], of: Any) -> Where:
    if _scalar(given["self"]) != 0 or _scalar(given["value"]) not in LOWEST:
        raise Refused("the mask adds other numbers than zero and the lowest")
    seen = _condition(_not(node, {"self": given["mask"]}, of))
    return replace(seen, additive=True)


RULES: dict[str, Rule] = {
    "arange": _arange, "add": _sum(1), "sub": _sum(-1), "unsqueeze": _unsqueeze, "slice": _slice,
    "expand": _same, "alias": _same, "contiguous": _same, "clone": _same, "to": _cast,
    "_to_copy": _cast, "le": _compare(-1, 0), "lt": _compare(-1, 1), "ge": _compare(1, 0),
    "gt": _compare(1, 1), "eq": _compare(1, 0, both=True), "ne": _not_equal, "__and__": _and,
    "bitwise_and": _and, "logical_and": _and, "logical_not": _not, "bitwise_not": _not,
    "new_ones": _ones, "ones": _ones, "ones_like": _ones, "full": _ones, "tril": _triangle(1),
    "triu": _triangle(-1), "index": _index, "diff": _diff, "cumsum": _cumsum, "where": _choose,
    "masked_fill": _fill,
}  # fmt: skip
"""One rule per operator that masks are made of."""


def is_tensor(node: Any) -> bool:
    """Whether an argument is a tensor of the graph."""
    return isinstance(node, Node) and isinstance(value(node), Tensor)
