"""Training in float8 by rule: linear layers and experts of decoder blocks.

    linear(x, W, b)             to linear_fp8_training(x, W) + b
    moe_experts(x, ...)         to moe_experts_fp8_training(x, ...)

Router, embeddings, output head, norms and multi-token prediction stay as they are: they are few
operations that small errors harm most (DeepSeek-V3, arXiv 2412.19437, section 3.3.1). Contract:
every product of a block but the router's, forward and both gradients. This pass changes numbers, so
it is not part of the suite: `optimize(model, fp8=True)` adds it, and `errors` says what it costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from .. import ops
from ..kernels.dispatch import explain
from .ir import Refused, Rewrite, arguments, name_of, value, where
from .linear_fp8 import linear_fp8_training
from .passes import Pass

KEPT = frozenset({"gate", "router", "shared_expert_gate", "lm_head", "embed_tokens", "mtp"})
EXPERTS = "kexaone.moe_experts"


def in_fp8(path: str) -> bool:
    """Whether the layer at a path such as `model.layers.3.mlp.up_proj` computes in float8."""
    names = re.findall(r"\w+", path)
    return any(name.isdigit() for name in names) and not KEPT.intersection(names)


def anchor(node: Node) -> bool:
    """A linear layer, or the output of experts that another pass put in."""
    if name_of(node) == "linear":
        return in_fp8(where(node))
    return name_of(node) == "getitem" and node.args[1:] == (0,) and name_of(node.args[0]) == EXPERTS


@dataclass(frozen=True)
class Replacement:
    """`function(*inputs)` computes an anchor in float8, and `exact(*inputs)` as before.

    Inputs are the rows, then `weights` matrices to cast, then what is not cast; `matched` are the
    nodes that then go.
    """

    inputs: list[Node]
    weights: int
    function: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    matched: list[Node]


def rewrite(graph: Rewrite, node: Node) -> None:
    found = replacement(node)
    graph.replace([node], found.inputs, found.function, matched=found.matched, label="fp8")


def replacement(node: Node) -> Replacement:
    """What takes an anchor's place.

    Raises:
        Refused: no kernels for it, or a weight that is computed, which a cast may not follow.
    """
    found = _linear(node) if name_of(node) == "linear" else _experts(node)
    x, *weights = found.inputs[: 1 + found.weights]
    choice = explain(value(x))
    if choice.name != "triton":
        raise Refused(choice.reason)
    if any(w.op not in ("placeholder", "get_attr") for w in weights):
        raise Refused("its weight is computed")
    if any(value(w).dtype != value(x).dtype for w in weights):
        raise Refused("rows and weight differ in dtype")
    return found


def _linear(node: Node) -> Replacement:
    given = arguments(node)
    inputs = [given[name] for name in ("input", "weight", "bias") if given[name] is not None]
    if value(inputs[1]).dim() != 2:
        raise Refused("its weight is no matrix")

    def function(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return sum(bias, start=linear_fp8_training(x, weight))

    return Replacement(inputs, 1, function, F.linear, [node])


def _experts(node: Node) -> Replacement:
    call = node.args[0]
    assert isinstance(call, Node)
    given = arguments(call)
    inputs = [given[name] for name in ("x", "gate_up", "down", "weights", "offsets", "order")]
    limit = given["limit"]

    def function(*tensors: Tensor) -> Tensor:
        return ops.moe_experts_fp8_training(*tensors, limit=limit)

    def exact(*tensors: Tensor) -> Tensor:
        return ops.moe_experts(*tensors, limit=limit)

    return Replacement(inputs, 2, function, exact, [call, node])


PASS = Pass("fp8", anchor, rewrite, "every product of a block but the router's")


@dataclass(frozen=True)
class LayerError:
    """What float8 costs one layer: norm of the difference of its output, relative to the output.

    `input_gradient` and `weight_gradient` are the same for its gradients (the first weight's, for
    experts), given a random gradient of its output.
    """

    module: str
    output: float
    input_gradient: float
    weight_gradient: float


class Compare(Interpreter):
    """Runs a graph as it is, and every anchor on the same inputs in float8 too."""

    def __init__(self, module: GraphModule) -> None:
        # experts are compared where their result is taken, after their inputs were used last
        super().__init__(module, garbage_collect_values=False)
        self.found: list[tuple[str, Tensor]] = []

    def run_node(self, n: Node) -> Any:
        exact = super().run_node(n)
        if n.op == "call_function" and anchor(n):
            try:
                layer = replacement(n)
            except Refused:
                return exact
            inputs = [self.env[x].detach() for x in layer.inputs]
            self.found.append((where(n), _compare(layer, inputs)))
        return exact

    def errors(self) -> tuple[LayerError, ...]:
        """What was found so far; waits for the device."""
        return tuple(LayerError(module, *row.tolist()) for module, row in self.found)


@torch.enable_grad()
def _compare(layer: Replacement, inputs: list[Tensor]) -> Tensor:
    """Relative differences of output, first and second gradient, float64 [3]."""
    sides, seed = [], None
    for function in (layer.exact, layer.function):
        leaves = [x.clone().requires_grad_(i < 2) for i, x in enumerate(inputs)]
        out = function(*leaves)
        seed = torch.randn_like(out) if seed is None else seed
        sides.append([out.detach(), *torch.autograd.grad(out, leaves[:2], seed)])
    pairs = [(a.double(), b.double()) for a, b in zip(*sides, strict=True)]
    tiny = torch.finfo(torch.float64).tiny
    return torch.stack([(a - b).norm() / a.norm().clamp(min=tiny) for a, b in pairs])
