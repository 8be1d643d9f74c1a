"""RMSNorm, as Llama's descendants write it, to `rms_norm`.

    x32 * rsqrt(mean(x32^2) + eps), cast to the dtype of x, times weight [N]        (any order)
    torch.nn.functional.rms_norm with a weight

Contract: two or three per decoder layer with QK-norm (two without), one at the end. The weight has
the dtype of x: a float32 weight on bfloat16 rows promotes the result, and stays. So does Gemma's
norm, whose weight is 1 + w in float32, unless the rows are float32 too.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from .. import ops
from ..kernels.dispatch import explain
from .ir import Refused, Rewrite, name_of, value
from .match import Any, Cast, Op, Var, first, number
from .passes import Pass

X, W, EPS = Var("x"), Var("weight"), Var("eps", number)
LAST = Var("dims", lambda dims: isinstance(dims, list) and len(dims) == 1)

_wide = Cast(X, torch.float32)
_square = Any(Op("pow", _wide, 2), Op("square", _wide), Op("mul", _wide, _wide))
_mean = Op("add", Op("mean", _square, LAST, True), EPS)
_normed = Any(
    Op("mul", _wide, Op("rsqrt", _mean)),
    Op("mul", _wide, Op("reciprocal", Op("sqrt", _mean))),
    Op("mul", _wide, Op("pow", _mean, -0.5)),
    Op("div", _wide, Op("sqrt", _mean)),
)
WRITTEN = Op("mul", Cast(_normed), W)
SHAPE = Var("dims", lambda dims: isinstance(dims, list))
LIBRARY = Op("rms_norm", X, SHAPE, W, Var("eps"))


def anchor(node: Node) -> bool:
    """The last multiplication, or the library's op."""
    if name_of(node) == "rms_norm":
        return True
    return name_of(node) == "mul" and first(WRITTEN, node) is not None


def rewrite(graph: Rewrite, node: Node) -> None:
    found = first(Any(LIBRARY, WRITTEN), node)
    if found is None or not isinstance(found["weight"], Node):
        raise Refused("it has no weight")
    x, weight = value(found["x"]), value(found["weight"])
    eps = torch.finfo(x.dtype).eps if found["eps"] is None else found["eps"]
    check(x, weight, found["dims"])
    if weight.dtype != x.dtype:
        raise Refused(f"rows are {x.dtype}, the weight is {weight.dtype}")

    def replacement(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, weight, eps=eps)

    graph.replace([node], [found["x"], found["weight"]], replacement, matched=found.nodes,
                  label="rms_norm")  # fmt: skip


def check(x: torch.Tensor, weight: torch.Tensor, dims: list[int]) -> None:
    """Refuses what the kernel does not do."""
    choice = explain(x)
    if choice.name != "triton":
        raise Refused(choice.reason)
    if weight.dim() != 1:
        raise Refused("the weight is not one row")
    if dims[0] not in (-1, x.dim() - 1) and dims != list(weight.shape):
        raise Refused("it is not over the last dimension")


PASS = Pass("rms_norm", anchor, rewrite, "two per layer, four with QK-norm, one at the end")
