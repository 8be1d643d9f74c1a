"""What training keeps and computes again: same numbers, fewer bytes, nothing expensive twice."""

from __future__ import annotations

import collections
import contextlib
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kexaone
from kexaone.graph import recompute
from kexaone.graph.ir import operator_name
from kexaone.graph.recompute import Live
from kexaone.model.losses import training_loss

from ..kernels.contract import generator
from .families import FAMILIES, LAYERS

EXPENSIVE = ("attention", "moe_experts", "route", "linear_cross_entropy")


class Calls(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[operator_name(func)] += 1
        return func(*args, **(kwargs or {}))


def draw(batch, length, vocabulary=256):
    return torch.randint(0, vocabulary, (batch, length), generator=generator(length))


def measured(step, parameters, ids):
    """Loss, gradients, the most bytes alive, and how often each operator runs."""
    found = []
    for mode in (contextlib.nullcontext(), Live(), Calls()):
        # new ones, as gradients add up in place
        for parameter in parameters:
            parameter.grad = None
        with mode:
            loss = step(ids)
            loss.backward()
        found.append(mode)
    _, live, calls = found
    return loss.detach(), [p.grad for p in parameters], live.peak, calls.count


def test_live_bytes_are_those_of_tensors_that_live():
    with Live() as live:
        x = torch.zeros(1000)
        y = x.view(10, 100) + 1
        assert live.now == 8000
        del x
        assert live.now == live.known.__len__() * 4000 == 4000
        y.add_(1)
        y = torch.empty(10)
        assert live.now == 40 and live.peak == 8000
    assert y.numel() == 10


def small():
    config = dataclasses.replace(kexaone.Config.preset("mini"), windows=(64, 0, 64))
    torch.manual_seed(0)
    return kexaone.KExaone(config)


def test_policies_of_our_model_differ_in_memory_alone():
    model, ids = small(), draw(2, 128)
    parameters = list(model.parameters())
    found = {}
    for policy in ("nothing", "cheap", "blocks"):
        model.model.recompute = policy
        found[policy] = measured(lambda x: training_loss(model, x).total, parameters, ids)
    loss, gradients, _, once = found["nothing"]
    for policy in ("cheap", "blocks"):
        assert torch.equal(found[policy][0], loss)
        assert all(torch.equal(a, b) for a, b in zip(found[policy][1], gradients, strict=True))
    peaks = {policy: peak for policy, (_, _, peak, _) in found.items()}
    assert peaks["blocks"] < peaks["cheap"] < peaks["nothing"]
    cheap, blocks = found["cheap"][3], found["blocks"][3]
    # the router of so few tokens is plain PyTorch
    for name in (*(f"kexaone.{n}" for n in EXPENSIVE if n != "route"), "mm"):
        assert cheap[name] == once[name] > 0, name
    assert cheap["kexaone.rms_norm"] > once["kexaone.rms_norm"]
    # the MTP block's attention is none of the decoder's
    assert blocks["kexaone.attention"] == once["kexaone.attention"] + 3
    model.model.recompute = "everything"
    with pytest.raises(ValueError, match="recompute"):
        training_loss(model, ids)


def test_our_model_recomputes_inside_one_graph():
    model, ids = small(), draw(2, 64)
    expected = training_loss(model, ids).total
    model.model.recompute = "cheap"
    fast = torch.compile(lambda x: training_loss(model, x).total, fullgraph=True,
                         backend="aot_eager")  # fmt: skip
    ours = fast(ids)
    weight = model.model.layers[0].self_attn.q_proj.weight
    pair = [torch.autograd.grad(loss, weight)[0] for loss in (ours, expected)]
    assert abs(ours - expected) < 1e-5 * expected
    assert (pair[0] - pair[1]).norm() < 1e-4 * pair[1].norm()


@pytest.fixture(scope="module")
def foreign():
    model, ids = FAMILIES["ExaoneMoe"].build(), draw(2, 64, 97)

    def run(**options):
        torch._dynamo.reset()

        def step(x):
            return model(x, labels=x, use_cache=False).loss

        fast = kexaone.optimize(step, then="eager", **options)
        return measured(fast, list(model.parameters()), ids)

    return run


def test_foreign_models_keep_fewer_bytes(foreign):
    loss, gradients, peak, once = foreign()
    ours, found, fewer, calls = foreign(recompute=True)
    assert abs(ours - loss) < 1e-6 * loss
    pairs = [(a, b) for a, b in zip(found, gradients, strict=True) if b is not None]
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in pairs)
    assert fewer < peak
    for name in EXPENSIVE:
        assert calls[f"kexaone.{name}"] == once[f"kexaone.{name}"] > 0, name
    assert calls["kexaone.swiglu"] > once["kexaone.swiglu"] == LAYERS


def test_an_op_that_is_not_marked_is_noticed(foreign, monkeypatch):
    """The counts above would tell a policy that forgets attention."""
    monkeypatch.setattr(recompute, "KEPT", recompute.KEPT - {"kexaone.attention"})
    assert foreign(recompute=True)[3]["kexaone.attention"] > LAYERS
