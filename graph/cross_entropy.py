"""Cross-entropy of a linear layer's output, to `linear_cross_entropy`, which keeps no logits.

    cross_entropy(reshape(cast(linear(h, weight)), [-1, V]), targets)

The logits may be cut along the tokens before (a shift). The mean of no targets stays NaN. Contract:
one per training step. Logits that are used elsewhere, above all returned, stay, and so do a bias,
class weights, label smoothing and anything done to the logits, such as Gemma's soft cap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .. import ops
from ..kernels import cross_entropy as _kernel  # noqa: F401  (registers the op)
from ..kernels.dispatch import explain
from .ir import Refused, Rewrite, arguments, name_of, value
from .passes import Pass

NONE, MEAN, SUM = 0, 1, 2
"""PyTorch's numbers of the ways to reduce."""


@dataclass(frozen=True)
class Logits:
    """A linear layer, the cuts (dim, start, end) made to its output, and the nodes in between."""

    hidden: Node
    weight: Node
    cuts: tuple[tuple[int, Any, Any], ...]
    nodes: tuple[Node, ...]


def anchor(node: Node) -> bool:
    return name_of(node) == "cross_entropy_loss"


def rewrite(graph: Rewrite, node: Node) -> None:
    given = arguments(node)
    if given["weight"] is not None or given["label_smoothing"] != 0:
        raise Refused("it has class weights or label smoothing")
    logits, targets = _linear_of(given["self"]), given["target"]
    inside = {node, *logits.nodes}
    if any(user not in inside for n in logits.nodes for user in n.users):
        raise Refused("the logits are used elsewhere, or returned")
    hidden, weight, aim = value(logits.hidden), value(logits.weight), value(targets)
    choice = explain(hidden)
    if choice.name != "triton":
        raise Refused(choice.reason)
    if hidden.dtype != weight.dtype or aim.dim() != 1 or aim.dtype != torch.int64:
        raise Refused("tokens, weight and targets do not fit the kernel")
    reduction, ignored, dtype = given["reduction"], given["ignore_index"], value(node).dtype

    def replacement(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        for dim, start, end in logits.cuts:
            hidden = torch.ops.aten.slice.Tensor(hidden, dim, start, end)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if reduction == NONE:
            return ops.linear_cross_entropy_tokens(
                hidden, weight, targets, ignore_index=ignored
            ).to(dtype)
        live = _live(targets, ignored)
        scales = live.float() if reduction == SUM else live.float() / live.sum()
        if hidden.requires_grad or weight.requires_grad:
            total = torch.ops.kexaone.linear_cross_entropy(
                hidden, weight, targets, scales, ignored, 0.0
            )[0]
        else:
            tokens = ops.linear_cross_entropy_tokens(hidden, weight, targets, ignore_index=ignored)
            total = (tokens * scales).sum()
        return total.to(dtype)

    graph.replace([node], [logits.hidden, logits.weight, targets], replacement,
                  matched=logits.nodes, label="cross_entropy")  # fmt: skip


def _live(targets: Tensor, ignored: int) -> Tensor:
    return targets != ignored


def _linear_of(node: Any) -> Logits:
    """The layer that made logits [N, V], through casts, reshapes and cuts along tokens."""
    cuts: list[tuple[int, Any, Any]] = []
    nodes: list[Node] = []
    while isinstance(node, Node) and name_of(node) != "linear":
        nodes.append(node)
        given, name = arguments(node), name_of(node)
        if name == "slice" and _along_tokens(node) and not isinstance(given["end"], Node):
            cuts.insert(0, (given["dim"], given["start"], given["end"]))
        elif name == "reshape" and cuts:
            raise Refused("the logits are reshaped before they are cut")
        elif name not in ("to", "_to_copy", "reshape", "contiguous") or not _same_columns(node):
            raise Refused(f"the logits pass through {name or node.name}")
        node = node.args[0]
    if not isinstance(node, Node):
        raise Refused("the logits are not those of a linear layer")
    hidden, weight, bias = arguments(node).values()
    if bias is not None:
        raise Refused("the layer has a bias")
    return Logits(hidden, weight, tuple(cuts), (*nodes, node))


def _along_tokens(node: Node) -> bool:
    dim, step = arguments(node)["dim"], arguments(node)["step"]
    return step == 1 and dim not in (-1, value(node).dim() - 1)


def _same_columns(node: Node) -> bool:
    before, after = value(node.args[0]), value(node)
    return before.shape[-1] == after.shape[-1]


PASS = Pass("cross_entropy", anchor, rewrite, "one per training step whose logits are not returned")
