"""A function of fixed tensors, recorded once and run again without Python.

On a GPU this is a CUDA graph. On a CPU the launches of Triton kernels are recorded
(`kexaone.cpu.record`); there, what the function asks of PyTorch must be a view, or one of the few
operators that have a kernel of their own (`_LOWERED`): anything else is refused, since a replay
would not do it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .dispatch import impl
from .launch import kernel_of
from .linear_skinny import linear_skinny
from .plain import add, concatenate, take

_aten = torch.ops.aten


class CaptureError(RuntimeError):
    """The function does something that a replay could not do again."""


def _embedding(weight: Tensor, ids: Tensor, padding: int = -1, *_: bool) -> Tensor:
    return take(weight, ids)


def _add(x: Tensor, y: Tensor, alpha: float = 1) -> Tensor:
    if alpha != 1 or x.shape != y.shape or x.dtype != y.dtype:
        raise CaptureError("only the plain sum of two equally shaped tensors is recorded on a CPU")
    return add(x, y)


def _select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    if dim != 0 or x.dim() != 2:
        raise CaptureError("only rows of a matrix are selected by a recorded kernel")
    return take(x, index)


_LOWERED: dict[Any, Callable[..., Any]] = {
    _aten.linear.default: linear_skinny,
    _aten.add.Tensor: _add,
    _aten.embedding.default: _embedding,
    _aten.cat.default: concatenate,
    _aten.index_select.default: _select,
}
_ALLOCATE = (_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default)


class _OnlyLaunches(TorchDispatchMode):
    """Runs our ops and lowered operators as kernels, lets views pass, refuses the rest."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kernel = kernel_of(func) or _LOWERED.get(func)
        if kernel is not None:
            # under this mode again: what a launcher asks of PyTorch is looked at as well
            with self:
                return kernel(*args, **(kwargs or {}))
        if func in _ALLOCATE:
            return func(*args, **(kwargs or {}))
        out = None
        if not func._schema.is_mutable or func is _aten.detach_.default:
            out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, list | tuple) else (out,)
        if not all(isinstance(o, Tensor) and _is_view(o, args) for o in outs):
            raise CaptureError(f"{func} is computed by PyTorch, which is not recorded on a CPU")
        return out


def _is_view(out: Tensor, args: tuple) -> bool:
    memory = out.untyped_storage().data_ptr()
    return out.numel() == 0 or any(
        isinstance(a, Tensor) and a.untyped_storage().data_ptr() == memory for a in args
    )


class Graph:
    """Runs `function()` and records it; `replay` runs it again on what its tensors then hold.

    `output` is what the function returned; a replay overwrites it. Memory that the function
    allocates stays allocated. No gradients. On a GPU the function runs more than once.

    Raises:
        CaptureError: on a CPU, the function asks PyTorch for more than views.
        ValueError: the device is neither a CPU nor a GPU.
    """

    def __init__(self, function: Callable[[], Any], *, device: torch.device) -> None:
        self.output: Any = None
        self._replay: Callable[[], None]
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"only CPUs and GPUs run kernels, got {device}")
        with torch.inference_mode(), impl("triton"):
            record = self._on_cpu if device.type == "cpu" else self._on_gpu
            record(function)

    def replay(self) -> Any:
        """Runs the work again; returns `output`."""
        self._replay()
        return self.output

    def _on_cpu(self, function: Callable[[], Any]) -> None:
        from ..cpu.recording import record

        with record() as recording, _OnlyLaunches():
            self.output = function()
        self._replay = recording.replay

    def _on_gpu(self, function: Callable[[], Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # once outside: kernels are compiled, and libraries take their workspace
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = function()
        graph.replay()
        self._replay = graph.replay
