"""`torch.compile(model, backend="kexaone")` and `kexaone.optimize(model)`.

Dynamo's graph is captured as ATen operators, rewritten by the suite, and handed on: to Inductor,
or run as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from . import shim
from .fp8 import Compare, LayerError
from .huggingface import replace_loops
from .passes import Report, identity, rewrite, suite
from .recompute import mark

BACKENDS = ("inductor", "eager")
FLAGS = ("fp8", "recompute")


def backend(
    module: GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
    reports: list[Report] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """A torch.compile backend, registered as "kexaone".

    Args:
        module: Dynamo's graph.
        inputs: example inputs.
        options: torch.compile's; `then` says what compiles the rewritten graph, "inductor" (the
            default) or "eager"; `fp8` and `recompute` are as for `optimize`.
        reports: what was found is appended here.

    Raises:
        ValueError: another option, or another value of one.
    """
    chosen = _chosen(options or {})
    module, report = rewritten(module, fp8=chosen["fp8"])
    if reports is not None:
        reports.append(report)
    if chosen["recompute"]:
        mark(module)
    elif chosen["then"] == "eager":
        return module.forward
    compiler = shim.inductor if chosen["then"] == "inductor" else shim.operator_by_operator
    scope = shim.fewest_bytes() if chosen["recompute"] else nullcontext()
    with scope, shim.cache_key(identity()):
        return compiler(module, inputs)


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {"then": BACKENDS[0], **dict.fromkeys(FLAGS, False), **options}
    unknown = set(chosen) - {"then", *FLAGS}
    if unknown:
        raise ValueError(
            f"the backend's options are then, {', '.join(FLAGS)}, got {', '.join(sorted(unknown))}"
        )
    if chosen["then"] not in BACKENDS:
        raise ValueError(f"then takes one of {', '.join(BACKENDS)}, got {chosen['then']!r}")
    for name in FLAGS:
        if not isinstance(chosen[name], bool):
            raise ValueError(f"{name} is True or False, got {chosen[name]!r}")
    return chosen


def rewritten(module: GraphModule, *, fp8: bool = False) -> tuple[GraphModule, Report]:
    """A rewritten copy of Dynamo's graph; the graph itself, and why, if it cannot be captured."""
    values = shim.example_values(module)
    training = torch.is_grad_enabled() and any(
        isinstance(v, Tensor) and v.requires_grad for v in values
    )
    try:
        captured = shim.capture(module)
    except Exception as error:  # what may fail in tracing has no common class
        return module, Report(whole=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return captured, rewrite(captured, training=training, passes=suite(fp8=fp8))


def optimize(
    model: Any, *, then: str = "inductor", dynamic: bool | None = None, fp8: bool = False,
    recompute: bool = False,
) -> Any:  # fmt: skip
    """`model` with the parts that we have kernels for replaced, compiled; it trains as before.

    A transformers model that computes its experts in a loop, which Dynamo cannot follow, is
    switched to `experts_implementation="kexaone"`.

    Args:
        model: a torch.nn.Module or a function of tensors, by whoever.
        then: "inductor" compiles what remains, "eager" runs it operator by operator.
        dynamic: as in torch.compile.
        fp8: compute the products of decoder blocks, forward and both gradients, in block-scaled
            float8 (`graph/fp8.py` has the rule; `fp8_errors` says what it costs). Weights stay as
            they are, and are cast in every pass.
        recompute: between forward and backward keep what is expensive, products and attention, and
            compute norms, activations and rotations again (`graph/recompute.py`).

    Returns:
        What torch.compile returns; its parameters are the model's own.

    Raises:
        ValueError: `then` is neither.
    """
    options: dict[str, Any] = {"then": then, "fp8": fp8, "recompute": recompute}
    _chosen(options)
    replace_loops(model)
    return torch.compile(model, backend=backend, dynamic=dynamic, options=options)


def fp8_errors(model: Any, *inputs: Any, **options: Any) -> tuple[LayerError, ...]:
    """What `fp8=True` costs each layer of `model(*inputs, **options)`, computed on these inputs.

    Every layer gets the inputs it has without float8, so that errors do not add up.

    Raises:
        torch._dynamo.exc.TorchDynamoException: the model is no single graph, or none that can be
            rewritten.
    """
    found: list[Compare] = []

    def compare(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured, report = rewritten(module)
        if report.whole:
            raise ValueError(f"the model cannot be rewritten: {report.whole}")
        found.append(Compare(captured))
        return lambda *values: found[-1].run(*values)

    replace_loops(model)
    torch.compile(model, backend=compare, fullgraph=True)(*inputs, **options)
    return found[-1].errors()
