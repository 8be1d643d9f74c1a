"""From logits to tokens: temperature, top-k, top-p, presence penalty, speculative acceptance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 is greedy. top_k 0 and top_p 1 keep the whole vocabulary. presence_penalty is
    subtracted from the logit of every token that was already generated. Among equal logits the
    lower index goes first. The same seed (0 .. 2^63 - 1) gives the same tokens on one device; None
    draws a fresh seed.

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

    def generator(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

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


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of [R, V]: int64 [R]."""
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@dataclass(frozen=True)
class Verdict:
    """How many drafts of each row stand, int64 [R], and the token that follows them, int64 [R]."""

    accepted: Tensor
    following: Tensor


def verify(target: Tensor, proposed: Tensor, drafts: Tensor, generator: torch.Generator) -> Verdict:
    """Speculative rejection sampling (Leviathan et al., arXiv 2211.17192).

    A draft d stands with probability min(1, p(d) / q(d)); after the first that falls, a token is
    drawn from the normalised positive part of p - q. The result is distributed as if every token
    had been drawn from p.

    Args:
        target: the model's distributions p, [R, D + 1, V].
        proposed: the drafter's distributions q, [R, D, V].
        drafts: tokens drawn from q, int64 [R, D].
    """
    rows, count = drafts.shape
    index = drafts.unsqueeze(-1)
    p = target[:, :count].gather(-1, index).squeeze(-1)
    q = proposed.gather(-1, index).squeeze(-1)
    chance = torch.rand(rows, count, generator=generator, device=target.device)
    accepted = (chance * q < p).int().cumprod(-1).sum(-1)
    nothing = proposed.new_zeros(rows, 1, target.shape[-1])
    at = accepted[:, None, None].expand(-1, 1, target.shape[-1])
    final = target.gather(1, at).squeeze(1)
    rest = (final - torch.cat((proposed, nothing), 1).gather(1, at).squeeze(1)).clamp(min=0)
    # p == q up to rounding leaves no positive part to draw from
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, final)
    return Verdict(accepted, draw(rest, generator))
