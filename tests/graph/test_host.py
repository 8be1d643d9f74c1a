"""No op waits for the device on the host, nor copies between them: steps can be recorded as CUDA
graphs.

Every op of the audit, and a training step of the model, run their launchers on tensors that own no
memory, planned for a GPU. Reading a value is impossible there, and each operator that would need
one, or moves data between host and device, is trapped.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kexaone
from kexaone.autotune.capture import capture
from kexaone.autotune.cases import CASES, Builder
from kexaone.graph.ir import operator_name
from kexaone.kernels.arch import ARCHS
from kexaone.model.fp8_training import train_in_fp8
from kexaone.model.losses import training_loss

WAITS = frozenset({
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount",
})  # fmt: skip


class Trap(TorchDispatchMode):
    """Raises where an operator waits for the device or crosses to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator_name(func)
        if name in WAITS or (name == "repeat_interleave" and not kwargs.get("output_size")):
            raise AssertionError(f"{name} waits for the device")
        result = func(*args, **kwargs)
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
                 if t.dim() or name in ("_to_copy", "copy_")}  # fmt: skip
        made = {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        fills = not name.startswith(("empty", "new_empty", "zeros", "new_zeros", "full", "ones"))
        if fills and len(given | made) > 1:
            raise AssertionError(f"{name} goes from {given} to {made}")
        return result


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}, {c.problem}")
def test_no_op_waits_for_the_device(case):
    def call():
        with Trap():
            case.call(Builder())

    assert capture(call, ARCHS["sm_90"])


@pytest.mark.parametrize("cast, policy", [(False, "nothing"), (True, "nothing"), (False, "cheap")])
def test_no_training_step_waits_for_the_device(cast, policy):
    config = dataclasses.replace(kexaone.Config.preset("mini"), windows=(64, 0))
    model = kexaone.KExaone(config).to("meta")
    model.model.recompute = policy
    if cast:
        train_in_fp8(model)
    ids = torch.zeros(2, 40, dtype=torch.int64, device="meta")

    def step():
        with Trap():
            training_loss(model, ids).total.backward()

    launches = {launch.name for launch in capture(step, ARCHS["sm_90"])}
    assert {"_dkv_kernel", "_gated_backward_kernel"} <= launches
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("wrong", [
    lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.cpu(),
    lambda x: x + torch.ones(3).to(x.device), lambda x: x.copy_(torch.ones(3)),
    lambda x: x.tolist(), lambda x: bool(x.sum()),
])  # fmt: skip
def test_what_waits_is_trapped(wrong):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Trap():
        wrong(torch.empty(3, device="meta"))
