"""Key-value caches: global layers grow with the context, windowed layers keep a ring.

A ring of window + chunk + drafts slots is enough, and exactly window is not: a prefill chunk
written before it is attended to would overwrite keys that its first queries still need.

Shape letters: B sequences, A key-value heads, C slots, D head dimension, N packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config
from .packing import Packing


@dataclass(frozen=True)
class CacheView:
    """Keys and values [B, A, C, D] of sequences that end at `ends`; `period` is the capacity."""

    keys: Tensor
    values: Tensor
    ends: tuple[int, ...]
    period: int

    @property
    def positions(self) -> Tensor:
        """The newest position below the end of its sequence that maps to each slot, int64 [B, C].

        -1 if there is none.
        """
        slots = torch.arange(self.keys.shape[2], device=self.keys.device)
        newest = torch.tensor(self.ends, device=self.keys.device)[:, None] - 1
        return (newest - (newest - slots) % self.period).clamp(min=-1)


class LayerCache:
    """Keys and values of one layer. Position p of a sequence lives in slot p modulo capacity."""

    def __init__(self, shape: tuple[int, int, int, int], *, ring: bool, like: Tensor) -> None:
        self.ring = ring
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` positions; a ring never grows."""
        if self.ring or tokens <= self.capacity:
            return
        batch, heads, used, dim = self.keys.shape
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(batch, heads, tokens, dim)
            new[:, :, :used] = old
            setattr(self, name, new)

    def append(self, keys_NAD: Tensor, values_NAD: Tensor, packing: Packing) -> CacheView:
        """Write the new tokens, then show what a query at or after them may look at."""
        self.make_room(packing)
        slots = packing.positions % self.capacity if self.ring else packing.positions
        self.keys[packing.rows, :, slots] = keys_NAD
        self.values[packing.rows, :, slots] = values_NAD
        return self.view(packing)

    def make_room(self, packing: Packing) -> None:
        """Reserve what the new tokens need, or half as much again as there is if that is more."""
        end = max(packing.ends)
        if end > self.capacity and not self.ring:
            self.reserve(max(end, self.capacity + self.capacity // 2))

    def view(self, packing: Packing) -> CacheView:
        """What a query at or after the new tokens, once written, may look at."""
        shown = self.capacity if self.ring else max(packing.ends)
        keys, values = self.keys[:, :, :shown], self.values[:, :, :shown]
        return CacheView(keys, values, packing.ends, max(shown, 1))


class Cache:
    """State of `batch` sequences during generation: all layers of the decoder and of the MTP block.

    `lengths[b]` counts the tokens of sequence `b` that the decoder has seen, `mtp_lengths[b]` those
    that the MTP block has. A call may bring at most `chunk` tokens per sequence, and `truncate` may
    go back to at most `drafts` tokens below the longest that a sequence has been.
    """

    def __init__(
        self, config: Config, batch: int, *, like: Tensor, chunk: int = 512, drafts: int = 0
    ) -> None:
        """Empty caches with dtype and device of `like`.

        Raises ValueError if batch or chunk is not positive, or drafts is negative.
        """
        if batch < 1 or chunk < 1 or drafts < 0:
            raise ValueError(
                f"need batch >= 1, chunk >= 1, drafts >= 0; got {batch}, {chunk}, {drafts}"
            )
        self.config, self.chunk, self.drafts = config, max(chunk, drafts + 1), drafts

        def layer(window: int) -> LayerCache:
            slots = window + self.chunk + drafts if window else 0
            shape = (batch, config.num_key_value_heads, slots, config.head_dim)
            return LayerCache(shape, ring=window > 0, like=like)

        self.layers = [layer(w) for w in config.windows]
        self.mtp_layers = [layer(w) for w in config.mtp_windows] if drafts else []
        self.lengths = [0] * batch
        self.mtp_lengths = [0] * batch
        self._longest = {mtp: [0] * batch for mtp in (False, True)}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values now allocated."""
        return sum(layer.nbytes for layer in (*self.layers, *self.mtp_layers))

    def reserve(self, tokens: int) -> None:
        """Allocate room for `tokens` positions per sequence now, instead of growing on the way."""
        for layer in (*self.layers, *self.mtp_layers):
            layer.reserve(tokens)

    def restart(self, row: int) -> None:
        """Forget the tokens of one sequence; another may begin in its place."""
        for held in (self.lengths, self.mtp_lengths, *self._longest.values()):
            held[row] = 0
        # further blocks see only what was drafted in them: nothing yet
        for layer in self.mtp_layers[1:]:
            layer.keys[row].zero_()
            layer.values[row].zero_()

    def packing(self, lengths: list[int], *, mtp: bool = False) -> Packing:
        """The packing of `lengths` new tokens after what the cache holds. Raises ValueError."""
        self._check_batch(lengths)
        if max(lengths, default=0) > self.chunk:
            raise ValueError(
                f"at most {self.chunk} tokens per sequence and call fit this cache, got "
                f"{max(lengths)}: prefill in chunks"
            )
        starts = self.mtp_lengths if mtp else self.lengths
        packing = Packing(tuple(lengths), tuple(starts), self.layers[0].keys.device)
        if max(packing.ends) > self.config.max_position_embeddings:
            raise ValueError(
                f"context of {max(packing.ends)} tokens exceeds the model's "
                f"{self.config.max_position_embeddings}"
            )
        return packing

    def truncate(self, lengths: list[int], *, mtp: bool = False) -> None:
        """Forget all tokens at or after `lengths[b]`: the rollback of rejected drafts.

        Raises ValueError if that goes back more than `drafts` tokens below the longest that the
        sequence has been (its ring may have overwritten what they hid) or would lengthen it.
        """
        held = self.mtp_lengths if mtp else self.lengths
        self._check_batch(lengths)
        longest = list(map(max, self._longest[mtp], held))
        for new, old, most in zip(lengths, held, longest, strict=True):
            least = max(0, most - self.drafts)
            if not least <= new <= old:
                raise ValueError(
                    f"a sequence of {old} tokens can go back to {least} at least, got {new}"
                )
        self._longest[mtp] = longest
        held[:] = lengths

    def _check_batch(self, lengths: list[int]) -> None:
        if len(lengths) != len(self.lengths):
            raise ValueError(f"cache holds {len(self.lengths)} sequences, got {len(lengths)}")


def cache_bytes(
    config: Config, tokens: int, *, chunk: int, drafts: int, itemsize: int
) -> dict[str, int]:
    """Bytes that the caches of one sequence of `tokens` tokens take, by kind of layer."""
    per_token = 2 * config.num_key_value_heads * config.head_dim * itemsize

    def held(window: int) -> int:
        return (window + max(chunk, drafts + 1) + drafts if window else tokens) * per_token

    windowed = sum(held(w) for w in config.windows if w)
    grown = sum(held(w) for w in config.windows if not w)
    mtp = sum(held(w) for w in config.mtp_windows) if drafts else 0
    return {"windowed": windowed, "global": grown, "mtp": mtp, "total": windowed + grown + mtp}
