"""RMSNorm of query and key heads and their rotation, to `qk_norm_rope`: one launch for both.

    n = rms_norm(x)        x [B, T, A, D], transposed to [B, A, T, D] before or after the norm
    n * cos + cat(-n[D/2:], n[:D/2]) * sin        or n alone, on layers that do not rotate

Runs after `rms_norm`. Queries and keys are two such heads with the same tables, the second not
made from the first. Contract: one per layer of a model with QK-norm. The tables' halves must be
equal by construction (cat of an angle with itself), because the kernel reads one of them. Heads
that are rotated without a norm stay.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from .. import ops
from .ir import Refused, Rewrite, name_of, same_shape, value
from .match import Op, Var, first
from .passes import Pass

X, HALF, END = Var("x"), Var("half"), Var("end")
TURNED = Op("cat", [Op("neg", Op("slice", X, Var("dim"), HALF, END)),
                    Op("slice", X, Var("dim"), 0, HALF)], Var("cat"))  # fmt: skip
COS, SIN = Op("unsqueeze", Var("cos"), 1), Op("unsqueeze", Var("sin"), 1)
ROTATED = Op("add", Op("mul", X, COS), Op("mul", TURNED, SIN))
ELEMENTWISE = ("to", "_to_copy", "mul", "cos", "sin", "contiguous", "alias", "expand")
NEAR = 400
"""Keys are looked for within as many nodes after the queries."""


@dataclass(frozen=True)
class Heads:
    """Normed, maybe rotated heads: the `output` node and what it is made of.

    `transposed`: the norm's input is [B, A, T, D], not [B, T, A, D].
    """

    output: Node
    norm: Node
    transposed: bool
    tables: tuple[Node, ...]
    nodes: tuple[Node, ...]

    @property
    def fields(self) -> tuple[Node, Node, Any]:
        x, weight, eps = self.norm.args
        assert isinstance(x, Node) and isinstance(weight, Node)
        return x, weight, eps


def heads_of(node: Node) -> Heads | None:
    """The heads whose last node this is."""
    found = first(ROTATED, node)
    inner = node if found is None else found["x"]
    transposed = not _swaps(inner)
    normed: Any = inner if transposed else inner.args[0]
    norm = _norm(normed, transposed)
    if norm is None:
        return None
    if found is None:
        if any(name_of(u) in ("mul", "slice", "neg") for u in node.users):
            return None
        return Heads(node, norm, transposed, (), (normed, norm))
    dim = value(inner).shape[-1]
    halves = found["half"] * 2 == dim and (found["end"] is None or found["end"] >= dim)
    if not halves or not {3, -1}.issuperset({found["dim"], found["cat"]}):
        return None
    nodes = (*found.nodes, inner, normed, norm)
    return Heads(node, norm, transposed, (found["cos"], found["sin"]), nodes)


def _swaps(node: Any) -> bool:
    """Whether a node exchanges the dimensions of tokens and heads."""
    return name_of(node) == "transpose" and set(node.args[1:]) in ({1, 2}, {-2, -3})


def _norm(node: Any, transposed: bool) -> Node | None:
    """The op of ours whose normed rows this node is, if they are heads."""
    if not isinstance(node, Node) or node.target is not operator.getitem or node.args[1] != 0:
        return None
    norm = node.args[0]
    if not isinstance(norm, Node) or name_of(norm) != "kexaone.rms_norm" or value(node).dim() != 4:
        return None
    return norm if _swaps(norm.args[0]) == transposed else None


def anchor(node: Node) -> bool:
    return heads_of(node) is not None


def rewrite(graph: Rewrite, node: Node) -> None:
    q = heads_of(node)
    assert q is not None
    k = _partner(q)
    if k is None:
        raise Refused("no second heads with the same tables")
    if any(not _mirrored(table) for table in q.tables):
        raise Refused("nothing proves that both halves of the tables are equal")
    (qx, qw, eps), (kx, kw, _) = q.fields, k.fields
    if value(qx).shape[-1] % 2:
        raise Refused("the head dimension is odd")
    turns = q.transposed, k.transposed

    def replacement(
        q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *tables: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k = (x.transpose(1, 2) if t else x for x, t in zip((q, k), turns, strict=True))
        batch, length, _, dim = q.shape
        cos, sin = (_rows(t, batch, length, dim // 2) for t in tables) if tables else (None, None)
        q, k = (x.reshape(batch * length, x.shape[2], dim) for x in (q, k))
        out = ops.qk_norm_rope(q, k, q_weight, k_weight, cos=cos, sin=sin, eps=eps)
        shape = (batch, length, -1, dim)
        return out.q.view(shape).transpose(1, 2), out.k.view(shape).transpose(1, 2)

    graph.replace([q.output, k.output], [qx, kx, qw, kw, *q.tables], replacement,
                  matched=[*q.nodes, *k.nodes], label="qk_norm_rope")  # fmt: skip


def _rows(table: Tensor, batch: int, length: int, half: int) -> Tensor:
    """A table [B or 1, T, D] as float32 [B T, D/2]."""
    return table[..., :half].expand(batch, length, half).reshape(batch * length, half).float()


def _partner(q: Heads) -> Heads | None:
    """The next heads of the same sequences, tables and head dimension that do not come from q."""
    eps, node, made = q.fields[2], q.output, {q.output}
    for _ in range(NEAR):
        node = node.next
        if node.op == "root":
            return None
        if made.intersection(node.all_input_nodes):
            made.add(node)
            continue
        k = heads_of(node)
        if k is None or k.tables != q.tables or k.fields[2] != eps:
            continue
        a, b = value(q.output), value(k.output)
        if a.dtype == b.dtype and same_shape(
            (a.shape[0], *a.shape[2:]), (b.shape[0], *b.shape[2:])
        ):
            return k
    return None


def _mirrored(table: Any) -> bool:
    """Whether a table is made from cat((angles, angles), -1), element by element."""
    while isinstance(table, Node):
        if name_of(table) == "cat":
            parts, dim = table.args[0], table.args[1] if len(table.args) > 1 else 0
            last = dim in (-1, value(table).dim() - 1)
            return (
                last
                and isinstance(parts, list | tuple)
                and len(parts) == 2
                and parts[0] is parts[1]
            )
        number = name_of(table) != "mul" or not isinstance(table.args[1], Node)
        if name_of(table) not in ELEMENTWISE or not number:
            return False
        table = table.args[0]
    return False


PASS = Pass("qk_norm_rope", anchor, rewrite, "one per layer of a model with QK-norm")
