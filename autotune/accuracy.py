"""Whether a candidate computes the right thing: the contract that the kernels' tests hold.

The oracle is the op's reference in a wider type. A candidate's error may be twice the larger of two
errors, that of the reference in the working type and that of the default configuration, plus one
unit in the last place of the largest value; over each tensor and over each of its rows. Integers
and float8 numbers must have the bits of the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import impl
from .tasks import Task


def outputs(
    function: Callable[..., Any], inputs: Sequence[Tensor], *, trains: bool
) -> list[Tensor]:
    """The tensors of a result, and the gradients of the inputs for fixed output gradients."""
    if not trains:
        with torch.no_grad():
            return _tensors(function(*inputs))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        found = _tensors(function(*leaves))
    carried = [t for t in found if t.requires_grad]
    gradients = [_gradient(t, seed) for seed, t in enumerate(carried)]
    wanted = [x for x in leaves if x.requires_grad]
    given = torch.autograd.grad(carried, wanted, gradients, allow_unused=True)
    return [t.detach() for t in found] + [g for g in given if g is not None]


def _gradient(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # rounded first, so that it is the same in every type
    return torch.randn(like.shape, generator=generator).bfloat16().to(like.device, like.dtype)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if dataclasses.is_dataclass(result):
        return _tensors([getattr(result, f.name) for f in dataclasses.fields(result)])
    return [t for part in result or () for t in _tensors(part)]


class Oracle:
    """Judges results of a task's kernels."""

    def __init__(self, task: Task) -> None:
        def run(wide: torch.dtype | None) -> list[Tensor]:
            inputs = [
                x.to(wide) if wide is not None and x.is_floating_point() else x for x in task.inputs
            ]
            with impl("reference"):
                return outputs(task.function, inputs, trains=task.trains)

        working = next((x.dtype for x in task.inputs if x.is_floating_point()), torch.float32)
        # float32 errs less than the spacing of 16-bit numbers by a factor of 2^13 or more
        self._exact = run(torch.float64 if working == torch.float32 else torch.float32)
        self._naive = run(None)
        self._default: list[Tensor] | None = None

    def accepts(self, found: list[Tensor]) -> bool:
        """Whether a result keeps the contract; the first one asked about is the default's."""
        if self._default is None:
            self._default = found
        return all(
            _close(*tensors)
            for tensors in zip(found, self._default, self._naive, self._exact, strict=True)
        )


def _close(ours: Tensor, default: Tensor, naive: Tensor, exact: Tensor) -> bool:
    if not ours.is_floating_point() or ours.element_size() == 1:
        return torch.equal(_bits(ours), _bits(default))
    if not ours.numel():
        return True
    wide = torch.float64 if ours.dtype == torch.float32 else torch.float32
    largest = exact.abs().max().clamp(min=1e-30).to(wide)
    ulp = torch.exp2(largest.log2().floor()) * torch.finfo(ours.dtype).eps
    errors = [(t.to(wide) - exact.to(wide)).abs().reshape(len(t) if t.dim() > 1 else 1, -1).amax(1)
              for t in (ours, default, naive)]  # fmt: skip
    granted = torch.maximum(errors[1].max(), errors[2].max())
    return bool((errors[0] <= 2 * granted + ulp).all())


def _bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.is_floating_point() else t
