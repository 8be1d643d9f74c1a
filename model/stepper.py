"""Decoding steps without Python: recorded once per shape, then run again.

A step of few tokens costs more in launching kernels one by one than in their work. The buffers of
a recorded step are fixed, so tokens, positions, lengths and sequence numbers are data to it: steps
that bring equally many tokens share one recording, wherever their sequences stand.

Two kinds of steps are worth it: the decoder's, up to the most likely next token of every
position, and a whole chain of drafts of the MTP block.

Shape letters: N packed tokens, R sequences that bring some, B all sequences, H hidden, D half of
the head dimension, P positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.argmax import argmax
from ..kernels.capture import CaptureError, Graph
from ..kernels.dispatch import choose
from .cache import Cache, LayerCache
from .layers import rope_tables
from .packing import Packing
from .transformer import KExaone

MOST_TOKENS = 32
"""Above it the work of a step hides what launching costs."""
PATIENCE = 1
"""Steps of one shape that run as they are before one is recorded."""

Tensors = tuple[Tensor, ...]
# of tokens and where they belong: the hidden states, tokens, and which tokens go on
_Function = Callable[[Tensor | None, Tensor, Tensor, list[Packing]], Tensors]
# what runs and how many drafts follow, tokens, the most that one sequence brings, sequences
_Shape = tuple[str, int, int, int, int]
# and the room that layers have
_Key = tuple[_Shape, int]


@dataclass(frozen=True)
class Decoded:
    """Hidden states [N, H], logits [N, V] until the next step, and the largest logit's index.

    `best[i]` is -1 where a logit is NaN or infinite.
    """

    hidden: Tensor
    logits: Tensor
    best: list[int]


@dataclass(frozen=True)
class _Input:
    """One step: packed tokens, the states they come with, and single tokens that follow later."""

    kind: str
    hidden: Tensor | None
    ids: list[int]
    last: list[int]
    packings: list[Packing]

    @property
    def shape(self) -> _Shape:
        first = self.packings[0]
        return self.kind, len(self.packings), first.total, first.longest, len(self.last)

    def integers(self) -> tuple[list[int], list[int]]:
        """All that is 64 bits wide (ids, last, rows, positions), and 32 (starts and lengths)."""
        wide, narrow = [*self.ids, *self.last], []
        for packing in self.packings:
            pairs = list(zip(packing.starts, packing.lengths, strict=True))
            wide += [b for b, (_, count) in enumerate(pairs) for _ in range(count)]
            wide += [p for start, count in pairs for p in range(start, start + count)]
            narrow += (0, *accumulate(packing.lengths), *packing.ends)
        return wide, narrow


@dataclass(frozen=True)
class _Step:
    """A recorded step and the buffers that it reads."""

    graph: Graph
    wide: Tensor
    narrow: Tensor
    hidden: Tensor | None

    def __call__(self, given: _Input) -> Tensors:
        wide, narrow = given.integers()
        self.wide.copy_(torch.tensor(wide))
        self.narrow.copy_(torch.tensor(narrow, dtype=torch.int32))
        if self.hidden is not None and given.hidden is not None:
            self.hidden.copy_(given.hidden)
        return self.graph.replay()


class Stepper:
    """Runs the steps of `model` on `cache`, whose lengths they advance.

    Recordings hold the weights where they are: do not move the model while a stepper lives.
    """

    def __init__(self, model: KExaone, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self._seen: Counter[_Shape] = Counter()
        # None: this step cannot be recorded
        self._steps: dict[_Key, _Step | None] = {}
        self._tables: tuple[Tensor, Tensor] = torch.empty(0), torch.empty(0)

    def features(self, ids_N: Tensor, packing: Packing) -> Tensor:
        """Final hidden states [N, H] of pieces of prompts; advances the cache."""
        return self.model.features(ids_N, packing, cache=self.cache).hidden_NH

    def predict_further(self, hidden_NH: Tensor, next_ids_N: Tensor, packing: Packing) -> Tensor:
        """States of the MTP block [N, H] for pieces of prompts; advances its cache."""
        return self.model.predict_further(hidden_NH, next_ids_N, packing, cache=self.cache)

    def decode(self, ids: list[int], packing: Packing) -> Decoded:
        """What the decoder and its head say of tokens; advances the cache."""

        def run(hidden: Tensor | None, ids: Tensor, last: Tensor, at: list[Packing]) -> Tensors:
            found = self.model.features(ids, at[0], cache=self.cache).hidden_NH
            logits = self.model.lm_head(found)
            return found, logits, argmax(logits)

        given = _Input("decode", None, ids, [], [packing])
        hidden, logits, best = self._run(self.cache.layers, given, run)
        self.cache.lengths[:] = packing.ends
        # the next step overwrites what a recorded one returns
        return Decoded(hidden.clone(), logits, best.tolist())

    def draft(
        self, hidden_NH: Tensor, next_ids: list[int], last: list[int], packings: list[Packing]
    ) -> list[list[int]]:
        """The most likely tokens of R sequences: one per packing, each after the ones before.

        The MTP block is given decoder states with their next tokens, as the first packing says;
        then those `last` in it go on from their own output, as the other packings say. The
        cache stays as long as it was.
        """
        mtp = self.model.mtp
        assert mtp is not None
        held = list(self.cache.mtp_lengths)

        def run(hidden: Tensor | None, ids: Tensor, last: Tensor, at: list[Packing]) -> Tensors:
            tokens: list[Tensor] = []
            assert hidden is not None
            for step, packing in enumerate(at):
                hidden = self.model.predict_further(
                    hidden, tokens[-1] if step else ids, packing, step=step, cache=self.cache
                )
                hidden = hidden if step else hidden.index_select(0, last)
                # a model whose logits overflow is found out by the decoder
                tokens.append(argmax(self.model.lm_head(hidden)))
            return tuple(tokens)

        given = _Input("draft", hidden_NH, next_ids, last, packings)
        tokens = self._run(self.cache.mtp_layers, given, run)
        self.cache.mtp_lengths[:] = held
        columns = [[max(t, 0) for t in column.tolist()] for column in tokens]
        return [list(row) for row in zip(*columns, strict=True)]

    def _run(self, layers: list[LayerCache], given: _Input, function: _Function) -> Tensors:
        for packing in given.packings:
            for layer in layers:
                layer.make_room(packing)
        shape = given.shape
        # a layer that has grown is other memory
        room = max((layer.capacity for layer in layers if not layer.ring), default=0)
        if self._recordable(given):
            self._seen[shape] += 1
            known, step = (shape, room) in self._steps, self._steps.get((shape, room))
            if step is not None and self._covers(given):
                return step(given)
            if self._seen[shape] > PATIENCE and (step is not None or not known):
                for stale in [k for k in self._steps if k[0][0] == given.kind and k[1] != room]:
                    del self._steps[stale]
                return self._record((shape, room), given, function)
        device = given.packings[0].device
        ids, last = (torch.tensor(x, dtype=torch.int64, device=device)
                     for x in (given.ids, given.last))  # fmt: skip
        return function(given.hidden, ids, last, given.packings)

    def _recordable(self, given: _Input) -> bool:
        return (
            0 < given.packings[0].total <= MOST_TOKENS
            and not torch.is_grad_enabled()
            and choose(self.model.lm_head.weight) == "triton"
        )

    def _covers(self, given: _Input) -> bool:
        """Whether the rotary tables that recordings hold reach as far as a step."""
        return all(max(packing.ends) <= len(self._tables[0]) for packing in given.packings)

    def _turn_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin [P, D] of at least so many positions."""
        if len(self._tables[0]) < positions:
            # what was recorded reads the shorter ones
            self._steps.clear()
            cfg, device = self.model.config, self.model.lm_head.weight.device
            wanted = torch.arange(max(256, positions), device=device)
            cos, sin = rope_tables(wanted, cfg.head_dim, cfg.rope_theta)
            self._tables = cos[:, 0], sin[:, 0]
        return self._tables

    def _record(self, key: _Key, given: _Input, function: _Function) -> Tensors:
        furthest = max(max(packing.ends) for packing in given.packings)
        room = key[1]
        # without a layer that grows nothing else bounds the positions
        tables = self._turn_tables(max(room, furthest) if room else 2 * furthest)
        limit = room or self.model.config.max_position_embeddings
        device = given.packings[0].device
        wide, narrow = (
            torch.tensor(values, dtype=dtype, device=device)
            for values, dtype in zip(given.integers(), (torch.int64, torch.int32), strict=True)
        )
        sizes = [len(given.ids), len(given.last)]
        for packing in given.packings:
            sizes += [packing.total] * 2
        ids, last, *places = wide.split(sizes)
        batch = len(given.packings[0].lengths)
        ends = narrow.split([batch + 1, batch] * len(given.packings))
        hidden = None if given.hidden is None else given.hidden.clone()

        def body() -> Tensors:
            packings = []
            for i, packing in enumerate(given.packings):
                rows, positions = places[2 * i : 2 * i + 2]
                turns = tuple(t.index_select(0, positions)[:, None] for t in tables)
                packings.append(
                    Packing.fixed(
                        packing.lengths,
                        capacity=limit,
                        device=device,
                        rows=rows,
                        turns=turns,
                        positions=positions,
                        cu_seqlens=ends[2 * i],
                        held=ends[2 * i + 1],
                    )
                )
            return function(hidden, ids, last, packings)

        try:
            graph = Graph(body, device=device)
        except CaptureError:
            # a model that someone has put other modules into
            self._steps[key] = None
            return function(given.hidden, ids, last, given.packings)
        self._steps[key] = _Step(graph, wide, narrow, hidden)
        return graph.output
