"""The suite: which passes run in which order, what they found, and the identity of it all."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from torch.fx import GraphModule, Node

from .ir import Refused, Rewrite, where
from .normalize import normalize

ORDER = (
    "embedding", "rms_norm", "qk_norm_rope", "add_rms_norm", "attention", "route", "experts",
    "swiglu", "cross_entropy",
)  # fmt: skip
"""Modules of this folder, each with a `PASS`."""


@dataclass(frozen=True)
class Pass:
    """`anchor` says whether a node is the last of a pattern; `rewrite` replaces it or raises
    Refused. `expected`: how many there are in a decoder."""

    name: str
    anchor: Callable[[Node], bool]
    rewrite: Callable[[Rewrite, Node], None]
    expected: str


@dataclass(frozen=True)
class Place:
    """A pattern found in a module; `reason` says why it stays, empty where it was replaced."""

    name: str
    module: str
    reason: str = ""


@dataclass
class Report:
    """What a rewritten graph's passes found; `whole` says why a graph was left as it is.

    `claimed`: which pass took a node of the graph before, by the node's name.
    """

    places: list[Place] = field(default_factory=list)
    whole: str = ""
    claimed: dict[str, str] = field(default_factory=dict)

    def count(self, name: str) -> int:
        return sum(p.name == name and not p.reason for p in self.places)

    @property
    def matches(self) -> dict[str, int]:
        """Replacements by pass."""
        names = [p.name for p in self.places if not p.reason]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    @property
    def refusals(self) -> list[Place]:
        return [p for p in self.places if p.reason]


def suite(*, fp8: bool = False) -> list[Pass]:
    """The passes in their order; `fp8` comes last, as it casts what the others put in."""
    names = (*ORDER, "fp8") if fp8 else ORDER
    return [import_module(f".{name}", __package__).PASS for name in names]


def rewrite(module: GraphModule, *, training: bool, passes: list[Pass] | None = None) -> Report:
    """Run the passes on a captured graph, in place."""
    normalize(module)
    graph, report = Rewrite(module, training), Report()
    for step in suite() if passes is None else passes:
        for node in list(module.graph.nodes):
            if node.op != "call_function" or not node.users or not step.anchor(node):
                continue
            place = where(node)
            try:
                step.rewrite(graph, node)
            except Refused as refusal:
                report.places.append(Place(step.name, place, str(refusal)))
            else:
                report.places.append(Place(step.name, place))
                graph.sweep()
    graph.finish()
    report.claimed = graph.claimed
    return report


@functools.cache
def identity() -> str:
    """A hash of the source of every file of the graph layer: part of the compile caches' keys."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"kexaone-{digest.hexdigest()[:16]}"
