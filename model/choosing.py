"""Which token comes at each place of a batch whose sequences are sampled in different ways.

Shape letters: R sequences, W places of each, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..kernels.argmax import argmax
from .requests import Request
from .sampling import Sampling, draw


class Chooser:
    """Chooses tokens for the requests in `slots` places, and remembers what they have used."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._shape, self._device = (slots, vocabulary), device
        # made when a request has a presence penalty
        self._seen: Tensor | None = None

    def restart(self, slot: int) -> None:
        """Another request takes the place."""
        if self._seen is not None:
            self._seen[slot] = False

    def note(self, slot: int, request: Request, tokens: list[int]) -> None:
        """Tokens that a request got."""
        if request.sampling.presence_penalty:
            if self._seen is None:
                self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._seen[slot, tokens] = True

    def __call__(
        self,
        places: list[tuple[int, Request]],
        logits_RWV: Tensor,
        best: list[int] | None,
        drafts: list[list[int]],
    ) -> list[list[int]]:
        """The W tokens of each request, -1 where a logit is NaN or infinite.

        Those after the first are chosen as if the drafts were what came before. `best` are the
        indices of the largest logits, if they are at hand.
        """
        width = logits_RWV.shape[1]
        if best is None:
            best = argmax(logits_RWV.flatten(0, 1)).tolist()
        chosen = [best[i * width : (i + 1) * width] for i in range(len(places))]
        groups: dict[Sampling, list[int]] = {}
        for i, (_, request) in enumerate(places):
            if not request.sampling.plain:
                like = dataclasses.replace(request.sampling, seed=None)
                groups.setdefault(like, []).append(i)
        for sampling, rows in groups.items():
            for i, tokens in zip(
                rows, self._sample(sampling, rows, places, logits_RWV, drafts), strict=True
            ):
                chosen[i] = [t if ok >= 0 else -1 for t, ok in zip(tokens, chosen[i], strict=True)]
        return chosen

    def _sample(
        self,
        sampling: Sampling,
        rows: list[int],
        places: list[tuple[int, Request]],
        logits_RWV: Tensor,
        drafts: list[list[int]],
    ) -> list[list[int]]:
        width = logits_RWV.shape[1]
        keys = [key for i in rows for key in places[i][1].noise_keys(width)]
        probabilities = sampling.probabilities(
            logits_RWV[rows], self._used(sampling, rows, places, drafts, width)
        )
        if sampling.temperature == 0:
            return probabilities.argmax(-1).tolist()
        flat = draw(probabilities.flatten(0, 1), torch.tensor(keys, device=self._device))
        return flat.view(len(rows), width).tolist()

    def _used(
        self,
        sampling: Sampling,
        rows: list[int],
        places: list[tuple[int, Request]],
        drafts: list[list[int]],
        width: int,
    ) -> Tensor | None:
        """Tokens used before each place, bool [R, W, V]."""
        if not sampling.presence_penalty:
            return None
        slots = [places[i][0] for i in rows]
        if self._seen is None:
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        seen = self._seen[slots][:, None].repeat(1, width, 1)
        for place in range(1, width):
            before = torch.tensor([drafts[i][:place] for i in rows], device=self._device)
            seen[:, place].scatter_(1, before, True)
        return seen
