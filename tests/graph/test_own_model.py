"""Our own model under torch.compile: one graph, forward and backward, that sizes do not end."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import kexaone
from kexaone.kernels.cross_entropy import linear_cross_entropy
from kexaone.model.packing import Packing

SIZES = ((2, 32), (2, 48), (3, 40), (4, 56), (2, 64))


def packing(batch: int, length: int) -> Packing:
    """With what the decoder reads of it at hand: the host's lengths stay out of the graph."""
    packed = Packing.of([length] * batch, starts=None, device=torch.device("cpu"))
    for name in ("cu_seqlens", "positions", "turns"):
        getattr(packed, name, None)
    return packed


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_one_graph_for_every_size_after_the_second(dynamic):
    model = kexaone.KExaone(kexaone.Config.preset("mini"))

    def loss(ids, packed):
        hidden = model.model(ids, packed).hidden_NH
        return linear_cross_entropy(hidden, model.lm_head.weight, ids.roll(-1)).loss

    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    graphs = []
    for batch, length in SIZES:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(0, 256, (batch * length,), generator=generator)
        packed = packing(batch, length)
        ours = fast(ids, packed)
        (gradient,) = torch.autograd.grad(ours, [model.model.embed_tokens.weight])
        expected = loss(ids, packed)
        (wanted,) = torch.autograd.grad(expected, [model.model.embed_tokens.weight])
        # the same kernels on the same numbers; what is around them in another order
        assert abs(ours - expected) < 1e-5 * expected
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm()
        graphs.append(counter.frame_count)
    # the third size may differ in the batch, the second in the length
    assert graphs[2] == graphs[-1] and graphs[-1] <= 3


def test_no_op_waits_for_the_device():
    """Nothing in the captured graph brings a number to the host."""
    from kexaone.graph import shim

    model = kexaone.KExaone(kexaone.Config.preset("mini"))
    seen = []

    def look(module, inputs):
        seen.append({n.target for n in shim.capture(module).graph.nodes})
        return module.forward

    packed = packing(2, 32)
    ids = torch.zeros(64, dtype=torch.int64)
    with torch.no_grad():
        torch.compile(model.model, fullgraph=True, backend=look)(ids, packed)
    waits = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default,
             torch.ops.aten.nonzero.default}  # fmt: skip
    assert len(seen) == 1 and not seen[0] & waits
    assert torch.ops.kexaone.moe_experts.default in seen[0]
