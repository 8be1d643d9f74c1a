"""What the passes do to a model: what was matched where, what stays and why, and what it costs.

A graph's cost is counted per operator that computes something: one call, and the bytes of each
tensor it reads and writes, once, as far as they are different memory. That is what running the
graph operator by operator moves; a compiler that fuses the rest moves less on both sides.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import shim
from .ir import is_view, name_of, value, where
from .passes import Place, Report, rewrite

LAYER = re.compile(r"layers\.(\d+)")
OUTSIDE = "around"


@dataclass(frozen=True)
class Call:
    """An operator that computes: its name, layer, bytes moved, and the pass it belongs to."""

    name: str
    layer: str
    bytes: int
    owner: str = ""


@dataclass(frozen=True)
class Explanation:
    """Calls before and after, what was found, and the most memory that results take at a time.

    `whole` says why nothing was rewritten, if so.
    """

    before: tuple[Call, ...]
    after: tuple[Call, ...]
    places: tuple[Place, ...]
    peak_before: int
    peak_after: int
    whole: str = ""

    @property
    def layers(self) -> list[str]:
        """Decoder layers in order, and what is around them."""
        return list(dict.fromkeys(c.layer for c in (*self.before, *self.after)))

    def row(self, layer: str) -> dict[str, Any]:
        """Replacements, calls and bytes of one layer, before and after."""
        before = [c for c in self.before if c.layer == layer]
        after = [c for c in self.after if c.layer == layer]
        replaced: dict[str, int] = {}
        for place in self.places:
            if not place.reason and _layer(place.module) == layer:
                replaced[place.name] = replaced.get(place.name, 0) + 1
        return {
            "layer": layer, "replaced": replaced, "calls_before": len(before),
            "calls_after": len(after), "bytes_before": sum(c.bytes for c in before),
            "bytes_after": sum(c.bytes for c in after),
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "rows": [self.row(layer) for layer in self.layers],
            "stays": [asdict(p) for p in self.places if p.reason],
            "peak_before": self.peak_before, "peak_after": self.peak_after, "whole": self.whole,
        }  # fmt: skip


def explain(function: Callable[..., Any], *inputs: Any, **options: Any) -> Explanation:
    """Rewrite what `function(*inputs, **options)` computes, and count; nothing is computed.

    Tensors may be on the meta device. Gradients are on or off as where this is called.

    Raises:
        torch._dynamo.exc.Unsupported: Dynamo cannot follow the function in one graph.
    """
    found: list[Explanation] = []
    torch._dynamo.reset()
    torch.compile(function, backend=functools.partial(_record, found), fullgraph=True)(
        *inputs, **options
    )
    return found[0]


def _record(found: list[Explanation], module: GraphModule, inputs: Sequence[Any]) -> Callable:
    values = shim.example_values(module)
    training = torch.is_grad_enabled() and any(
        isinstance(v, Tensor) and v.requires_grad for v in values
    )
    try:
        captured = shim.capture(module)
    except Exception as error:  # what may fail in tracing has no common class
        found.append(Explanation((), (), (), 0, 0, str(error)))
        return module.forward
    before, peak = list(_calls(captured.graph.nodes)), _peak(captured.graph.nodes)
    names = [n.name for n in captured.graph.nodes if _computes(n)]
    report: Report = rewrite(captured, training=training)
    after = tuple(_calls(captured.graph.nodes))
    owned = tuple(
        Call(c.name, c.layer, c.bytes, report.claimed.get(n, ""))
        for c, n in zip(before, names, strict=True)
    )
    found.append(Explanation(owned, after, tuple(report.places), peak, _peak(captured.graph.nodes)))
    return module.forward


def _layer(module: str) -> str:
    match = LAYER.search(module)
    return match.group(1) if match else OUTSIDE


def _computes(node: Node) -> bool:
    return (
        node.op == "call_function"
        and bool(_tensors(node))
        and not is_view(node)
        and (isinstance(node.target, torch._ops.OpOverload))
    )


def _calls(nodes: Iterable[Node]) -> Iterable[Call]:
    layer = OUTSIDE
    for node in nodes:
        if node.op != "call_function":
            continue
        # a node without a module of its own belongs where its inputs came from
        layer = _layer(where(node)) if where(node) else layer
        if _computes(node):
            moved = sum(_distinct_bytes(t) for t in _unique([node, *node.all_input_nodes]))
            yield Call(name_of(node), layer, moved, node.meta.get("kexaone", ""))


def _tensors(node: Node) -> list[Tensor]:
    found = value(node)
    return [t for t in (found if isinstance(found, list | tuple) else [found])
            if isinstance(t, Tensor)]  # fmt: skip


def _unique(nodes: Iterable[Node]) -> list[Tensor]:
    by_place = {(shim.storage_of(t), t.storage_offset(), tuple(t.shape)): t
                for n in nodes for t in _tensors(n)}  # fmt: skip
    return list(by_place.values())


def _distinct_bytes(tensor: Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 1 if stride == 0 else int(size)
    return count * tensor.element_size()


def _peak(nodes: Iterable[Node]) -> int:
    """The most bytes of results alive at once, when each is freed after its last use."""
    order = [n for n in nodes if n.op != "placeholder"]
    last: dict[int | None, Node] = {}
    for node in order:
        for read in (node, *node.all_input_nodes):
            for tensor in _tensors(read):
                last[shim.storage_of(tensor)] = node
    given = {shim.storage_of(t) for n in nodes if n.op == "placeholder" for t in _tensors(n)}
    alive: dict[int | None, int] = {}
    peak = 0
    for node in order:
        for tensor in _tensors(node):
            memory = shim.storage_of(tensor)
            if memory not in given:
                alive.setdefault(memory, int(tensor.untyped_storage().nbytes()))
        peak = max(peak, sum(alive.values()))
        alive = {m: size for m, size in alive.items() if last[m] is not node}
    return peak


def picture(found: Explanation, file: Path, *, title: str) -> None:
    """Two columns of operators per layer, before and after, as tall as the bytes they move.

    Coloured are the operators that passes replaced, and what they put there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(c.owner for c in (*found.before, *found.after) if c.owner))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))  # pyright: ignore
    layers = found.layers
    figure, axes = plt.subplots(figsize=(max(6.0, 0.6 * len(layers) + 3), 6))
    for at, layer in enumerate(layers):
        for shift, calls in ((-0.2, found.before), (0.2, found.after)):
            bottom = 0.0
            for call in (c for c in calls if c.layer == layer):
                height = call.bytes / 1e6
                axes.bar(at + shift, height, 0.36, bottom, edgecolor="white", linewidth=0.3,
                         color=colours.get(call.owner, "lightgrey"))  # fmt: skip
                bottom += height
    axes.set_xticks(range(len(layers)), [n if n == OUTSIDE else f"layer {n}" for n in layers],
                    rotation=60, ha="right")  # fmt: skip
    axes.set_ylabel("MB moved, operator by operator")
    axes.set_title(f"{title}: left before, right after")
    legend = [Patch(color=c, label=n) for n, c in colours.items()]
    axes.legend(handles=[*legend, Patch(color="lightgrey", label="as it was")], fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
