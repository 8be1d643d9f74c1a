"""From logits to tokens: temperature, top-k, top-p, presence penalty.

The token at one place is a function of its logits and of noise that seed and place decide. So a
text does not depend on what else runs beside it, nor on how many tokens a step checks at once: a
draft stands where it is the token that would have been drawn anyway.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32)
_MASK = 2**64 - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 is greedy. top_k 0 and top_p 1 keep the whole vocabulary. presence_penalty is
    subtracted from the logit of every token that was already generated. Among equal logits the
    lower index goes first. The same seed (0 .. 2^63 - 1) gives the same tokens; None draws a
    fresh seed.

    Raises ValueError if a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not abs(self.presence_penalty) <= FLOAT32.max:
            raise ValueError(
                f"presence_penalty must be finite in float32, got {self.presence_penalty}"
            )

        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2^63-1, got {self.seed}")

    @property
    def plain(self) -> bool:
        """Whether the largest logit is all that counts."""
        return self.temperature == 0 and not self.presence_penalty

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The distribution [..., V] (float32) that the next token is drawn from.

        Greedy decoding is the distribution with all its mass on the largest logit, the lowest
        index among equals. `seen` is a bool [..., V] of tokens already generated.
        """
        logits = logits.float()
        if seen is not None and self.presence_penalty:
            logits = logits - self.presence_penalty * seen
        if self.temperature == 0:
            best = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, best, 1.0)
        # the peak becomes 0, and a divisor that float32 holds keeps it so: no 0 / 0, no overflow
        peak = logits.amax(-1, keepdim=True)
        scaled = (logits - peak) / max(self.temperature, FLOAT32.tiny)
        if self.top_k and self.top_k < logits.shape[-1]:
            # topk leaves open which of several equal logits it takes, so only its last value counts
            last = logits.topk(self.top_k, dim=-1).values[..., -1:]
            above, equal = logits > last, logits == last
            free = self.top_k - above.sum(-1, keepdim=True)
            kept = above | (equal & (equal.cumsum(-1) <= free))
            scaled = scaled.masked_fill(~kept, -torch.inf)
        probabilities = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
            # a token stays if the mass before it has not reached top_p: the first always does
            least = max(self.top_p, FLOAT32.tiny)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= least, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities


def fixed_seed(sampling: Sampling) -> int:
    """Its seed, or a fresh one."""
    return secrets.randbits(63) if sampling.seed is None else sampling.seed


def noise_key(seed: int, stream: int, index: int) -> int:
    """What the noise for token `index` of prompt `stream` is made from, an int64."""
    key = 0
    for part in (seed, stream, index):
        key = _mix_integer((key + part + 1) * _GOLDEN)
    return key - (key >> 63 << 64)


def exponential_noise(keys_R: Tensor, size: int) -> Tensor:
    """Exponentially distributed numbers > 0, float64 [R, size], a function of the keys alone.

    The generator is SplitMix64 (Steele et al., OOPSLA 2014) started at each key.
    """
    steps = torch.arange(1, size + 1, device=keys_R.device) * _signed(_GOLDEN)
    x = keys_R[:, None] + steps
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    x = x ^ _shift(x, 31)
    # 53 bits, and half a step from both 0 and 1
    return -((_shift(x, 11).double() + 0.5) * 2.0**-53).log()


def draw(probabilities: Tensor, keys_R: Tensor) -> Tensor:
    """One token per row of [R, V]: int64 [R], decided by the row and its key alone.

    Of independent exponential clocks with rates p the clock of v rings first with chance p[v].
    """
    return (probabilities / exponential_noise(keys_R, probabilities.shape[-1])).argmax(-1)


def _mix_integer(x: int) -> int:
    x &= _MASK
    x = (x ^ x >> 30) * _FIRST & _MASK
    x = (x ^ x >> 27) * _SECOND & _MASK
    return x ^ x >> 31


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right that brings in zeros."""
    return (x >> bits) & ((1 << 64 - bits) - 1)


def _signed(x: int) -> int:
    return x - (x >> 63 << 64)
