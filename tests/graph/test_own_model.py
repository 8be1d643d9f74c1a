"""Our own model under torch.compile: one graph, forward and backward, that sizes do not end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import kexaone
from kexaone.model.losses import training_loss
from kexaone.model.packing import Packing

SIZES = ((2, 32), (2, 48), (3, 40), (4, 56), (2, 64))


def draw(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 256, (batch, length), generator=generator)


def loss_of_logits(model, ids):
    """`model(ids)` as a user calls it, and a loss of all it returns."""
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def loss_of_training(model, ids):
    """All parts of the training loss: next token, second token, balance."""
    return training_loss(model, ids).total


@pytest.mark.parametrize("loss, dynamic", [
    (loss_of_logits, None), (loss_of_training, None), (loss_of_training, True),
], ids=["logits", "automatic", "dynamic"])  # fmt: skip
def test_one_graph_for_every_size_after_the_second(dynamic, loss):
    model = kexaone.KExaone(dataclasses.replace(kexaone.Config.preset("mini"), windows=(64, 0)))
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    graphs = []
    weights = [model.model.embed_tokens.weight, model.lm_head.weight]
    for batch, length in SIZES:
        ids = draw(batch, length)
        ours, expected = fast(model, ids), loss(model, ids)
        # the same kernels on the same numbers; what is around them in another order
        assert abs(ours - expected) < 1e-5 * expected
        pairs = zip(torch.autograd.grad(ours, weights), torch.autograd.grad(expected, weights),
                    strict=True)  # fmt: skip
        assert all((a - b).norm() < 1e-4 * b.norm() for a, b in pairs)
        graphs.append(counter.frame_count)
    # the third size may differ in the batch, the second in the length
    assert graphs[2] == graphs[-1] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_static_shapes_compile_once_each():
    model = kexaone.KExaone(dataclasses.replace(kexaone.Config.preset("mini"), windows=(64, 0)))
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    with torch.no_grad():
        for batch, length in (*SIZES[:2], *SIZES[:2]):
            ids = draw(batch, length)
            assert torch.allclose(fast(ids), model(ids), atol=1e-5)
    assert counter.frame_count == 2


def test_no_op_waits_for_the_device():
    """Nothing in the captured graph brings a number to the host."""
    from kexaone.graph import shim

    model = kexaone.KExaone(kexaone.Config.preset("mini"))
    seen = []

    def look(module, inputs):
        seen.append({n.target for n in shim.capture(module).graph.nodes})
        return module.forward

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=look)(draw(2, 32))
    waits = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default,
             torch.ops.aten.nonzero.default}  # fmt: skip
    assert len(seen) == 1 and not seen[0] & waits
    assert torch.ops.kexaone.moe_experts.default in seen[0]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (2, 128)])
def test_a_rectangle_is_the_packing_of_its_lengths(sizes):
    cpu = torch.device("cpu")
    ours = Packing.rectangle(*sizes, device=cpu)
    plain = Packing.of([sizes[1]] * sizes[0], starts=None, device=cpu)
    for name in ("lengths", "starts", "ends", "total", "longest", "uniform", "batch", "turns"):
        assert getattr(ours, name) == getattr(plain, name), name
    for name in ("cu_seqlens", "held", "rows", "columns", "positions", "last"):
        mine, theirs = getattr(ours, name), getattr(plain, name)
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
        assert getattr(ours, name) is mine
    x = torch.randn(plain.total, 2)
    assert torch.equal(ours.pad(x), plain.pad(x)) and torch.equal(ours.unpad(ours.pad(x)), x)
