"""DeepSeek-V3's router with one group, as transformers writes it, to `route`.

    s = sigmoid(x32 weight32^T); ids = topk(s + bias, K); weights = s[ids], divided by their sum
    + 1e-20, times a factor                            (either of the last two may be missing)

The choice of groups, which transformers computes always, chooses them all and goes away. Contract:
one per sparse layer of ExaoneMoe, DeepSeek-V3 and GLM-4-MoE with one group. `topk(sorted=False)`
leaves the order of a token's experts open; ours is by score. Softmax routers stay, and so do
routers that choose groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from .. import ops
from ..kernels.dispatch import explain
from ..kernels.route import MAX_TOP_K
from .ir import Refused, Rewrite, name_of, value
from .match import Any, Cast, Op, Var, first, number
from .passes import Pass

X, WEIGHT, BIAS = Var("x"), Var("weight"), Var("bias")
TINY = 1e-20

_scores = Op("sigmoid", Op("linear", Cast(X, torch.float32), Cast(WEIGHT, torch.float32)))
_biased = Op("add", _scores, BIAS)
_by_group = Op("reshape", _biased, [-1, Var("groups", number), Var("size", number)])
_of_groups = Op("sum", Op("getitem", Op("topk", _by_group, Var("two")), 0), [-1])
_best = Op("getitem", Op("topk", _of_groups, Var("kept", number), -1, True, Var("order")), 1)
_marked = Op("scatter", Op("zeros_like", _of_groups), 1, _best, 1)
_spread = Op("reshape", Op("expand", Op("unsqueeze", _marked, -1), Var("a")), Var("b"))
_open = Op("masked_fill", _biased, Op("bitwise_not", Cast(_spread, torch.bool)), Var("fill"))
_chosen = Op("topk", Any(_open, _biased), Var("top_k", number), -1, True, Var("sorted"))
_ids = Op("getitem", _chosen, 1)
_taken = Op("gather", _scores, 1, _ids)
_shares = Op("div", _taken, Op("add", Op("sum", _taken, [-1], True), TINY))
WEIGHTS = Any(
    Op("mul", _shares, Var("scaling", number)), _shares,
    Op("mul", _taken, Var("scaling", number)), _taken,
)  # fmt: skip


def anchor(node: Node) -> bool:
    """The finished weights."""
    if name_of(node) not in ("mul", "div", "gather") or first(WEIGHTS, node) is None:
        return False
    return not any(first(WEIGHTS, user) for user in node.users)


def rewrite(graph: Rewrite, node: Node) -> None:
    found = first(WEIGHTS, node)
    assert found is not None
    ids = next(n for n in found.nodes if n.target == torch.ops.aten.gather.default).args[2]
    assert isinstance(ids, Node)
    x, weight = value(found["x"]), value(found["weight"])
    choice = explain(x)
    if choice.name != "triton":
        raise Refused(choice.reason)
    if found.bound.get("groups", 1) != found.bound.get("kept", 1):
        raise Refused("it chooses groups of experts first")
    if x.dim() != 2 or value(found["bias"]).dim() != 1:
        raise Refused("tokens are not [T, H] or the bias is not [E]")
    if found["top_k"] > min(MAX_TOP_K, weight.shape[0]):
        raise Refused(f"the kernel chooses at most {MAX_TOP_K} experts")
    normalize = any(name_of(n) == "div" for n in found.nodes)

    def replacement(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        routed = ops.route(x, weight, bias.detach(), top_k=found["top_k"], normalize=normalize,
                           scaling=float(found.bound.get("scaling", 1.0)))  # fmt: skip
        return routed.weights_TK, routed.ids_TK

    graph.replace([node, ids], [found["x"], found["weight"], found["bias"]], replacement,
                  matched=found.nodes, label="route")  # fmt: skip


PASS = Pass("route", anchor, rewrite, "one per sparse layer with sigmoid scores in one group")
