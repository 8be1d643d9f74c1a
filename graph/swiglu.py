"""silu(gate) * up, to `swiglu`.

    gate and up are two tensors, or the halves of one ([..., :N] and [..., N:]), which is then read
    where it lies

Contract: one per dense layer, one per shared expert. Shapes and dtypes of the two are equal: a
broadcast gate, or a float32 factor on a bfloat16 gate, stays.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from .. import ops
from ..kernels.dispatch import explain
from .ir import Refused, Rewrite, same_shape, value
from .match import Any, Op, Var, first
from .passes import Pass

GATE, UP = Var("gate"), Var("up")
PATTERN = Op("mul", Any(Op("silu", GATE), Op("mul", GATE, Op("sigmoid", GATE))), UP)


def anchor(node: Node) -> bool:
    """A product with silu of something."""
    found = first(PATTERN, node)
    return found is not None and isinstance(found["up"], Node)


def rewrite(graph: Rewrite, node: Node) -> None:
    found = first(PATTERN, node)
    assert found is not None
    gate, up = value(found["gate"]), value(found["up"])
    choice = explain(gate)
    if choice.name != "triton":
        raise Refused(choice.reason)
    if gate.dtype != up.dtype or gate.dim() == 0 or not same_shape(gate.shape, up.shape):
        raise Refused("gate and up differ in shape or dtype")
    both = halves_of(found["gate"], found["up"])
    inputs = [found["gate"], found["up"]] if both is None else [both]

    def replacement(*halves: Tensor) -> Tensor:
        return ops.swiglu(*halves)

    graph.replace([node], inputs, replacement, matched=found.nodes, label="swiglu")


def halves_of(gate: Node, up: Node) -> Node | None:
    """The tensor whose last dimension was cut into these two; None if there is none."""
    whole = Var("x")
    halves = [Op("getitem", Op("chunk", whole, 2, Var("dim")), i) for i in (0, 1)]
    pair = [first(half, node) for half, node in zip(halves, (gate, up), strict=True)]
    if pair[0] is None or pair[1] is None or pair[0].nodes[1] is not pair[1].nodes[1]:
        return None
    source, dim = pair[0]["x"], pair[0]["dim"]
    return source if dim in (-1, value(source).dim() - 1) else None


PASS = Pass("swiglu", anchor, rewrite, "one per dense layer or shared expert")
