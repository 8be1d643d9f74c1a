"""The engine: requests that join, leave and fail must not be able to tell whether they are alone.

Models run in float64 where texts are compared, for the reason that test_generation.py gives.
"""

from __future__ import annotations

import random
import resource
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import configs, random_model, small_config
from test_generation import counting_model, mtp_windows, ragged_prompts, seeds, with_drafter

from kexaone import KExaone
from kexaone.model import drafting, engine, stepper
from kexaone.model.cache import cache_bytes
from kexaone.model.drafting import Drafting
from kexaone.model.engine import Engine
from kexaone.model.generation import generate
from kexaone.model.requests import Request
from kexaone.model.sampling import Sampling

EXAMPLES = settings(max_examples=25, deadline=None)
SETTINGS = [
    Sampling(),
    Sampling(presence_penalty=0.8),
    Sampling(temperature=1.2, seed=4),
    Sampling(temperature=0.8, top_k=3, seed=5),
    Sampling(temperature=1.0, top_p=0.9, presence_penalty=-0.5, seed=6),
]


def alone(model: KExaone, request: Request) -> list[int]:
    found = generate(
        model, [request.prompt], max_new_tokens=request.max_new_tokens,
        sampling=request.sampling, stop_ids=tuple(request.stop_ids),
    )  # fmt: skip
    return found.token_ids[0]


@EXAMPLES
@given(
    st.data(), st.tuples(configs(), mtp_windows), seeds, st.sampled_from([0, 1, 3, "auto"]),
    st.integers(1, 3), st.integers(1, 9),
)  # fmt: skip
def test_every_request_gets_the_text_it_gets_alone(data, drawn, seed, drafts, slots, chunk):
    model = random_model(with_drafter(*drawn), seed=seed).double()
    serving = Engine(model, slots=slots, context=60, drafts=drafts, chunk=chunk)
    kept, cancelled = [], []
    for prompts in data.draw(st.lists(ragged_prompts, min_size=1, max_size=3)):
        for prompt in prompts:
            request = serving.submit(
                prompt,
                max_new_tokens=data.draw(st.integers(1, 30)),
                sampling=data.draw(st.sampled_from(SETTINGS)),
                stop_ids=data.draw(st.sampled_from([(), (0,)])),
            )
            (cancelled if data.draw(st.integers(0, 4)) == 0 else kept).append(request)
        for _ in range(data.draw(st.integers(0, 12))):
            serving.step()
        for request in cancelled:
            request.cancel()
    serving.run()
    for request in kept:
        assert request.token_ids == alone(model, request)
        stopped = request.token_ids[-1] in request.stop_ids
        assert request.finished == ("stop" if stopped else "length")
    for request in cancelled:
        whole = alone(model, request)
        assert request.token_ids == whole[: len(request.token_ids)]
        assert request.finished == "cancelled" or request.token_ids == whole
    assert sorted(serving._free) == list(range(slots)) and not serving.busy


def test_recorded_steps_serve_changing_batches():
    """In float32, where steps are recorded; the next token is far ahead of all others."""
    model = counting_model()
    with (
        patch.object(stepper, "PATIENCE", 1),
        patch("kexaone.kernels.dispatch.LAUNCH_BOUND", -1),
    ):
        serving = Engine(model, slots=3, context=40, drafts=2, chunk=8)
        requests = [
            serving.submit([start] * (1 + start), max_new_tokens=3 + 2 * start, stop_ids=())
            for start in range(12)
        ]
        serving.run()
    for start, request in enumerate(requests):
        assert request.token_ids == list(range(start + 1, 3 * start + 4))
    assert any(serving.stepper._steps.values())


def test_streaming_tells_every_token_once():
    model = counting_model()
    told: dict[int, list[list[int]]] = {4: [], 7: []}
    serving = Engine(model, slots=2, context=30, drafts=3)
    requests = [
        serving.submit([t], max_new_tokens=9, stop_ids=(15,), on_tokens=told[t].append)
        for t in told
    ]
    serving.run()
    for (start, parts), request in zip(told.items(), requests, strict=True):
        assert all(parts) and [t for part in parts for t in part] == request.token_ids
        assert request.token_ids == list(range(start + 1, min(start + 10, 16)))
        assert request.finished == ("length" if start == 4 else "stop")


def test_prompts_and_writing_take_turns():
    """A long prompt holds up nobody for more than one chunk, and is itself not held up."""
    model = counting_model()
    serving = Engine(model, slots=2, context=60, chunk=4)
    writing = serving.submit([1], max_new_tokens=30, stop_ids=())
    serving.step()
    long = serving.submit([2] * 40, max_new_tokens=5, stop_ids=())
    for turn in range(1, 11):
        for _ in range(2):
            serving.step()
        assert len(writing.token_ids) == 1 + turn
    assert len(long.token_ids) == 1


