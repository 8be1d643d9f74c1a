"""Replacements that are wrong on purpose, and slightly: validation must notice each."""

from __future__ import annotations

import functools

import pytest
import torch

from kexaone.graph import (
    add_rms_norm,
    attention,
    cross_entropy,
    embedding,
    experts,
    ir,
    qk_norm_rope,
    rms_norm,
    route,
    swiglu,
)

from ..kernels.contract import normal
from . import patterns as p
from .validation import validate

X, W = normal(9, 64), normal(64, seed=1)
HEADS = [normal(1, 12, 64, seed=2), normal(1, 12, 32, seed=3), normal(16), normal(16, seed=4)]
QKV = [normal(1, 4, 12, 16), normal(1, 2, 12, 16, seed=1), normal(1, 2, 12, 16, seed=2)]
WINDOWED = functools.partial(p.masked_attention, window=4, style="compare")
LOSS = functools.partial(p.loss, shift=True, reduction="mean")
TARGETS = torch.tensor([[1, 2, -100, 4, 5, 6]])


def routed(x, weight, bias):
    weights, ids = p.router(x, weight, bias.detach(), top_k=3)
    return torch.zeros(len(x), 8, dtype=weights.dtype).scatter(1, ids, weights)


ROUTING = [normal(9, 32), normal(8, 32, seed=1), normal(8, seed=2)]

PLANTED = {
    "another epsilon": (
        p.llama_norm, [X * 0.01, W], rms_norm.ops, "rms_norm",
        lambda f: lambda x, w, eps: f(x, w, eps=eps * 1.5)),
    "a weight moved by one": (
        p.llama_norm, [X, W], rms_norm.ops, "rms_norm",
        lambda f: lambda x, w, eps: f(x, w.roll(1), eps=eps)),
    "the gradient of the next row": (
        lambda t, i: torch.ops.aten.embedding(t, i, -1), [X, torch.tensor([1, 1, 5])], embedding,
        "_embedding", lambda f: lambda t, i, p: f(t.detach(), i, p) + t[i + 1] - t[i + 1].detach()),
    "a dropped residual": (
        p.residual_norm, [X, normal(9, 64, seed=5), W], add_rms_norm.ops, "add_rms_norm",
        lambda f: lambda a, b, w, eps: f(a, b * 0, w, eps=eps)),
    "a gradient cut off": (
        p.mlp, [X, normal(9, 64, seed=5)], swiglu.ops, "swiglu",
        lambda f: lambda gate, up: f(gate, up.detach())),
    "gate and up exchanged": (
        p.mlp, [X, normal(9, 64, seed=5)], swiglu.ops, "swiglu",
        lambda f: lambda gate, up: f(up, gate)),
    "the other direction of rotation": (
        functools.partial(p.qk_norm, rope=True, early=True), HEADS, qk_norm_rope.ops,
        "qk_norm_rope", lambda f: lambda *a, sin, **k: f(*a, sin=-sin, **k)),
    "a window too wide by one": (
        WINDOWED, QKV, attention.ops, "attention",
        lambda f: lambda *a, window, **k: f(*a, window=window + 1, **k)),
    "another scale": (
        WINDOWED, QKV, attention.ops, "attention",
        lambda f: lambda *a, scale, **k: f(*a, scale=None, **k)),
    "no normalisation of weights": (
        routed, ROUTING, route.ops, "route",
        lambda f: lambda *a, normalize, **k: f(*a, normalize=False, **k)),
    "weights of the biased scores' order": (
        routed, ROUTING, route.ops, "route",
        lambda f: lambda x, w, b, **k: f(x, w, b * 0, **k)),
    "experts of the next token": (
        p.batched_experts, p.expert_inputs(9, 5, 2, torch.float32, 0), experts.ops,
        "group_by_expert", lambda f: lambda ids, experts: f(ids.roll(1, 0), experts=experts)),
    "ignored targets that count": (
        LOSS, [normal(1, 6, 64), normal(50, 64, seed=1) / 8, TARGETS], cross_entropy, "_live",
        lambda f: lambda targets, ignored: targets == targets),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_noticed(name, monkeypatch):
    function, inputs, home, target, wrong = PLANTED[name]
    assert validate(function, inputs).matches
    original = getattr(home, target)
    monkeypatch.setattr(home, target, wrong(original), raising=False)
    with pytest.raises(AssertionError):
        validate(function, inputs)


def test_a_replacement_of_another_dtype_or_shape_is_refused():
    from kexaone.graph import shim

    module = shim.trace(lambda x: x * 2, shim.fake_copy([X]))
    graph = ir.Rewrite(module, training=False)
    (product,) = [n for n in module.graph.nodes if n.op == "call_function"]
    for wrong in (
        lambda x: (x * 2).double(),
        lambda x: (x * 2)[:3],
        lambda x: (x * 2).t().contiguous(),
    ):
        with pytest.raises(ir.Refused):
            graph.replace([product], [product.args[0]], wrong, label="wrong")
