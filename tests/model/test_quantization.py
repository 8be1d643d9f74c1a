"""Weights quantized at load: what is float8, what stays, and that decoding records it."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from training_cases import TINY

from kexaone import KExaone
from kexaone.model import stepper
from kexaone.model.fp8 import Fp8Linear, dequantize, quantize
from kexaone.model.generation import Generator
from kexaone.model.moe import Experts
from kexaone.model.quantization import quantize_weights

WIDE = dataclasses.replace(TINY, hidden_size=256, moe_intermediate_size=128, head_dim=64)


def model_of(dtype: torch.dtype = torch.float32) -> KExaone:
    torch.manual_seed(0)
    return KExaone(WIDE).to(dtype).eval()


def test_what_is_float8_and_what_stays():
    before, model = model_of(), model_of()
    quantize_weights(model)
    wide = dict(before.named_parameters())
    narrow = set()
    for name, parameter in model.named_parameters():
        if parameter.itemsize == 1:
            narrow.add(name)
            assert not parameter.requires_grad
            module = model.get_submodule(name.rpartition(".")[0])
            leaf = "weight" if isinstance(module, Fp8Linear) else name.rpartition(".")[2]
            scale = getattr(module, f"{leaf}_scale")
            # experts one by one, each as `quantize` alone does it
            for w, q, s in zip(
                *(t if t.dim() == 3 else t[None] for t in (wide[name], parameter, scale)),
                strict=True,
            ):
                expected = quantize(w.detach())
                assert torch.equal(q.view(torch.uint8), expected.values.view(torch.uint8))
                assert torch.equal(s, expected.scale)
        else:
            assert torch.equal(parameter, wide[name])
    expected = {
        n for n, p in wide.items()
        if n.startswith("model.layers.") and p.dim() > 1 and ".gate.weight" not in n
    }  # fmt: skip
    assert narrow == expected
    values = {n: p.data_ptr() for n, p in model.named_parameters()}
    quantize_weights(model)
    assert values == {n: p.data_ptr() for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5, 32, 40])
def test_few_rows_are_multiplied_without_widening_first(dtype, rows):
    torch.manual_seed(0)
    found = quantize(torch.randn(200, 256))
    layer = Fp8Linear(found.values, found.scale)
    x = torch.randn(1, rows, 256).to(dtype)
    with torch.no_grad():
        out = layer(x)
    weight = dequantize(found.values, found.scale, dtype=torch.float64)
    expected = F.linear(x.double(), weight)
    # 256 products summed in float32; many rows round the weights, and all the result, to the dtype
    size = F.linear(x.double().abs(), weight.abs())
    bound = (256 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) * size
    assert out.shape == (1, rows, 200) and out.dtype == dtype
    assert (
        (out.double() - expected).abs() <= bound + torch.finfo(dtype).eps * expected.abs()
    ).all()


def test_decoding_is_recorded_and_the_same_as_step_by_step():
    model = model_of()
    quantize_weights(model)
    assert any(isinstance(m, Experts) and m.down_proj_scale is not None for m in model.modules())
    with (
        patch.object(stepper, "PATIENCE", 1),
        patch("kexaone.kernels.dispatch.LAUNCH_BOUND", -1),
    ):
        generator = Generator(model, batch=2, context=40, drafts=2)
        found = generator([[1, 2, 3], [4]], max_new_tokens=24, stop_ids=())
        assert all(generator.engine.stepper._steps.values())
        with patch.object(stepper, "MOST_TOKENS", 0):
            expected = generator([[1, 2, 3], [4]], max_new_tokens=24, stop_ids=())
    assert found.token_ids == expected.token_ids
