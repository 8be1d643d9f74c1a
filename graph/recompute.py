"""What a training step keeps between forward and backward, and what it computes again.

Kept is what took long: products, attention with its statistics, what experts keep, the router's
choice. Norms, sums, rotations, activations, casts and views may be computed again. Among all such
choices AOTAutograd's partitioner takes the one that keeps the fewest bytes, a minimal cut.

Contract: same numbers, as every kernel returns the same bits twice. What draws random numbers is
kept.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import shim
from .ir import operator_name

KEPT = frozenset({
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "einsum", "convolution",
    "scaled_dot_product_attention", "transformers.grouped_mm_fallback", "sort", "topk", "cumsum",
    "kexaone.attention", "kexaone.group_by_expert", "kexaone.grouped_gemm",
    "kexaone.linear_cross_entropy", "kexaone.linear_fp8_training", "kexaone.moe_experts",
    "kexaone.moe_experts_fp8_training", "kexaone.route",
})  # fmt: skip
"""Operators that are never computed twice."""


def mark(module: GraphModule) -> None:
    """Mark what is never computed twice in a captured graph, for `shim.fewest_bytes`."""
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if expensive(node.target):
            shim.keep(node)


def expensive(op: torch._ops.OpOverload) -> bool:
    """Whether an operator is never computed twice: it took long, or draws random numbers."""
    return operator_name(op) in KEPT or torch.Tag.nondeterministic_seeded in op.tags


class Live(TorchDispatchMode):
    """Bytes of what operators return in this scope, as long as it lives; `peak` is the most.

    Exact for what runs operator by operator: memory that a kernel takes and gives back inside one
    is not seen, nor what Inductor's own kernels allocate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # sees the operators of a compiled graph when it runs
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        before = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = {t.untyped_storage()._cdata for t in before}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), given)
        return result

    def _see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in given:
            return

        def forget(_: weakref.ref) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)
