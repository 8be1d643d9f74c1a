"""Text generation: chunked prefill, decoding, and self-speculation with the MTP block.

Drafting and verifying follow EAGLE-style chains: the MTP block proposes tokens from the decoder's
last hidden state and then from its own output, the decoder checks them all in one pass.
Plain decoding is the same loop with no drafts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Cache
from .sampling import Sampling, draw, verify
from .stepper import Stepper
from .transformer import KExaone

# as many as the largest of the released models was trained for; more are hardly ever accepted
MAX_DRAFTS = 4


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
    drafts: int = 0,
    sampling: Sampling | None = None,
    stop_ids: tuple[int, ...] | None = None,
    chunk: int = 512,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
) -> Generation:
    """Continue each prompt.

    Args:
        prompts: int64 [B, T], or one list of token ids per prompt; lengths may differ.
        max_new_tokens: most tokens to add to each prompt.
        drafts: MTP drafts per step, 0 (plain decoding) to 4. Greedy output does not depend on it,
            unless two logits lie closer than the rounding error of the model's dtype; sampled
            output keeps its distribution.
        sampling: how tokens are chosen; greedy if None.
        stop_ids: tokens that end a sequence; the config's eos tokens if None.
        chunk: most prompt tokens per forward pass.
        on_tokens: called after each step with the new tokens of each prompt.

    Raises:
        ValueError: on an empty prompt, a token outside the vocabulary, a context too long for
            the model, drafts without an MTP block, or logits that are NaN or infinite.
    """
    lists = _as_lists(prompts)
    _check(model, lists, max_new_tokens, drafts)
    longest = max(map(len, lists))
    generator = Generator(
        model,
        batch=len(lists),
        context=longest + max_new_tokens,
        drafts=drafts,
        chunk=min(chunk, longest),
    )
    return generator._continue(lists, max_new_tokens, sampling or Sampling(), stop_ids, on_tokens)


class Generator:
    """Caches and recorded steps that serve one generation after another.

    What `generate` sets up anew in every call: with many calls of the same kind, steps that were
    recorded in one run again in the next. Do not move the model while it lives.
    """

    def __init__(
        self, model: KExaone, *, batch: int, context: int, drafts: int = 0, chunk: int = 512
    ) -> None:
        """Room for `batch` prompts of `context` tokens each, the new ones included; it can grow.

        Raises:
            ValueError: `drafts` is out of range or the model has no MTP block for them, or batch
                or chunk is not positive.
        """
        _check_drafts(model, drafts)
        like = model.model.norm.weight.detach()
        self.model, self.drafts = model, drafts
        self.cache = Cache(model.config, batch, like=like, chunk=chunk, drafts=drafts)
        self.cache.reserve(context)
        self.stepper = Stepper(model, self.cache)

    def __call__(
        self,
        prompts: Tensor | list[list[int]],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop_ids: tuple[int, ...] | None = None,
        on_tokens: Callable[[list[list[int]]], None] | None = None,
    ) -> Generation:
        """Continue each of `batch` prompts; arguments and errors as for `generate`."""
        lists = _as_lists(prompts)
        _check(self.model, lists, max_new_tokens, self.drafts)
        if len(lists) != len(self.cache.lengths):
            raise ValueError(
                f"this generator takes {len(self.cache.lengths)} prompts, got {len(lists)}"
            )
        return self._continue(lists, max_new_tokens, sampling or Sampling(), stop_ids, on_tokens)

    def _continue(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: tuple[int, ...] | None,
        on_tokens: Callable[[list[list[int]]], None] | None,
    ) -> Generation:
        stop = frozenset(self.model.config.eos_token_ids if stop_ids is None else stop_ids)
        with torch.inference_mode():
            self.cache.clear()
            self.cache.reserve(max(map(len, prompts)) + max_new_tokens)
            run = _Run(self, prompts, max_new_tokens, sampling)
            for new in run.steps(stop):
                if on_tokens is not None:
                    on_tokens(new)
        return Generation(run.outputs, run.statistics())


def _as_lists(prompts: Tensor | list[list[int]]) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            raise ValueError(f"prompts must be integers [B, T], got {tuple(prompts.shape)}")
        return prompts.tolist()
    return [list(p) for p in prompts]


def _check(model: KExaone, prompts: list[list[int]], max_new: int, drafts: int) -> None:
    cfg = model.config
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new}")
    _check_drafts(model, drafts)
    for prompt in prompts:
        if not (min(prompt) >= 0 and max(prompt) < cfg.vocab_size):
            wrong = next(t for t in prompt if not 0 <= t < cfg.vocab_size)
            raise ValueError(f"token {wrong} is outside the vocabulary of {cfg.vocab_size}")
    needed = max(map(len, prompts)) + max_new
    if needed > cfg.max_position_embeddings:
        raise ValueError(
            f"prompt and new tokens need a context of {needed}, the model has "
            f"{cfg.max_position_embeddings}"
        )


def _check_drafts(model: KExaone, drafts: int) -> None:
    if not 0 <= drafts <= MAX_DRAFTS:
        raise ValueError(f"drafts must lie in 0..{MAX_DRAFTS}, got {drafts}")
    if drafts and model.mtp is None:
        raise ValueError("drafts need an MTP block, and this model has none: use drafts=0")


class _Run:
    """State of one generation. Row b of the batch is done once `active[b]` is false."""

    def __init__(
        self,
        generator: Generator,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> None:
        self.model, self.prompts, self.sampling = generator.model, prompts, sampling
        self.max_new_tokens, self.drafts = max_new_tokens, generator.drafts
        self.cache, self.stepper = generator.cache, generator.stepper
        self.device = self.model.model.norm.weight.device
        self.generator = sampling.generator(self.device)
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.active = [True] * len(prompts)
        vocabulary = self.model.config.vocab_size
        self.seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=self.device)
        self.step_count = self.drafted = 0
        self.accepted_at = [0] * self.drafts
        self.prefill_seconds = self.decode_seconds = 0.0

    def statistics(self) -> Statistics:
        return Statistics(
            sequences=len(self.prompts),
            prompt_tokens=sum(map(len, self.prompts)),
            new_tokens=sum(map(len, self.outputs)),
            steps=self.step_count,
            drafted=self.drafted,
            accepted_at=tuple(self.accepted_at),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
        )

    def steps(self, stop: frozenset[int]) -> Iterator[list[list[int]]]:
        """Run to the end; yields the new tokens of every row after each step."""
        start = time.perf_counter()
        hidden = self._prefill()
        rows = list(range(len(self.prompts)))
        first = draw(self._probabilities(self.model.lm_head(hidden), rows), self.generator)
        self.prefill_seconds = time.perf_counter() - start
        new = self._emit(dict(zip(rows, ([t] for t in first.tolist()), strict=True)), stop)
        yield new
        # per row, hidden states that the MTP block has not seen, each with its next token
        carry = {b: hidden[b : b + 1] for b in rows}
        while any(self.active):
            start = time.perf_counter()
            carry, found = self._step(carry, new)
            new = self._emit(found, stop)
            self.decode_seconds += time.perf_counter() - start
            yield new

    def _emit(self, found: dict[int, list[int]], stop: frozenset[int]) -> list[list[int]]:
        """Append each row's tokens up to its stop token or limit; returns what was appended."""
        new: list[list[int]] = [[] for _ in self.prompts]
        for b, tokens in found.items():
            tokens = tokens[: self.max_new_tokens - len(self.outputs[b])]
            end = next((i for i, t in enumerate(tokens) if t in stop), None)
            new[b] = tokens if end is None else tokens[: end + 1]
            self.outputs[b] += new[b]
            self.seen[b, new[b]] = True
            self.active[b] = end is None and len(self.outputs[b]) < self.max_new_tokens
        return new

    def _tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self.device)

    def _probabilities(
        self, logits: Tensor, rows: list[int], extra: Tensor | None = None
    ) -> Tensor:
        """Distributions for logits [R, V], after the drafts `extra` [R, n] if given."""
        if not logits.isfinite().all():
            kind = str(logits.dtype).removeprefix("torch.")
            raise ValueError(f"the model's logits overflow {kind}: a wider dtype may help")
        if not self.sampling.presence_penalty:
            return self.sampling.probabilities(logits)
        seen = self.seen[rows]
        if extra is not None:
            seen = seen.scatter(1, extra, True)
        return self.sampling.probabilities(logits, seen)

    def _prefill(self) -> Tensor:
        """Feed all prompts; returns the hidden state of each one's last token, [B, H]."""
        last: dict[int, Tensor] = {}
        chunk = self.cache.chunk
        for offset in range(0, max(map(len, self.prompts)), chunk):
            pieces = [p[offset : offset + chunk] for p in self.prompts]
            packing = self.cache.packing([len(p) for p in pieces])
            ids = self._tensor([t for p in pieces for t in p])
            hidden = self.stepper.features(ids, packing)
            parts = list(hidden.split(packing.lengths))
            for b, (prompt, part) in enumerate(zip(self.prompts, parts, strict=True)):
                if offset < len(prompt) <= offset + chunk:
                    last[b] = part[-1]
                    parts[b] = part[:-1]
            if self.drafts:
                followers = [
                    p[offset + 1 : offset + 1 + len(x)]
                    for p, x in zip(self.prompts, parts, strict=True)
                ]
                self._feed_mtp(parts, followers)
        return torch.stack([last[b] for b in range(len(self.prompts))])

    def _feed_mtp(self, hidden: list[Tensor], followers: list[list[int]]) -> Tensor | None:
        """Give the MTP block decoder states with their next tokens; [N, H] or None if none."""
        packing = self.cache.packing([len(f) for f in followers], mtp=True)
        if not packing.total:
            return None
        ids = self._tensor([t for f in followers for t in f])
        return self.stepper.predict_further(torch.cat(hidden), ids, packing)

    def _step(
        self, carry: dict[int, Tensor], latest: list[list[int]]
    ) -> tuple[dict[int, Tensor], dict[int, list[int]]]:
        """Draft, verify, roll back. Returns the new carry and each active row's new tokens."""
        rows = [b for b, on in enumerate(self.active) if on]
        room = min(self.max_new_tokens - len(self.outputs[b]) for b in rows) - 1
        count = min(self.drafts, room)
        pending = self._tensor([latest[b][-1] for b in rows])
        drafts, proposed = self._draft(carry, latest, rows, count)

        held = list(self.cache.lengths)
        inputs = torch.cat((pending[:, None], drafts), 1)
        lengths = [count + 1 if on else 0 for on in self.active]
        packing = self.cache.packing(lengths)
        hidden = self.stepper.features(inputs.flatten(), packing).view(len(rows), count + 1, -1)
        logits = self.model.lm_head(hidden)
        target = torch.stack(
            [self._probabilities(logits[:, i], rows, drafts[:, :i]) for i in range(count + 1)], 1
        )
        verdict = verify(target, proposed, drafts, self.generator)

        accepted, following = verdict.accepted.tolist(), verdict.following.tolist()
        found, kept = {}, {}
        for r, (b, tokens) in enumerate(zip(rows, drafts.tolist(), strict=True)):
            stood = accepted[r]
            found[b] = [*tokens[:stood], following[r]]
            kept[b] = hidden[r, : stood + 1]
            held[b] += stood + 1
            for i in range(stood):
                self.accepted_at[i] += 1
        self.cache.truncate(held)
        self.step_count += 1
        self.drafted += count * len(rows)
        return kept, found

    def _draft(
        self, carry: dict[int, Tensor], latest: list[list[int]], rows: list[int], count: int
    ) -> tuple[Tensor, Tensor]:
        """Draw `count` drafts per row: tokens [R, count] and their distributions [R, count, V]."""
        drafts = torch.empty(len(rows), 0, dtype=torch.int64, device=self.device)
        distributions: list[Tensor] = []
        if self.drafts:
            width = self.model.config.hidden_size
            nothing = self.seen.new_empty(0, width, dtype=self.model.model.norm.weight.dtype)
            everyone = range(len(self.prompts))
            output = self._feed_mtp(
                [carry[b] if self.active[b] else nothing for b in everyone],
                [latest[b] if self.active[b] else [] for b in everyone],
            )
            assert output is not None
            real = list(self.cache.mtp_lengths)
            ends = torch.tensor([len(latest[b]) for b in rows], device=self.device).cumsum(0) - 1
            output = output[ends]
            for step in range(count):
                if step:
                    packing = self.cache.packing([int(on) for on in self.active], mtp=True)
                    output = self.stepper.predict_further(output, drafts[:, -1], packing, step=step)
                logits = self.model.lm_head(output)
                distributions.append(self._probabilities(logits, rows, drafts))
                drafts = torch.cat((drafts, draw(distributions[-1], self.generator)[:, None]), 1)
            self.cache.truncate(real, mtp=True)
        empty = torch.zeros(len(rows), 0, self.model.config.vocab_size, device=self.device)
        return drafts, torch.stack(distributions, 1) if distributions else empty
