"""Scaled-dot-product attention under a causal or windowed mask, to `attention`: no mask is made.

    scaled_dot_product_attention(q [B, A, T, D], k, v [B, A or G, S, D], mask or is_causal, scale)

The mask is proven to be one (`mask.py`) and goes away with all that computes it; keys and values
that were repeated for grouped heads are read where they are. Contract: one per decoder layer.
Dropout, a mask that depends on data (padding), a bias, and heads whose values are narrower than
their keys stay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from .. import ops
from ..kernels.dispatch import explain
from . import shim
from .ir import Refused, Rewrite, arguments, name_of, same_shape, value
from .mask import Seen, is_tensor, read
from .match import Op, Var, first
from .passes import Pass

MAX_HEAD_DIM = 256
REPEATED = Op("reshape", Op("expand", Op("unsqueeze", Var("x"), 2), Var("sizes")), Var("shape"))


def anchor(node: Node) -> bool:
    return name_of(node) == "scaled_dot_product_attention"


def rewrite(graph: Rewrite, node: Node) -> None:
    given = arguments(node)
    q, k, v = (given[name] for name in ("query", "key", "value"))
    bare_k, bare_v = unrepeated(k, q), unrepeated(v, q)
    if value(bare_k).shape[1] == value(bare_v).shape[1]:
        k, v = bare_k, bare_v
    _check(q, k, v, given)
    seen, scale = _seen(given, q, k), given["scale"]
    length, keys = value(q).shape[2], value(k).shape[2]
    if not shim.known(seen.offset == keys - length) or not shim.known(keys >= length):
        raise Refused("the last query does not see the last key")
    alone = bool(shim.known(keys == length))

    def replacement(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, dim = q.shape
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        out = ops.attention(
            *(packed(x) for x in (q, k, v)), cu_seqlens=starts * length,
            cu_seqlens_k=None if alone else starts * k.shape[2], window=seen.window, scale=scale,
        ).out  # fmt: skip
        return out.view(batch, length, heads, dim).transpose(1, 2)

    graph.replace([node], [q, k, v], replacement, label="attention")


def packed(x: Tensor) -> Tensor:
    """[B, A, T, D] as [B T, A, D]."""
    batch, heads, length, dim = x.shape
    return x.transpose(1, 2).reshape(batch * length, heads, dim)


def unrepeated(x: Node, q: Node) -> Node:
    """The keys or values that were repeated once per query head of their group."""
    found = first(REPEATED, x)
    if found is None:
        return x
    batch, heads, length, dim = value(found["x"]).shape
    groups = value(q).shape[1] // heads
    expanded = value(x.args[0]).shape if isinstance(x.args[0], Node) else ()
    wanted = (batch, heads, groups, length, dim)
    return found["x"] if same_shape(expanded, wanted) else x


def _check(q: Node, k: Node, v: Node, given: dict) -> None:
    if given["dropout_p"] != 0:
        raise Refused("it drops out")
    tensors = [value(n) for n in (q, k, v)]
    if any(t.dim() != 4 for t in tensors) or len({t.dtype for t in tensors}) != 1:
        raise Refused("queries, keys and values are not [B, A, T, D] of one dtype")
    choice = explain(tensors[0])
    if choice.name != "triton":
        raise Refused(choice.reason)
    if not same_shape(tensors[1].shape, tensors[2].shape) or not same_shape(
        tensors[0].shape[3:], tensors[1].shape[3:]
    ):
        raise Refused("heads of values have another width than heads of queries and keys")
    if not shim.known(tensors[0].shape[0] == tensors[1].shape[0]):
        raise Refused("keys are shared between sequences")
    heads, groups, dim = tensors[0].shape[1], tensors[1].shape[1], tensors[0].shape[3]
    if not shim.known(heads % groups == 0) or not shim.known(dim <= MAX_HEAD_DIM):
        raise Refused(f"{heads} heads of {dim} over {groups} do not fit the kernel")
    scale = given["scale"]
    if scale is not None and not (isinstance(scale, float) and scale > 0):
        raise Refused("the scale is not a positive number")


def _seen(given: dict, q: Node, k: Node) -> Seen:
    if is_tensor(given["attn_mask"]):
        return read(given["attn_mask"])
    if given["is_causal"]:
        return Seen(0, 0)
    if shim.known(value(q).shape[2] == 1):
        return Seen(value(k).shape[2] - 1, 0)
    raise Refused("every query sees every key")


PASS = Pass("attention", anchor, rewrite, "one per layer")
