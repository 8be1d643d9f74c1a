"""Continuous batching: requests join and leave between steps, on caches of fixed size.

Every forward pass is either a piece of waiting prompts or one step of all sequences that are
being written; while there are both, they take turns (Sarathi-Serve, arXiv 2403.02310, bounds the
wait for a prompt in the same way). A decoding step may check drafts of the MTP block, which are
greedy: a draft stands where it is the very token that is chosen there, so a text depends on
neither drafts nor neighbours (up to rounding, where two candidates score alike).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from .cache import Cache, cache_bytes
from .choosing import Chooser
from .drafting import Drafting
from .packing import Packing
from .requests import Request
from .sampling import Sampling
from .stepper import Stepper
from .transformer import KExaone

# as many as the largest of the released models was trained for; more are hardly ever accepted
MAX_DRAFTS = 4
MOST_CARRY = 64
"""States that plain steps keep for the MTP block before it is given them."""

Drafts = int | Literal["auto"]


@dataclass(eq=False)
class _Row:
    """A request in its place. `carry` are decoder states that the MTP block has not seen.

    Behind each of them stands its next token. Only the first `valid` are of the text; the others
    were computed for drafts that fell.
    """

    request: Request
    slot: int
    fed: int = 0
    carry: Tensor | None = None
    followers: list[int] = field(default_factory=list)
    valid: int = 0


@dataclass
class Counters:
    """What an engine has done; `accepted_at[i]` counts steps whose draft i+1 stood."""

    steps: int = 0
    drafted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Engine:
    """Generates for many requests at once. Not to be used from several threads.

    The caches are allocated here and never grow. Do not move the model while an engine lives.
    """

    def __init__(
        self,
        model: KExaone,
        *,
        slots: int = 8,
        context: int = 4096,
        drafts: Drafts = 0,
        chunk: int = 512,
        memory: int | None = None,
        together: bool = False,
    ) -> None:
        """Room for `slots` requests at once, of `context` tokens each, the new ones included.

        Args:
            drafts: MTP drafts per step, 0 (plain decoding) to 4, or "auto": as many as pay off.
            chunk: most prompt tokens in one pass.
            memory: most bytes that caches may take; fewer slots if they would take more.
            together: whether `chunk` holds for each prompt instead of all in a pass.

        Raises:
            ValueError: a value is out of range, the model has no MTP block for drafts, or `memory`
                does not hold a single request.
        """
        most = check_drafts(model, drafts)
        like = model.model.norm.weight.detach()
        if memory is not None:
            each = cache_bytes(model.config, context + most, chunk=chunk, drafts=most,
                               itemsize=like.itemsize)["total"]  # fmt: skip
            slots = min(slots, memory // each)
            if slots < 1:
                raise ValueError(
                    f"a request of {context} tokens takes {each:,} bytes of cache, the limit is "
                    f"{memory:,}"
                )
        self.model, self.chunk, self.context = model, chunk, context
        self.cache = Cache(model.config, slots, like=like, chunk=chunk, drafts=most)
        self.stepper = Stepper(model, self.cache)
        self.drafting = Drafting(most, adaptive=drafts == "auto")
        self.reserve(context)
        self.counters = Counters(accepted_at=[0] * most)
        self._together = together
        self._chooser = Chooser(slots, model.config.vocab_size, like.device)
        self._waiting: deque[Request] = deque()
        self._rows: list[_Row] = []
        self._free = list(reversed(range(slots)))
        self._read_last = False

    def reserve(self, context: int) -> None:
        """Make room for requests of so many tokens, where there is less."""
        self.context = max(self.context, context)
        # a step's last drafts may lie beyond the end
        self.cache.reserve(self.context + self.drafting.most)

    def submit(
        self,
        prompt: list[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop_ids: tuple[int, ...] | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
        stream: int = 0,
    ) -> Request:
        """Queue a prompt.

        Args:
            stop_ids: tokens that end it; the config's eos tokens if None.
            on_tokens: called after each step that brought it tokens, with those.
            stream: sets apart prompts that share one seed.

        Raises:
            ValueError: the prompt is empty, a token outside the vocabulary, or the context too
                long for the model or this engine.
        """
        check_request(self.model, [prompt], max_new_tokens)
        needed = len(prompt) + max_new_tokens
        if needed > self.context:
            raise ValueError(
                f"prompt and new tokens need a context of {needed}, this engine has room for "
                f"{self.context} per request"
            )
        stop = self.model.config.eos_token_ids if stop_ids is None else stop_ids
        request = Request(list(prompt), max_new_tokens, sampling or Sampling(), frozenset(stop),
                          stream, on_tokens)  # fmt: skip
        self._waiting.append(request)
        return request

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._rows)

    def run(self) -> None:
        """Step until all requests are finished."""
        while self.busy:
            self.step()

    def step(self) -> dict[Request, list[int]]:
        """One forward pass; returns the new tokens of each request that got some."""
        with torch.inference_mode():
            self._leave()
            self._admit()
            reading = [row for row in self._rows if row.fed < len(row.request.prompt)]
            writing = [row for row in self._rows if row.fed == len(row.request.prompt)]
            start = time.perf_counter()
            new: dict[Request, list[int]] = {}
            if reading and not (writing and self._read_last):
                new = self._read(reading)
                self.counters.prefill_seconds += time.perf_counter() - start
                self._read_last = True
            elif writing:
                new = self._write(writing)
                self.counters.decode_seconds += time.perf_counter() - start
                self._read_last = False
            self._leave()
        for request, tokens in new.items():
            if request.on_tokens is not None:
                request.on_tokens(tokens)
        return new

    def _leave(self) -> None:
        """Give back the places of finished and cancelled requests."""
        gone = [row for row in self._rows if row.request.finished]
        if gone:
            self._free += [row.slot for row in reversed(gone)]
            self._rows = [row for row in self._rows if not row.request.finished]

    def _admit(self) -> None:
        while self._waiting and self._free:
            request = self._waiting.popleft()
            if request.finished is None:
                row = _Row(request, self._free.pop())
                self.cache.restart(row.slot)
                self._chooser.restart(row.slot)
                self._rows.append(row)
        if self._waiting and not self._free:
            # nobody need wait for a place to learn that it was cancelled
            self._waiting = deque(r for r in self._waiting if r.finished is None)

    def _packing(self, counts: dict[int, int], starts: list[int]) -> Packing:
        lengths = [counts.get(slot, 0) for slot in range(len(starts))]
        return Packing(tuple(lengths), tuple(starts), self.cache.layers[0].keys.device)

    def _read(self, rows: list[_Row]) -> dict[Request, list[int]]:
        """Feed pieces of prompts; the first token of each that ends."""
        left, pieces = self.chunk, {}
        for row in rows:
            size = self.chunk if self._together else left
            piece = row.request.prompt[row.fed : row.fed + size]
            left -= len(piece)
            if piece:
                pieces[row.slot] = row, piece
        pieces = dict(sorted(pieces.items()))
        packing = self._packing({s: len(p) for s, (_, p) in pieces.items()}, self.cache.lengths)
        device = packing.device
        ids = torch.tensor([t for _, p in pieces.values() for t in p], device=device)
        hidden = self.stepper.features(ids, packing)
        parts = hidden.split([len(p) for _, p in pieces.values()])
        done = []
        for (row, piece), part in zip(pieces.values(), parts, strict=True):
            row.fed += len(piece)
            ended = row.fed == len(row.request.prompt)
            row.carry, row.valid = part, len(part)
            row.followers = row.request.prompt[row.fed - len(piece) + 1 : row.fed + 1]
            if ended:
                done.append((row, part[-1]))
                row.valid -= 1
        self._show([row for row, _ in pieces.values()])
        return self._first([row for row, _ in done], [state for _, state in done])

    def _show(self, rows: list[_Row]) -> None:
        """Give the MTP block what it has not seen of these sequences."""
        rows = sorted((row for row in rows if row.valid), key=lambda row: row.slot)
        if rows and self.drafting.most:
            held = self.cache.mtp_lengths
            packing = self._packing({row.slot: row.valid for row in rows}, held)
            hidden = torch.cat([row.carry[: row.valid] for row in rows if row.carry is not None])
            ids = [t for row in rows for t in row.followers[: row.valid]]
            ids = torch.tensor(ids, device=packing.device)
            self.stepper.predict_further(hidden, ids, packing)
        for row in rows:
            row.carry, row.followers, row.valid = None, [], 0

    def _first(self, rows: list[_Row], states: list[Tensor]) -> dict[Request, list[int]]:
        if not rows:
            return {}
        hidden = torch.stack(states)
        logits = self.model.lm_head(hidden)
        chosen = self._chooser([(r.slot, r.request) for r in rows], logits[:, None], None, [])
        new = {}
        for i, (row, tokens) in enumerate(zip(rows, chosen, strict=True)):
            if found := self._append(row, tokens):
                new[row.request] = found
            row.carry, row.followers, row.valid = hidden[i : i + 1], tokens, 1
        return new

    def _append(self, row: _Row, tokens: list[int]) -> list[int]:
        request = row.request
        if min(tokens) < 0:
            kind = str(self.model.lm_head.weight.dtype).removeprefix("torch.")
            request.fail(f"the model's logits overflow {kind}: a wider dtype may help")
            return []
        found = request.append(tokens)
        self._chooser.note(row.slot, request, found)
        return found

    def _write(self, rows: list[_Row]) -> dict[Request, list[int]]:
        """One step of all sequences being written: draft, check, keep what stands."""
        start = time.perf_counter()
        rows = sorted(rows, key=lambda row: row.slot)
        count = self.drafting.choose(len(rows))
        drafts = self._draft(rows, count)
        held = list(self.cache.lengths)
        packing = self._packing({row.slot: count + 1 for row in rows}, held)
        ids = [t for row, more in zip(rows, drafts, strict=True)
               for t in (row.request.token_ids[-1], *more)]  # fmt: skip
        found = self.stepper.decode(ids, packing)
        width = count + 1
        logits = found.logits.view(len(rows), width, -1)
        chosen = self._chooser([(r.slot, r.request) for r in rows], logits, found.best, drafts)
        new, stood = {}, []
        for i, (row, more, tokens) in enumerate(zip(rows, drafts, chosen, strict=True)):
            kept = next((j for j in range(count) if more[j] != tokens[j]), count)
            counted = min(kept, row.request.remaining - 1)
            self.counters.drafted += min(count, row.request.remaining - 1)
            for j in range(counted):
                self.counters.accepted_at[j] += 1
            stood.append(kept)
            held[row.slot] += kept + 1
            if appended := self._append(row, tokens[: kept + 1]):
                new[row.request] = appended
            self._carry(row, found.hidden[i * width : (i + 1) * width], tokens, kept + 1)
        self.cache.truncate(held)
        self.counters.steps += 1
        self.drafting.record(len(rows), count, time.perf_counter() - start, stood)
        return new

    def _carry(self, row: _Row, hidden: Tensor, tokens: list[int], valid: int) -> None:
        """Keep states for the MTP block; where it rests, those of several steps."""
        if not self.drafting.most or row.request.finished:
            return
        if row.carry is None:
            row.carry, row.followers, row.valid = hidden, tokens, valid
            return
        row.carry = torch.cat((row.carry[: row.valid], hidden[:valid]))
        row.followers = row.followers[: row.valid] + tokens[:valid]
        row.valid = len(row.followers)
        if row.valid > min(MOST_CARRY, self.cache.chunk - 1):
            # drafts will start from the newest, and its next token
            row.valid -= 1
            newest, following = row.carry[-1:], row.followers[-1:]
            self._show([row])
            row.carry, row.followers, row.valid = newest, following, 1

    def _draft(self, rows: list[_Row], count: int) -> list[list[int]]:
        """`count` drafts for each sequence. Equally many states at a time make equal steps."""
        drafts: dict[int, list[int]] = {}
        ordered = sorted(rows, key=lambda row: len(row.followers)) if count else []
        for width, same in groupby(ordered, key=lambda row: len(row.followers)):
            group = sorted(same, key=lambda row: row.slot)
            held = self.cache.mtp_lengths
            packings = [self._packing({row.slot: width for row in group}, held)]
            for row in group:
                held[row.slot] += row.valid
            for step in range(count - 1):
                ahead = [n + step for n in held]
                packings.append(self._packing({row.slot: 1 for row in group}, ahead))
            hidden = torch.cat([row.carry for row in group if row.carry is not None])
            ids = [t for row in group for t in row.followers]
            last = [i * width + row.valid - 1 for i, row in enumerate(group)]
            for row, found in zip(group, self.stepper.draft(hidden, ids, last, packings),
                                  strict=True):  # fmt: skip
                drafts[row.slot] = found
                row.carry, row.followers, row.valid = None, [], 0
        return [drafts.get(row.slot, []) for row in rows]


def check_drafts(model: KExaone, drafts: Drafts) -> int:
    """The most drafts per step that `drafts` asks for. Raises ValueError."""
    if drafts == "auto":
        return MAX_DRAFTS if model.mtp is not None else 0
    if not isinstance(drafts, int) or not 0 <= drafts <= MAX_DRAFTS:
        raise ValueError(f"drafts must lie in 0..{MAX_DRAFTS}, got {drafts}")
    if drafts and model.mtp is None:
        raise ValueError("drafts need an MTP block, and this model has none: use drafts=0")
    return drafts


def check_request(model: KExaone, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises ValueError if the model could not continue these prompts by so many tokens."""
    cfg = model.config
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    for prompt in prompts:
        if not (min(prompt) >= 0 and max(prompt) < cfg.vocab_size):
            wrong = next(t for t in prompt if not 0 <= t < cfg.vocab_size)
            raise ValueError(f"token {wrong} is outside the vocabulary of {cfg.vocab_size}")
    needed = max(map(len, prompts)) + max_new_tokens
    if needed > cfg.max_position_embeddings:
        raise ValueError(
            f"prompt and new tokens need a context of {needed}, the model has "
            f"{cfg.max_position_embeddings}"
        )
