"""Training in float8: which layers, with which error, and the products against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.graph import backend, fp8
from kexaone.graph.linear_fp8 import linear_fp8_training
from kexaone.kernels.quantize import quantize_reference
from kexaone.kernels.quantize_tiles import quantize_blocks_reference
from kexaone.model.fp8_training import train_in_fp8
from kexaone.model.losses import training_loss

from ..kernels.contract import generator, normal, seeds
from .families import FAMILIES, LAYERS

# a cast to 4 significant bits is off by at most 1/16 of the value, and so is each factor of a
# product: norms of results are off by less than 1/8 + 1/256
WORST = 1 / 8 + 1 / 256


def small(**changes):
    config = dataclasses.replace(kexaone.Config.preset("mini"), windows=(64, 0), **changes)
    torch.manual_seed(0)
    return kexaone.KExaone(config)


def draw(batch, length):
    return torch.randint(0, 256, (batch, length), generator=generator(length))


def widened(cast):
    """Values of blocks of 128 columns, float64."""
    columns = cast.values.shape[-1]
    return cast.values.double() * cast.scales.double().repeat_interleave(128, -1)[..., :columns]


def widened_blocks(weight):
    cast = quantize_blocks_reference(weight)
    scales = cast.scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return cast.values.double() * scales[: weight.shape[0], : weight.shape[1]]


def widened_groups(x):
    """Rows in blocks of 1 x 128 along the rows."""
    return widened(quantize_reference(x.T.contiguous())).T


@given(rows=st.sampled_from([1, 130, 260]), outputs=st.sampled_from([1, 200]),
       inputs=st.sampled_from([32, 192]), batched=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=seeds)  # fmt: skip
def test_the_three_products_are_those_of_the_cast_operands(
    rows, outputs, inputs, batched, dtype, seed
):
    x, weight = (normal(n, inputs, seed=seed + n, dtype=dtype) for n in (rows, outputs))
    grad = normal(rows, outputs, seed=seed + 7, dtype=dtype)
    shaped = [t.unflatten(0, (1, rows)) if batched else t for t in (x, grad)]
    leaves = shaped[0].clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_fp8_training(*leaves)
    d_x, d_weight = torch.autograd.grad(out, leaves, shaped[1])
    wide = widened_blocks(weight)
    exact = (
        widened(quantize_reference(x)) @ wide.T,
        widened(quantize_reference(grad)) @ wide,
        widened_groups(grad).T @ widened_groups(x),
    )
    sizes = (
        widened(quantize_reference(x)).abs() @ wide.abs().T,
        widened(quantize_reference(grad)).abs() @ wide.abs(),
        widened_groups(grad).abs().T @ widened_groups(x).abs(),
    )
    for mine, oracle, size in zip((out, d_x, d_weight), exact, sizes, strict=True):
        # each operation on float32 rounds by 2^-24 of the sum of magnitudes, of which there are at
        # most as many in a row as there are summands
        rounding = size.max() * max(rows, outputs, inputs) * 2.0**-24
        unit = torch.finfo(dtype).eps * oracle.abs().max()
        assert (mine.reshape(oracle.shape).double() - oracle).abs().max() <= rounding + unit


def test_it_is_a_well_formed_operator_and_compiles():
    x, weight = normal(5, 64), normal(96, 64, seed=1)
    torch.library.opcheck(
        torch.ops.kexaone.linear_fp8_training.default,
        (x.clone().requires_grad_(), weight.clone().requires_grad_()),
    )
    empty = linear_fp8_training(x[:0].clone().requires_grad_(), weight)
    empty.sum().backward()
    assert empty.shape == (0, 96)
    with pytest.raises(ValueError, match="weight"):
        linear_fp8_training(x, weight.T)
    with pytest.raises(ValueError, match="float64"):
        linear_fp8_training(x, weight.double())


@pytest.mark.parametrize("path, cast", [
    ("model.layers.3.self_attn.q_proj", True), ("model.layers.0.mlp.gate_proj", True),
    ("model.layers.2.mlp.experts", True), ("model.layers.2.mlp.shared_experts.up_proj", True),
    ("model.layers.2.mlp.gate", False), ("lm_head", False), ("mtp.layers.0.mlp.up_proj", False),
    ("mtp.fc", False), ("model.embed_tokens", False), ("model.layers.1.block.router.linear", False),
])  # fmt: skip
def test_the_rule(path, cast):
    assert fp8.in_fp8(path) == cast


class Block(torch.nn.Module):
    """Two linear layers inside a numbered block, one with a bias, and a router."""

    def __init__(self):
        super().__init__()
        inner = torch.nn.ModuleDict({
            "up": torch.nn.Linear(64, 96), "down": torch.nn.Linear(96, 64, bias=False),
            "gate": torch.nn.Linear(64, 8, bias=False),
        })  # fmt: skip
        self.layers = torch.nn.ModuleList([inner])

    def forward(self, x):
        inner = self.layers[0]
        tied = F.linear(x, inner["up"].weight * 2)
        return inner["down"](F.silu(inner["up"](x))), inner["gate"](x), tied


def test_linear_layers_are_rewritten_by_rule():
    torch.manual_seed(0)
    model, x, reports = Block(), normal(9, 64), []
    fast = torch.compile(
        model, fullgraph=True,
        backend=lambda m, i: backend.backend(m, i, options={"then": "eager", "fp8": True},
                                             reports=reports),
    )  # fmt: skip
    out, scores, tied = fast(x)
    exact, same, also = model(x)
    assert reports[0].matches["fp8"] == 2
    assert torch.equal(scores, same) and torch.equal(tied, also)
    error = (out - exact).norm() / exact.norm()
    # two layers, one behind the other
    assert 1e-3 < error < 2.5 * WORST


def test_foreign_models_are_rewritten_and_measured():
    model, ids = FAMILIES["ExaoneMoe"].build(), draw(2, 24) % 97
    errors = backend.fp8_errors(model, ids, use_cache=False)
    # four projections per layer, three of the dense or shared expert's, and the experts
    assert len(errors) == 4 * LAYERS + 3 * LAYERS + LAYERS - 1
    assert not [e for e in errors if not fp8.in_fp8(e.module)]
    for error in errors:
        bound = 3 * WORST if error.module.endswith(("mlp", "experts")) else WORST
        assert 1e-3 < error.output < bound
        assert 1e-3 < error.input_gradient < bound and 1e-3 < error.weight_gradient < bound
    step = kexaone.optimize(lambda x: model(x, labels=x, use_cache=False).loss, then="eager",
                            fp8=True)  # fmt: skip
    loss = step(ids)
    loss.backward()
    plain = model(ids, labels=ids, use_cache=False).loss
    assert loss != plain and abs(loss - plain) < 0.02 * plain


def test_a_planted_mistake_is_noticed(monkeypatch):
    """The errors tell a layer whose cast lost a block's scale, or whose gradient is cut off."""
    model, x = Block(), normal(9, 64)
    for wrong in (lambda x, w: linear_fp8_training(x, w) * 1.5,
                  lambda x, w: linear_fp8_training(x, w.roll(1, 0)),
                  lambda x, w: linear_fp8_training(x * 2 - x.detach(), w)):  # fmt: skip
        monkeypatch.setattr(fp8, "linear_fp8_training", wrong)
        worst = [max(e.output, e.input_gradient, e.weight_gradient)
                 for e in backend.fp8_errors(model, x)]  # fmt: skip
        assert min(worst) > WORST


def test_our_model_trains_in_float8_by_rule():
    model, ids = small(), draw(2, 40)
    names = set(dict(model.named_parameters()))
    plain = training_loss(model, ids)
    paths = train_in_fp8(model)
    # two layers: projections, a dense block, and a sparse one
    assert len(paths) == 2 * 4 + 3 + 1 + 3
    assert set(dict(model.named_parameters())) == names
    cast = training_loss(model, ids)
    cast.total.backward()
    assert all(q.grad is not None and q.grad.isfinite().all() for q in model.parameters())
    assert cast.total != plain.total and abs(cast.total - plain.total) < 0.02 * plain.total
    with torch.no_grad():
        assert training_loss(model, ids).next_token == plain.next_token


def test_our_model_in_float8_is_one_graph():
    model, ids = small(), draw(2, 40)
    train_in_fp8(model)
    expected = training_loss(model, ids).total
    fast = torch.compile(lambda x: training_loss(model, x).total, fullgraph=True,
                         backend="aot_eager")  # fmt: skip
    assert abs(fast(ids) - expected) < 1e-5 * expected
