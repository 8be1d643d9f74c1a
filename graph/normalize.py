"""One way to say a thing: what runs before the patterns, so that each needs one form.

Casts that change nothing, slices of everything, multiplications by one and repeated calls
disappear. `view` becomes `reshape`: a replacement may have other strides than what it replaces.
Writing into a fresh tensor that nothing else looks at becomes an operator with a new result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from . import shim
from .ir import arguments, merge_equal, name_of, same_shape, same_strides, value, written

WHOLE = 2**62


def normalize(module: GraphModule) -> None:
    """Bring a captured graph into normal form, in place."""
    graph = module.graph
    _specialize_floats(graph)
    _functionalize(graph)
    owners = {shim.storage_of(value(n)) for node in graph.nodes for n in written(node)}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if name_of(node) in ("view", "_unsafe_view") and isinstance(node.args[1], list | tuple):
            node.target = torch.ops.aten.reshape.default
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and _nothing(node):
            shared = (
                shim.storage_of(value(node)) in owners or shim.storage_of(value(source)) in owners
            )
            if not shared and not any(user.op == "output" for user in node.users):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
    merge_equal(graph)
    graph.eliminate_dead_code()


def _specialize_floats(graph: Graph) -> None:
    """Floats of the model, symbolic with `dynamic=True`, to numbers that the compilation guards."""
    for node in list(graph.nodes):
        if isinstance(value(node), torch.SymFloat):
            node.replace_all_uses_with(float(value(node)))  # pyright: ignore[reportArgumentType]
    graph.eliminate_dead_code()


def _nothing(node: Node) -> bool:
    """Whether a call returns its first argument unchanged."""
    given, x, y = arguments(node), value(node.args[0]), value(node)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    if x.dtype != y.dtype or x.device != y.device or not same_shape(x.shape, y.shape):
        return False
    name = name_of(node)
    if name == "to":
        return not given.get("copy") and given.get("memory_format") in (None, torch.preserve_format)
    if name == "slice":
        whole = given["end"] is None or (isinstance(given["end"], int) and given["end"] >= WHOLE)
        return (
            given["start"] in (None, 0)
            and given["step"] == 1
            and (whole or same_shape(x.shape, y.shape))
        )
    if name in ("mul", "div"):
        return isinstance(given["other"], int | float) and given["other"] == 1
    if name in ("add", "sub"):
        return isinstance(given["other"], int | float) and given["other"] == 0
    if name in ("contiguous", "alias", "dropout"):
        return name != "dropout" and same_strides(x, y)
    return name in ("expand", "reshape") and same_strides(x, y)


def _functionalize(graph: Graph) -> None:
    """`t.add_(x)` to `t = t.add(x)` where t was made here and has no other name yet."""
    sharing: dict[int | None, list[Node]] = {}
    for node in graph.nodes:
        sharing.setdefault(shim.storage_of(value(node)), []).append(node)
    for node in list(graph.nodes):
        targets, plain = written(node), _out_of_place(node)
        if len(targets) != 1 or plain is None:
            continue
        target = targets[0]
        names = [n for n in sharing[shim.storage_of(value(target))] if n < node and n is not target]
        if target.op != "call_function" or names:
            continue
        with graph.inserting_before(node):
            result = graph.call_function(plain, node.args, node.kwargs)
        # memory of its own
        result.meta = {**node.meta, "val": value(node).clone()}
        node.replace_all_uses_with(result)
        for user in [u for u in target.users if node < u]:
            user.replace_input_with(target, result)
        graph.erase_node(node)


def _out_of_place(node: Node) -> torch._ops.OpOverload | None:
    """The operator that does the same without writing to its argument."""
    if not isinstance(node.target, torch._ops.OpOverload) or not name_of(node).endswith("_"):
        return None
    packet = getattr(torch.ops.aten, name_of(node).rstrip("_"), None)
    overload = getattr(packet, node.target._overloadname, None)
    return overload if isinstance(overload, torch._ops.OpOverload) else None
