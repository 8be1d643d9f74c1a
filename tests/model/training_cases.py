"""Tiny models and trainers for the tests beside it, and all of a trainer's state to compare."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kexaone import Config, KExaone
from kexaone.model.data import Windows
from kexaone.model.trainer import Trainer, TrainSettings

TINY = Config(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    windows=(4, 0, 4),
    mtp_steps=2,
    bos_token_id=None,
    eos_token_ids=(),
    pad_token_id=None,
    initializer_range=0.3,  # at this width the default leaves every logit near 0
)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Sums over another number of threads have other bits, and tiny ops gain nothing by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@st.composite
def variants(draw: st.DrawFn) -> Config:
    layers = draw(st.integers(1, 3))
    mtp_windows = draw(st.sampled_from([(), (0,), (0, 4)]))
    return dataclasses.replace(
        TINY,
        windows=draw(st.sampled_from([(4,), (0,), (4, 0)])) * layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_shared_experts=draw(st.integers(0, 2)),
        mtp_windows=mtp_windows,
        mtp_steps=draw(st.integers(1, 3)) if mtp_windows else 0,
        tie_word_embeddings=draw(st.booleans()),
    )


class Recorded(Windows):
    """Windows that remember which batches were asked for."""

    def __init__(self, tokens: Tensor, length: int, *, seed: int = 0) -> None:
        super().__init__(tokens, length, seed=seed)
        self.asked: list[int] = []

    def batch(self, index: int, batch_size: int) -> Tensor:
        self.asked.append(index)
        return super().batch(index, batch_size)


def windows(*, seed: int = 0, length: int = 8) -> Recorded:
    """Seven windows of random tokens, so that a few steps pass the end of an epoch."""
    tokens = torch.randint(0, 32, (7 * 8 + 3,), generator=torch.Generator().manual_seed(1))
    return Recorded(tokens, length, seed=seed)


def new_trainer(
    config: Config = TINY, *, dtype: torch.dtype = torch.float32, **options: Any
) -> Trainer:
    torch.manual_seed(5)
    values = {
        "steps": 5,
        "batch_size": 2,
        "sequence_length": 8,
        "warmup": 2,
        "learning_rate": 0.02,
    }
    return Trainer(KExaone(config).to(dtype), windows(), TrainSettings(**values | options))


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of everything that decides how training goes on."""
    parts = {"rng": torch.get_rng_state(), "step": torch.tensor(trainer.steps_done)}
    parts |= {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    parts |= {f"optimizer.{k}": v for k, v in trainer.optimizer.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in parts.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
