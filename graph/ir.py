"""Reading and rewriting a captured graph: names and arguments of nodes, and the one way to replace.

A replacement is traced from a Python function on the values of the nodes it reads, checked against
the nodes it stands for, and put where all its inputs exist and none of its results is needed yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from . import shim

MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode")


class Refused(Exception):
    """A pattern is there but must not be replaced; the message says why."""


def name_of(node: Any) -> str:
    """`add` for aten.add.Tensor and aten.add.Scalar, `kexaone.swiglu` for an op of ours."""
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target)) if isinstance(node, Node) else ""
    return operator_name(target)


def operator_name(op: torch._ops.OpOverload) -> str:
    """`add` for aten.add.Tensor, `kexaone.swiglu` for an op of ours."""
    space, _, name = op.overloadpacket._qualified_op_name.partition("::")
    return name if space == "aten" else f"{space}.{name}"


def arguments(node: Node) -> dict[str, Any]:
    """All arguments by their schema's names, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)}
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def value(node: Any) -> Any:
    """The fake tensor (or number) that a node stands for."""
    return node.meta.get("val") if isinstance(node, Node) else node


def is_view(node: Node) -> bool:
    """Whether a node's result lies in the memory of its first argument."""
    first = node.args[0] if node.args else None
    if not isinstance(first, Node) or not isinstance(value(node), Tensor):
        return False
    return shim.storage_of(value(node)) == shim.storage_of(value(first))


def written(node: Node) -> list[Node]:
    """The arguments that a node writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    by_name = arguments(node)
    marked = [by_name[a.name] for a in node.target._schema.arguments
              if a.alias_info is not None and a.alias_info.is_write]  # fmt: skip
    flat = [n for a in marked for n in (a if isinstance(a, list | tuple) else [a])]
    return [n for n in flat if isinstance(n, Node)]


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for all sizes the graph is compiled for."""
    return len(a) == len(b) and all(shim.known(x == y) for x, y in zip(a, b, strict=True))


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether elements of two tensors of one shape lie alike in memory."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(shim.known(n == 1) or shim.known(x == y) for n, x, y in strides)


