"""`torch.compile(model, backend="kexaone")` and `kexaone.optimize(model)`.

Dynamo's graph is captured as ATen operators, rewritten by the suite, and handed on: to Inductor,
or run as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from . import shim
from .huggingface import replace_loops
from .passes import Report, identity, rewrite

BACKENDS = ("inductor", "eager")


def backend(
    module: GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
    reports: list[Report] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """A torch.compile backend, registered as "kexaone".

    Args:
        module: Dynamo's graph.
        inputs: example inputs.
        options: torch.compile's; `then` says what compiles the rewritten graph, "inductor" (the
            default) or "eager".
        reports: what was found is appended here.

    Raises:
        ValueError: another option, or another value of `then`.
    """
    then = _chosen(options or {})
    module, report = rewritten(module)
    if reports is not None:
        reports.append(report)
    if then == "eager":
        return module.forward
    with shim.cache_key(identity()):
        return shim.inductor(module, inputs)


def _chosen(options: Mapping[str, Any]) -> str:
    unknown, then = set(options) - {"then"}, options.get("then", BACKENDS[0])
    if unknown:
        raise ValueError(f"the backend's only option is `then`, got {', '.join(sorted(unknown))}")
    if then not in BACKENDS:
        raise ValueError(f"then takes one of {', '.join(BACKENDS)}, got {then!r}")
    return then


def rewritten(module: GraphModule) -> tuple[GraphModule, Report]:
    """A rewritten copy of Dynamo's graph; the graph itself, and why, if it cannot be captured."""
    values = shim.example_values(module)
    training = torch.is_grad_enabled() and any(
        isinstance(v, Tensor) and v.requires_grad for v in values
    )
    try:
        captured = shim.capture(module)
    except Exception as error:  # what may fail in tracing has no common class
        return module, Report(whole=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return captured, rewrite(captured, training=training)


def optimize(model: Any, *, then: str = "inductor", dynamic: bool | None = None) -> Any:
    """`model` with the parts that we have kernels for replaced, compiled; it trains as before.

    A transformers model that computes its experts in a loop, which Dynamo cannot follow, is
    switched to `experts_implementation="kexaone"`.

    Args:
        model: a torch.nn.Module or a function of tensors, by whoever.
        then: "inductor" compiles what remains, "eager" runs it operator by operator.
        dynamic: as in torch.compile.

    Returns:
        What torch.compile returns; its parameters are the model's own.

    Raises:
        ValueError: `then` is neither.
    """
    options: dict[str, Any] = {"then": then}
    _chosen(options)
    replace_loops(model)
    return torch.compile(model, backend=backend, dynamic=dynamic, options=options)
