"""Decoding steps without Python: recorded once per shape, then run again.

A step of few tokens costs more in launching kernels one by one than in their work. The buffers of
a recorded step are fixed, so positions, lengths and sequence numbers are data to it: steps that
bring equally many tokens share one recording, wherever their sequences stand.

Shape letters: N packed tokens, B sequences, H hidden, D head dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.capture import CaptureError, Graph
from ..kernels.dispatch import choose
from .cache import Cache, LayerCache
from .layers import rope_tables
from .packing import BUFFERS, Packing
from .transformer import KExaone

MOST_TOKENS = 32
"""Above it the work of a step hides what launching costs."""
PATIENCE = 4
"""Steps of one shape that run as they are before one is recorded."""

Function = Callable[[tuple[Tensor, ...], Packing], Tensor]
# what runs, its tokens, and the most that one sequence brings; and the room that layers have
_Shape = tuple[str, int, int]
_Key = tuple[_Shape, int]


@dataclass(frozen=True)
class _Step:
    """A recorded step and the buffers that it reads."""

    graph: Graph
    inputs: tuple[Tensor, ...]
    packing: Packing

    def __call__(
        self, inputs: tuple[Tensor, ...], packing: Packing, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        for name in BUFFERS:
            getattr(self.packing, name).copy_(getattr(packing, name))
        for buffer, table in zip(self.packing.turns or (), tables, strict=True):
            torch.index_select(table, 0, packing.positions, out=buffer[:, 0])
        # the next step overwrites what the graph returns
        return self.graph.replay().clone()


class Stepper:
    """Runs the steps of one generation: `model.features` and `model.predict_further` on `cache`.

    Recordings hold the weights where they are: do not move the model while a stepper lives.
    """

    def __init__(self, model: KExaone, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self._seen: Counter[_Shape] = Counter()
        # None: this step cannot be recorded
        self._steps: dict[_Key, _Step | None] = {}
        self._tables: tuple[Tensor, Tensor] = torch.empty(0), torch.empty(0)

    def features(self, ids_N: Tensor, packing: Packing) -> Tensor:
        """Final hidden states [N, H]; advances the cache."""

        def run(inputs: tuple[Tensor, ...], at: Packing) -> Tensor:
            return self.model.features(inputs[0], at, cache=self.cache).hidden_NH

        hidden = self._run("features", self.cache.layers, (ids_N,), packing, run)
        self.cache.lengths[:] = packing.ends
        return hidden

    def predict_further(
        self, hidden_NH: Tensor, next_ids_N: Tensor, packing: Packing, *, step: int = 0
    ) -> Tensor:
        """MTP hidden states [N, H]; advances the cache."""
        assert self.model.mtp is not None
        layer = step % len(self.model.mtp.layers)

        def run(inputs: tuple[Tensor, ...], at: Packing) -> Tensor:
            hidden, ids = inputs
            return self.model.predict_further(hidden, ids, at, step=step, cache=self.cache)

        layers = self.cache.mtp_layers
        hidden = self._run(f"mtp {layer}", layers, (hidden_NH, next_ids_N), packing, run)
        self.cache.mtp_lengths[:] = packing.ends
        return hidden

    def _run(
        self,
        kind: str,
        layers: list[LayerCache],
        inputs: tuple[Tensor, ...],
        packing: Packing,
        function: Function,
    ) -> Tensor:
        if not self._recordable(packing):
            return function(inputs, packing)
        for layer in layers:
            layer.make_room(packing)
        # a layer that has grown is other memory
        room = max((layer.capacity for layer in layers if not layer.ring), default=0)
        shape = (kind, packing.total, packing.longest)
        self._seen[shape] += 1
        if self._seen[shape] <= PATIENCE:
            return function(inputs, packing)
        if (shape, room) not in self._steps:
            for stale in [k for k in self._steps if k[0][0] == kind and k[1] != room]:
                del self._steps[stale]
            return self._record((shape, room), inputs, packing, function)
        step = self._steps[shape, room]
        if step is None:
            return function(inputs, packing)
        return step(inputs, packing, self._turn_tables(max(packing.ends)))

    def _recordable(self, packing: Packing) -> bool:
        weight = self.model.lm_head.weight
        return (
            0 < packing.total <= MOST_TOKENS
            and not torch.is_grad_enabled()
            and choose(weight) == "triton"
        )

    def _turn_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin [P, D/2] of at least so many positions."""
        if len(self._tables[0]) < positions:
            cfg, device = self.model.config, self.model.lm_head.weight.device
            wanted = torch.arange(max(256, 2 * positions), device=device)
            cos, sin = rope_tables(wanted, cfg.head_dim, cfg.rope_theta)
            self._tables = cos[:, 0], sin[:, 0]
        return self._tables

    def _record(
        self, key: _Key, inputs: tuple[Tensor, ...], packing: Packing, function: Function
    ) -> Tensor:
        tables = self._turn_tables(max(packing.ends))
        cos, sin = (t.index_select(0, packing.positions)[:, None] for t in tables)
        limit = key[1] or self.model.config.max_position_embeddings
        fixed = Packing.fixed(packing, capacity=limit, turns=(cos, sin))
        buffers = tuple(x.clone() for x in inputs)
        try:
            graph = Graph(lambda: function(buffers, fixed), device=packing.device)
        except CaptureError:
            # a model that someone has put other modules into
            self._steps[key] = None
            return function(inputs, packing)
        self._steps[key] = _Step(graph, buffers, fixed)
        return graph.output.clone()