@pytest.mark.parametrize("waiting", [False, True])
def test_a_callback_may_cancel(waiting):
    model = counting_model()
    serving = Engine(model, slots=1 if waiting else 2, context=30)
    other = serving.submit([3], max_new_tokens=12, stop_ids=())

    def enough(_: list[int]) -> None:
        if len(first.token_ids) == 4:
            first.cancel()
            other.cancel()

    first = serving.submit([1], max_new_tokens=20, stop_ids=(), on_tokens=enough)
    serving.run()
    assert first.token_ids == [2, 3, 4, 5] and first.finished == "cancelled"
    assert other.finished == ("length" if waiting else "cancelled")


def test_what_does_not_fit_is_refused_and_nobody_else_notices():
    model = counting_model()
    serving = Engine(model, slots=1, context=20)
    fits = serving.submit([1] * 10, max_new_tokens=10, stop_ids=())
    for prompt, count, words in (
        ([1] * 11, 10, "need a context of 21, this engine has room for 20 per request"),
        ([1] * 60, 10, "need a context of 70, the model has 64"),
        ([], 3, "at least one token"),
        ([61], 3, "token 61 is outside"),
        ([1], 0, "max_new_tokens must be >= 1"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            serving.submit(prompt, max_new_tokens=count)
        assert "\n" not in str(caught.value)
    serving.run()
    assert fits.token_ids == list(range(2, 12))


def test_memory_is_planned():
    model = counting_model()
    each = cache_bytes(model.config, 32, chunk=8, drafts=2, itemsize=4)["total"]
    serving = Engine(model, slots=9, context=30, drafts=2, chunk=8, memory=3 * each + 1)
    before = serving.cache.nbytes
    assert before == 3 * each and len(serving._free) == 3
    for start in range(8):
        serving.submit([start] * 10, max_new_tokens=20, stop_ids=())
    serving.run()
    assert serving.cache.nbytes == before
    with pytest.raises(ValueError, match="a request of 30 tokens takes"):
        Engine(model, context=30, drafts=2, chunk=8, memory=each - 1)


def test_logits_that_overflow_end_one_request():
    model = counting_model()
    with torch.no_grad():
        model.lm_head.weight[40] = torch.finfo(torch.float32).max
        # only the state of token 9 reaches that row
        model.lm_head.weight[40, :9] = model.lm_head.weight[40, 10:] = 0
    serving = Engine(model, slots=2, context=30)
    fails = serving.submit([5], max_new_tokens=9, stop_ids=())
    other = serving.submit([20], max_new_tokens=9, stop_ids=())
    serving.run()
    assert fails.finished == "failed" and "overflow float32" in (fails.error or "")
    assert fails.token_ids == [6, 7, 8, 9]
    assert other.token_ids == list(range(21, 30)) and other.error is None


def cost(count: int) -> float:
    """Half a step per draft."""
    return 1 + count / 2


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.82, 0.95])
def test_drafts_are_as_many_as_pay_off(chance):
    """What 3000 steps make per time, by expectation, against the best constant number of drafts."""
    chooser, random_ = Drafting(4, adaptive=True), random.Random(0)
    used = []
    for _ in range(3000):
        count = chooser.choose(1)
        used.append(count)
        stood = next((i for i in range(count) if random_.random() >= chance), count)
        chooser.record(1, count, cost(count), [stood])
    made = [sum(chance**i for i in range(n + 1)) for n in range(5)]
    rates = [made[n] / cost(n) for n in range(5)]
    # a hundred steps tell a chance to within 0.05, which in these rates is less than 0.05
    assert sum(made[n] for n in used) / sum(map(cost, used)) >= 0.95 * max(rates)
    if max(rates) == 1:
        assert sum(n > 0 for n in used[500:]) <= (2500 // drafting.AGAIN + 1) * drafting.BURST


def test_adaptive_drafts_do_not_change_a_text():
    model = random_model(with_drafter(small_config())).double()
    prompts = [[1, 2, 3], [4]]
    expected = generate(model, prompts, max_new_tokens=120).token_ids
    with patch.object(drafting, "AGAIN", 7), patch.object(engine, "MOST_CARRY", 5):
        found = generate(model, prompts, max_new_tokens=120, drafts="auto")
    assert found.token_ids == expected and found.statistics.drafted


@pytest.mark.slow
def test_two_hundred_requests_keep_no_memory():
    model = random_model(small_config(hidden_size=64)).eval()
    draw = random.Random(0)
    serving = Engine(model, slots=4, context=300, drafts=2)

    def serve(count: int) -> int:
        for _ in range(count):
            prompt = [draw.randrange(61) for _ in range(draw.randint(1, 200))]
            serving.submit(prompt, max_new_tokens=draw.randint(1, 99), stop_ids=())
        serving.run()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    after = serve(20)
    assert serve(180) <= 1.02 * after
