"""A residual sum and the RMSNorm of it, to `add_rms_norm`: the sum is read once.

    rms_norm(a + b, weight)        where a and b have one shape and dtype

Runs after `rms_norm`. Contract: two per decoder layer, less one for the first norm of the model,
whose input is no sum. The sum stays available: the residual stream goes on from it.
"""

from __future__ import annotations

import operator

from torch import Tensor
from torch.fx import Node

from .. import ops
from .ir import Refused, Rewrite, name_of, same_shape, value
from .match import Op, Var, first
from .passes import Pass

SUM = Op("add", Var("a"), Var("b"))


def anchor(node: Node) -> bool:
    """The first result of a norm of ours whose rows are a sum of tensors."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    norm = node.args[0]
    if not isinstance(norm, Node) or name_of(norm) != "kexaone.rms_norm":
        return False
    found = first(SUM, norm.args[0])
    return found is not None and all(isinstance(found[k], Node) for k in "ab")


def rewrite(graph: Rewrite, node: Node) -> None:
    norm = node.args[0]
    assert isinstance(norm, Node)
    total, weight, eps = norm.args
    assert isinstance(total, Node) and isinstance(weight, Node)
    found = first(SUM, total)
    assert found is not None
    a, b = value(found["a"]), value(found["b"])
    if a.dtype != b.dtype or not same_shape(a.shape, b.shape):
        raise Refused("the summands differ in shape or dtype")

    def replacement(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        result = ops.add_rms_norm(a, b, weight, eps=eps)  # pyright: ignore[reportArgumentType]
        return result.normed, result.total

    graph.replace([node, total], [found["a"], found["b"], weight], replacement, matched=[norm],
                  label="add_rms_norm")  # fmt: skip


PASS = Pass("add_rms_norm", anchor, rewrite, "two per layer, less one at the beginning")
