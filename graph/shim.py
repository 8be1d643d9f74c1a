"""Every private PyTorch name that the graph layer uses; works on torch 2.13 and 2.14.

Capture: Dynamo's graph is traced once more, before dispatch, into ATen operators. There autograd,
autocast and decompositions have not happened yet, so `linear`, `silu` and
`scaled_dot_product_attention` are single nodes, and an operator that a pass puts in brings its own
gradient when AOTAutograd differentiates the graph later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import torch.compiler.config
import torch.fx.traceback
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils.checkpoint import CheckpointPolicy


def example_values(module: GraphModule) -> list[Any]:
    """What Dynamo traced each input of its graph with: fake tensors, symbolic or plain integers."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    return [node.meta["example_value"] for node in inputs]


def capture(module: GraphModule) -> GraphModule:
    """Dynamo's graph as ATen operators before dispatch, with `meta["val"]` on every node."""
    traced = _trace(Interpreter(module).run, example_values(module))
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for new, old in zip(_inputs(traced), inputs, strict=True):
        new.meta = {**old.meta, "val": new.meta.get("val", old.meta["example_value"])}
    return traced


def trace(function: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    """`function` of fake values as ATen operators before dispatch."""
    return _trace(function, values)


def _trace(function: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    fake = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    with fake or nullcontext(), torch.fx.traceback.preserve_node_meta():
        return make_fx(function, pre_dispatch=True, _error_on_data_dependent_ops=True)(*values)


def _inputs(module: GraphModule) -> list[torch.fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def fake_copy(values: Sequence[Any], *, dynamic: bool = False) -> list[Any]:
    """Fake tensors like these ones, for tracing without Dynamo."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [mode.from_tensor(v, static_shapes=not dynamic) if isinstance(v, Tensor) else v
            for v in values]  # fmt: skip


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds for all sizes the graph is compiled for; adds no guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def storage_of(value: Any) -> int | None:
    """Identity of the memory behind a fake tensor; views share it."""
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def inductor(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile with Inductor, gradients included."""
    return torch._dynamo.lookup_backend("inductor")(module, list(inputs))


def operator_by_operator(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Cut into forward and backward as for Inductor, and run as it is."""
    return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(module, list(inputs))


def keep(node: torch.fx.Node) -> None:
    """Tell the partitioner never to compute a node twice."""
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def fewest_bytes() -> Any:
    """In this scope the partitioner may compute again whatever `keep` does not forbid."""
    return torch._functorch.config.patch(
        ban_recompute_not_in_allowlist=False, ban_recompute_used_far_apart=False,
        ban_recompute_long_fusible_chains=False, ban_recompute_materialized_backward=False,
        ban_recompute_reductions=False, max_dist_from_bw=1000,
    )  # fmt: skip


@contextmanager
def cache_key(identity: str) -> Iterator[None]:
    """In this scope `identity` is part of the key of every compile cache."""
    former = torch.compiler.config.cache_key_tag
    with torch.compiler.config.patch(cache_key_tag=f"{former}{identity}"):  # pyright: ignore
        yield
