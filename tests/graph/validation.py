"""Translation validation: a graph before its passes and after them computes the same.

`rewritten` captures a function of tensors without Dynamo, so that one case takes milliseconds.
`validate` holds the result to the numerics contract of the kernels, forward and gradients, and
requires that what the function writes to its inputs is written alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kexaone.graph import shim
from kexaone.graph.passes import Pass, Report, rewrite

from ..kernels.contract import assert_close, check, tensors

Function = Callable[..., Any]


def rewritten(
    function: Function, inputs: Sequence[Tensor], *, training: bool = True,
    passes: list[Pass] | None = None,
) -> tuple[Function, Report]:  # fmt: skip
    """The function after the passes, for inputs of these shapes and strides."""
    leaves = [x.detach().requires_grad_(training and x.is_floating_point()) for x in inputs]
    module = shim.trace(function, shim.fake_copy(leaves))
    report = rewrite(module, training=training, passes=passes)
    return module, report


def validate(
    function: Function, inputs: Sequence[Tensor], *, seed: int = 0, by: int | None = None,
    passes: list[Pass] | None = None,
) -> Report:  # fmt: skip
    """Forward and gradients under the contract; what was found."""
    after, report = rewritten(function, inputs, passes=passes)
    check(after, function, list(inputs), by=by, seed=seed)
    return report


def validate_inference(
    function: Function, inputs: Sequence[Tensor], *, passes: list[Pass] | None = None
) -> Report:
    """Results, and inputs that the function wrote to, without gradients."""
    after, report = rewritten(function, inputs, training=False, passes=passes)
    with torch.no_grad():
        sides = []
        for run, wide in ((after, False), (function, False), (function, True)):
            given = [x.double() if wide and x.is_floating_point() else x.clone() for x in inputs]
            sides.append([*tensors(run(*given)), *given])
    for mine, naive, exact in zip(*sides, strict=True):
        assert mine.dtype == naive.dtype
        if mine.is_floating_point():
            assert_close(mine, (naive.double() - exact).abs(), exact, None)
        else:
            assert torch.equal(mine, naive)
    return report
