"""Recorded decoding steps: the same tokens as steps run one by one, and no Python in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from training_cases import TINY

from kexaone import Config, KExaone
from kexaone.model import stepper
from kexaone.model.cache import Cache
from kexaone.model.generation import Generator
from kexaone.model.sampling import Sampling

CONFIGS = {
    "rings and growing layers": TINY,
    "growing layers only": dataclasses.replace(TINY, windows=(0, 0), mtp_steps=1),
    "rings only": dataclasses.replace(TINY, windows=(4, 6), num_shared_experts=0),
}


def model_of(config: Config, dtype: torch.dtype = torch.float32) -> KExaone:
    torch.manual_seed(0)
    model = KExaone(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # logits far enough apart that rounding does not decide
            parameter.mul_(1 if parameter.dim() == 1 else 20)
    return model.to(dtype).eval()


@pytest.fixture
def impatient() -> Iterator[None]:
    """Records every step when it is seen a second time."""
    with patch.object(stepper, "PATIENCE", 1), patch("kexaone.kernels.dispatch.LAUNCH_BOUND", -1):
        yield


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_tokens_as_step_by_step(
    name: str, drafts: int, temperature: float, impatient: None
) -> None:
    model = model_of(CONFIGS[name])
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    options = {
        "max_new_tokens": 40,
        "drafts": drafts,
        "sampling": Sampling(temperature=temperature, seed=3),
        # sequences end at different times, so steps of three, two and one rows are recorded
        "stop_ids": (0, 13),
    }
    recorded = model.generate(prompts, **options)
    with patch.object(stepper, "MOST_TOKENS", 0):
        expected = model.generate(prompts, **options)
    assert recorded.token_ids == expected.token_ids
    assert recorded.statistics.accepted_at == expected.statistics.accepted_at


def test_python_runs_no_more_once_recorded(impatient: None) -> None:
    model = model_of(TINY)
    with patch.object(model, "features", wraps=model.features) as features:
        model.generate([[1, 2, 3], [4, 5]], max_new_tokens=30, stop_ids=())
    # the prompt, the first step as it is, and the second while it is recorded
    assert features.call_count == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_far_beyond_the_window(dtype: torch.dtype, impatient: None) -> None:
    model = model_of(TINY, dtype)
    oracle = model_of(TINY, dtype).double()
    runs = [model, model, oracle]
    caches = [Cache(TINY, 2, like=m.lm_head.weight, chunk=8, drafts=2) for m in runs]
    for cache in caches:
        cache.reserve(64)
    steps = stepper.Stepper(model, caches[0])
    errors, largest = [0.0, 0.0], 0.0
    torch.manual_seed(1)
    with torch.inference_mode():
        for lengths in ([3, 1], [1, 1], [1, 1], *[[2, 2], [1, 0], [0, 1], [1, 1]] * 5):
            ids = torch.randint(0, TINY.vocab_size, (sum(lengths),))
            recorded = steps.decode(ids.tolist(), caches[0].packing(lengths))
            plain, exact = (
                m.features(ids, cache.packing(lengths), cache=cache).hidden_NH
                for m, cache in zip(runs[1:], caches[1:], strict=True)
            )
            assert recorded.best == recorded.logits.argmax(-1).tolist()
            largest = max(largest, float(exact.abs().max()))
            for i, found in enumerate((recorded.hidden, plain)):
                errors[i] = max(errors[i], float((found.double() - exact).abs().max()))
            assert caches[0].lengths == caches[1].lengths
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * largest
    assert set(steps._steps) and all(steps._steps.values())


def test_weights_changed_in_place_are_seen_and_growing_caches_recorded_anew(
    impatient: None,
) -> None:
    model = model_of(TINY)
    cache = Cache(TINY, 1, like=model.lm_head.weight, chunk=4)
    cache.reserve(12)
    steps, ids = stepper.Stepper(model, cache), torch.tensor([5])
    with torch.inference_mode():
        for _ in range(4):
            steps.decode([5], cache.packing([1]))
        model.model.norm.weight.zero_()
        assert not steps.decode([5], cache.packing([1])).hidden.any()
        model.model.norm.weight.fill_(1)
        for _ in range(20):
            steps.decode([5], cache.packing([1]))
        other = Cache(TINY, 1, like=model.lm_head.weight, chunk=32)
        model.features(ids.expand(25), other.packing([25]), cache=other)
        found = steps.decode([5], cache.packing([1])).hidden
        again = model.features(ids, other.packing([1]), cache=other).hidden_NH
    assert all(steps._steps.values())
    torch.testing.assert_close(found, again, rtol=1e-5, atol=1e-5)


def test_models_that_cannot_be_recorded_run_as_they_are(impatient: None) -> None:
    class Scaled(torch.nn.Module):
        """What an adapter puts around a layer."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 0.5

    model = model_of(TINY)
    layer = model.model.layers[1].self_attn
    layer.o_proj = Scaled(layer.o_proj)
    recorded = model.generate([[1, 2, 3]], max_new_tokens=20, stop_ids=())
    with patch.object(stepper, "MOST_TOKENS", 0):
        assert recorded.token_ids == model.generate([[1, 2, 3]], max_new_tokens=20,
                                                    stop_ids=()).token_ids  # fmt: skip


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_generator_serves_one_generation_after_another(drafts: int, impatient: None) -> None:
    model = model_of(TINY)
    generator = Generator(model, batch=2, context=40, drafts=drafts, chunk=4)
    # the third needs more room than there is
    for prompts, count in (
        ([[1, 2, 3], [4]], 20),
        ([[9, 8], [7, 6, 5, 4, 3]], 30),
        ([[5], [6]], 60),
    ):
        found = generator(prompts, max_new_tokens=count, stop_ids=())
        expected = model.generate(
            prompts, max_new_tokens=count, drafts=drafts, chunk=4, stop_ids=()
        )
        assert found.token_ids == expected.token_ids
        assert found.statistics.accepted_at == expected.statistics.accepted_at
    with patch.object(model, "features", wraps=model.features) as features:
        generator([[1, 2], [3, 4]], max_new_tokens=30, stop_ids=())
    # the prompts; with drafts, steps whose rows end apart too
    assert features.call_count <= 1


def test_a_generator_takes_its_number_of_prompts() -> None:
    generator = Generator(model_of(TINY), batch=2, context=8)
    with pytest.raises(ValueError, match="takes 2 prompts, got 1"):
        generator([[1]])
    with pytest.raises(ValueError, match="drafts must lie in"):
        Generator(model_of(TINY), batch=2, context=8, drafts=5)
