"""Which kernels an op launches, with which arguments, without running any.

The op is called on meta tensors: it has shapes, dtypes, strides and alignment and owns no memory.
Its launcher plans for the target architecture, and each launch is written down instead of made. So
the launchers themselves are the only list of signatures there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels.arch import Arch, targeting


@dataclass(frozen=True)
class Launch:
    """One launch: `arguments` by parameter name, `options` for the compiler (num_warps, ...).

    `unknown` names those integers of which only type and divisibility are known.
    """

    kernel: Any  # a JITFunction; Triton's stubs hide its fields
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    unknown: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the arguments; of a descriptor, the one it describes."""
        found = {n: v.base if isinstance(v, TensorDescriptor) else v
                 for n, v in self.arguments.items()}  # fmt: skip
        return {n: t for n, t in found.items() if isinstance(t, Tensor)}

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes of each piece of memory it is given, by storage; an expanded row counts
        once, two views that begin apart as two."""
        views: dict[int, dict[int, int]] = {}
        most: dict[int, int] = {}
        for tensor in self.tensors.values():
            spread = [n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s]
            size = math.prod(spread) * tensor.element_size() if tensor.numel() else 0
            storage = storage_of(tensor)
            most[storage] = tensor.untyped_storage().nbytes()
            of_storage = views.setdefault(storage, {})
            of_storage[tensor.data_ptr()] = max(of_storage.get(tensor.data_ptr(), 0), size)
        return {s: min(most[s], sum(of_storage.values())) for s, of_storage in views.items()}


def storage_of(tensor: Tensor) -> int:
    """A number that tensors sharing memory have in common."""
    return tensor.untyped_storage()._cdata


def capture(call: Callable[[], Any], arch: Arch) -> list[Launch]:
    """The launches that `call` makes on meta tensors, planned for `arch`, in order."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append(bind(self, grid, args, named))

    run = JITFunction.run
    JITFunction.run = record  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with targeting(arch):
            call()
    finally:
        JITFunction.run = run
    return launches


def bind(kernel: Any, grid: Any, args: tuple[Any, ...], named: dict) -> Launch:
    """A launch from what `kernel[grid](*args, **named)` was given."""
    own = {k: v for k, v in named.items() if k in kernel.signature.parameters}
    bound = kernel.signature.bind(*args, **own)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    size: Any = grid(arguments) if callable(grid) else grid
    size = (size,) if isinstance(size, int) else tuple(size)
    options = {k: v for k, v in named.items() if k not in own}
    return Launch(kernel, (*size, 1, 1)[:3], arguments, options)
