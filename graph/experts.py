"""Routed experts as transformers computes them, to `moe_experts`.

    grouped    slots sorted by expert, two grouped products, weights, unsorted, summed over k
    batched    each slot's weights gathered, two batched products, weights, summed over k

with y = down(silu(gate) * up), gate and up the halves of one product. Ours computes every slot
once, reads rows and weights where they lie, and needs no copy of either.

Contract: one per sparse layer, before `swiglu` (whose pattern is inside). Biases, transposed or
interleaved weights, other activations and expert-parallel sentinels stay. Looping over experts is
decided by data, so Dynamo never shows it: `hooks.py` replaces it a level above.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from .. import ops
from ..kernels.dispatch import explain
from . import shim
from .ir import Refused, Rewrite, name_of, value
from .match import Any, Cast, Op, Var, first, number
from .passes import Pass

FLAT = Var("flat", lambda shape: shape == [-1])
IDS = Op("reshape", Var("ids"), FLAT)
SLOTS = Op("reshape", Var("weights"), FLAT)
SHAPE = Var("shape")

_sorted = Op("sort", IDS)
_perm = Op("getitem", _sorted, 1)
_counts = Op("histc", Cast(Op("getitem", _sorted, 0)), Var("experts", number), 0, Var("last"))
_ends = Op("cumsum", _counts, 0, dtype=torch.int32)


def _activated(product: object) -> Op:
    halves = Op("chunk", product, 2, -1)
    return Op("mul", Op("silu", Op("getitem", halves, 0)), Op("getitem", halves, 1))


def _grouped(rows: object, weight: str) -> Op:
    stacked = Op("transpose", Var(weight), -2, -1)
    return Op("_grouped_mm|transformers.grouped_mm_fallback", Cast(rows), stacked, _ends)


_rows = Op("index", Var("x"), [Op("floor_divide", _perm, Var("top_k", number))])
_grouped_out = _grouped(_activated(_grouped(_rows, "gate_up")), "down")
_weighted = Op("mul", _grouped_out, Op("unsqueeze", Op("index", SLOTS, [_perm]), -1))
_inverse = Op("index_put", Op("empty_like", _perm), [_perm], Op("arange", Var("slots")))
GROUPED = Cast(Op("sum", Op("reshape", Op("index", _weighted, [_inverse]), SHAPE), [1]))


def _batched(rows: object, weight: str) -> Op:
    product = Op("bmm", Op("index", Var(weight), [IDS]), Op("unsqueeze", rows, -1))
    return Op("squeeze", product, -1)


_repeated = Op("repeat_interleave", Var("x"), Var("top_k", number), 0)
_batched_out = _batched(_activated(_batched(_repeated, "gate_up")), "down")
_scaled = Op("mul", _batched_out, Op("unsqueeze", SLOTS, -1))
BATCHED = Cast(Op("sum", Op("reshape", _scaled, SHAPE), [1]))
PATTERN = Any(GROUPED, BATCHED)


def anchor(node: Node) -> bool:
    """The weighted sum in the dtype of the tokens."""
    if name_of(node) not in ("to", "_to_copy", "sum"):
        return False
    found = first(PATTERN, node)
    return found is not None and value(found["x"]).dtype == value(node).dtype


def rewrite(graph: Rewrite, node: Node) -> None:
    found = first(PATTERN, node)
    assert found is not None
    names = ("x", "gate_up", "down", "weights", "ids")
    inputs = [found[name] for name in names]
    x, gate_up, down, _, ids = (value(n) for n in inputs)
    choice = explain(x)
    if choice.name != "triton":
        raise Refused(choice.reason)
    if not x.dtype == gate_up.dtype == down.dtype:
        raise Refused("tokens and weights differ in dtype")
    experts, last = found.bound.get("experts"), found.bound.get("last")
    if experts is not None and (experts != gate_up.shape[0] or last != experts - 1):
        raise Refused("some experts are left out")
    slots = found.bound.get("slots", ids.numel())
    if (
        ids.dim() != 2
        or found["top_k"] != ids.shape[1]
        or not shim.known(value(slots) == ids.numel())
    ):
        raise Refused("slots are not tokens times experts per token")

    graph.replace([node], inputs, routed_experts, matched=found.nodes, label="experts")


def routed_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
) -> Tensor:
    """[T, H]: the weighted sum over experts `ids` [T, K] of tokens x [T, H]."""
    groups = ops.group_by_expert(ids, experts=gate_up.shape[0])
    return ops.moe_experts(x, gate_up, down, weights.float(), groups.offsets, groups.order)


PASS = Pass("experts", anchor, rewrite, "one per sparse layer")