def where(node: Node) -> str:
    """The module that a node came from, such as `model.layers.3.self_attn`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    deepest = paths[-1] if paths else ""
    for noise in ("L['self']", "L['fn']", "._modules", "L['", "']", "['"):
        deepest = deepest.replace(noise, "." if noise == "['" else "")
    return deepest.strip(".")


@dataclass
class Rewrite:
    """A graph being rewritten, and what is known about it.

    `training`: gradients will be asked for.
    """

    module: GraphModule
    training: bool
    writes: list[tuple[int | None, Node]] = field(default_factory=list)
    modes: list[Node] = field(default_factory=list)
    claimed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            self.writes += [(shim.storage_of(value(n)), node) for n in written(node)]
            if node.op == "call_function" and name_of(node) in MODES:
                self.modes.append(node)

    @property
    def graph(self) -> Graph:
        return self.module.graph

    def replace(
        self, outputs: Sequence[Node], inputs: Sequence[Node], function: Callable[..., Any],
        *, matched: Sequence[Node] = (), label: str,
    ) -> None:  # fmt: skip
        """Put `function(*inputs)`, a tensor or a tuple of them, in the place of `outputs`.

        Args:
            matched: every node that takes part in the pattern.
            label: noted on the new nodes.

        Raises:
            Refused: memory involved is written to, gradient or autocast mode changes inside the
                pattern, no place fits, or results would differ in shape, dtype or device.
        """
        matched = [*matched, *outputs]
        place = self._place(outputs, inputs, matched)
        self._check_memory([*inputs, *matched], matched)
        traced = shim.trace(_laid_out(function, outputs), [self._leaf(value(n)) for n in inputs])
        results = _results(traced)
        for result, node in zip(results, outputs, strict=True):
            _check_result(result, node)
        new = _inline(self.graph, traced, inputs, place, label)
        self.claimed.update((node.name, label) for node in matched)
        for old, made in zip(outputs, new, strict=True):
            old.replace_all_uses_with(made, delete_user_cb=lambda user: user not in matched)

    def _leaf(self, x: Any) -> Any:
        """A fake tensor as a replacement shall see it: ops may save more if gradients follow."""
        if not isinstance(x, Tensor):
            return x
        return x.detach().requires_grad_(self.training and x.is_floating_point())

    def _place(
        self, outputs: Sequence[Node], inputs: Sequence[Node], matched: Sequence[Node]
    ) -> Node:
        """The node to insert before: the first use of an output from outside the pattern."""
        users = [u for node in outputs for u in node.users if u not in matched]
        if not users:
            raise Refused("its result is not used")
        place = min(users)
        if any(not n < place for n in inputs):
            raise Refused("an input is computed after a result is used")
        first = min(matched)
        if any(first < mode < place for mode in self.modes):
            raise Refused("gradient or autocast mode changes inside it")
        return place

    def _check_memory(self, nodes: Sequence[Node], matched: Sequence[Node]) -> None:
        touched = {shim.storage_of(value(n)) for n in nodes if isinstance(value(n), Tensor)}
        first = min(matched)
        if any(storage in touched and first < writer for storage, writer in self.writes):
            raise Refused("memory it reads or makes is written to in place")

    def sweep(self) -> None:
        """Drop what nothing uses; of what a pattern took, also ops that may draw random numbers.

        PyTorch takes attention for one of them, whatever its dropout.
        """
        self.graph.eliminate_dead_code(lambda n: n.is_impure() and n.name not in self.claimed)

    def finish(self) -> None:
        """Merge equal nodes, drop what nothing uses, and check the graph."""
        merge_equal(self.graph)
        self.sweep()
        self.graph.lint()
        self.module.recompile()


def _results(traced: GraphModule) -> list[Node]:
    (found,) = next(n for n in traced.graph.nodes if n.op == "output").args
    return list(found) if isinstance(found, list | tuple) else [found]


def _escapes(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _laid_out(function: Callable[..., Any], outputs: Sequence[Node]) -> Callable[..., Any]:
    """The function, with results of the graph in one piece where those before were."""
    wanted = [_escapes(node) and value(node).is_contiguous() for node in outputs]

    def laid_out(*inputs: Any) -> Any:
        results = function(*inputs)
        listed = results if isinstance(results, tuple) else (results,)
        return tuple(r.contiguous() if w else r for r, w in zip(listed, wanted, strict=True))

    return laid_out


def _check_result(new: Node, old: Node) -> None:
    mine, theirs = value(new), value(old)
    if mine.dtype != theirs.dtype or mine.device != theirs.device:
        raise Refused(f"it computes {theirs.dtype} on {theirs.device}, ours {mine.dtype}")
    if not same_shape(mine.shape, theirs.shape):
        raise Refused(f"shapes differ: {tuple(theirs.shape)}, ours {tuple(mine.shape)}")
    if _escapes(old) and not same_strides(mine, theirs):
        raise Refused("strides of a result of the graph would change")


def _inline(
    graph: Graph, traced: GraphModule, inputs: Sequence[Node], place: Node, label: str
) -> list[Node]:  # fmt: skip
    remaining = iter(inputs)
    known: dict[Node, Node] = {}
    origin = place.meta
    with graph.inserting_before(place):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(remaining)
            elif node.op == "call_function":
                known[node] = graph.node_copy(node, known.__getitem__)
                known[node].meta["kexaone"] = label
                for key in ("nn_module_stack", "stack_trace"):
                    if key in origin:
                        known[node].meta[key] = origin[key]
            elif node.op != "output":
                raise Refused(f"its replacement needs a {node.op}")
    return [known[n] for n in _results(traced)]


def merge_equal(graph: Graph) -> None:
    """One node for equal calls: tables that every layer cuts are cut once."""
    written_to = {shim.storage_of(value(n)) for node in graph.nodes for n in written(node)}
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            if name_of(node) in MODES:
                seen.clear()
            continue
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        touched = {shim.storage_of(value(n)) for n in (node, *node.all_input_nodes)} - {None}
        if random or _escapes(node) or node.target._schema.is_mutable or touched & written_to:
            continue
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
