"""Text generation for a batch of prompts: an engine that takes them all and runs to the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .engine import MAX_DRAFTS, Counters, Drafts, Engine, check_drafts, check_request
from .sampling import Sampling
from .transformer import KExaone

__all__ = ["MAX_DRAFTS", "Generation", "Generator", "Statistics", "generate"]


@dataclass(frozen=True)
class Statistics:
    """What a generation did. `accepted_at[i]` counts steps whose draft i+1 stood."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    drafted: int
    accepted_at: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)

    @property
    def acceptance(self) -> float:
        """Share of drafts that stood."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding; the first of each sequence comes from its prefill."""
        decoded = self.new_tokens - self.sequences
        return decoded / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """New tokens of each prompt (a stop token, if one came, is the last) and the statistics."""

    token_ids: list[list[int]]
    statistics: Statistics


def generate(
    model: KExaone,
    prompts: Tensor | list[list[int]],
    *,
    max_new_tokens: int = 64,
    drafts: Drafts = 0,
    sampling: Sampling | None = None,
    stop_ids: tuple[int, ...] | None = None,
    chunk: int = 512,
    on_tokens: Callable[[list[list[int]]], object] | None = None,
) -> Generation:
    """Continue each prompt.

    Args:
        prompts: int64 [B, T], or one list of token ids per prompt; lengths may differ.
        max_new_tokens: most tokens to add to each prompt.
        drafts: MTP drafts per step, 0 (plain decoding) to 4, or "auto": as many as pay off here.
            The text does not depend on it, unless two candidates lie closer than the rounding
            error of the model's dtype.
        sampling: how tokens are chosen; greedy if None. Prompts of one call get noise of their own.
        stop_ids: tokens that end a sequence; the config's eos tokens if None.
        chunk: most prompt tokens per sequence and forward pass.
        on_tokens: called after each step with the new tokens of each prompt; the generation ends
            where it returns True.

    Raises:
        ValueError: on an empty prompt, a token outside the vocabulary, a context too long for
            the model, drafts without an MTP block, or logits that are NaN or infinite.
    """
    lists = _as_lists(prompts)
    check_request(model, lists, max_new_tokens)
    check_drafts(model, drafts)
    longest = max(map(len, lists))
    generator = Generator(
        model,
        batch=len(lists),
        context=longest + max_new_tokens,
        drafts=drafts,
        chunk=min(chunk, longest),
    )
    return generator(
        lists, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids,
        on_tokens=on_tokens,
    )  # fmt: skip


class Generator:
    """Caches and recorded steps that serve one generation after another.

    What `generate` sets up anew in every call: with many calls of the same kind, steps that were
    recorded in one run again in the next. Do not move the model while it lives.
    """

    def __init__(
        self, model: KExaone, *, batch: int, context: int, drafts: Drafts = 0, chunk: int = 512
    ) -> None:
        """Room for `batch` prompts of `context` tokens each, the new ones included; it can grow.

        Raises:
            ValueError: `drafts` is out of range or the model has no MTP block for them, or batch
                or chunk is not positive.
        """
        self.engine = Engine(
            model, slots=batch, context=context, drafts=drafts, chunk=chunk, together=True
        )
        self.batch = batch

    def __call__(
        self,
        prompts: Tensor | list[list[int]],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop_ids: tuple[int, ...] | None = None,
        on_tokens: Callable[[list[list[int]]], object] | None = None,
    ) -> Generation:
        """Continue each of `batch` prompts; arguments and errors as for `generate`."""
        engine, lists = self.engine, _as_lists(prompts)
        check_request(engine.model, lists, max_new_tokens)
        if len(lists) != self.batch:
            raise ValueError(f"this generator takes {self.batch} prompts, got {len(lists)}")
        engine.reserve(max(map(len, lists)) + max_new_tokens)
        engine.counters = Counters(accepted_at=[0] * engine.drafting.most)
        requests = [
            engine.submit(prompt, max_new_tokens=max_new_tokens, sampling=sampling,
                          stop_ids=stop_ids, stream=i)
            for i, prompt in enumerate(lists)
        ]  # fmt: skip
        try:
            while engine.busy:
                new = engine.step()
                if error := next((r.error for r in requests if r.error), None):
                    raise ValueError(error)
                rows = [new.get(request, []) for request in requests]
                if new and on_tokens is not None and on_tokens(rows) is True:
                    break
        finally:
            for request in requests:
                request.cancel()
        return Generation([r.token_ids for r in requests], self._statistics(lists, requests))

    def _statistics(self, prompts: list[list[int]], requests: list) -> Statistics:
        counters = self.engine.counters
        return Statistics(
            sequences=len(prompts),
            prompt_tokens=sum(map(len, prompts)),
            new_tokens=sum(len(r.token_ids) for r in requests),
            steps=counters.steps,
            drafted=counters.drafted,
            accepted_at=tuple(counters.accepted_at),
            prefill_seconds=counters.prefill_seconds,
            decode_seconds=counters.decode_seconds,
        )


def _as_lists(prompts: Tensor | list[list[int]]) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            raise ValueError(f"prompts must be integers [B, T], got {tuple(prompts.shape)}")
        return prompts.tolist()
    return [list(p) for p in prompts]
