"""Memory and time of a training step of transformers' ExaoneMoe, with and without recomputation.

    python -m kexaone.bench.training_memory [--preset mid] [--tokens 512] [--threads 2] [--rounds 3]
                                            [--json PATH] [peaks] [times]

Sides: transformers as it is, with its gradient checkpointing, `kexaone.optimize`, and the same with
`recompute=True`. `peaks`: the most bytes of tensors alive at a time during a step, weights not
counted but their gradients, each side run operator by operator (`kexaone.graph.recompute.Live`);
`kept` is what is alive between forward and backward. `times`: medians, sides in turn, with Inductor
behind `optimize`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_json
from ..graph.backend import optimize
from ..graph.recompute import Live
from ..model.config import PRESETS
from .compiled_models import BATCH, build

SIDES = ("eager", "checkpointing", "kexaone", "kexaone, recompute")


@dataclass(frozen=True)
class Row:
    """Bytes and median milliseconds of one side; zero where not measured."""

    side: str
    peak: int = 0
    kept: int = 0
    milliseconds: float = 0.0


class Steps:
    """A step of each side on one model."""

    def __init__(self, preset: str, tokens: int, then: str) -> None:
        self.model = build(preset).train()
        generator = torch.Generator().manual_seed(1)
        shape = (BATCH, tokens)
        self.ids = torch.randint(1, self.model.config.vocab_size, shape, generator=generator)
        self.losses: dict[str, Callable[[Tensor], Tensor]] = {
            "eager": self._loss, "checkpointing": self._loss,
            "kexaone": optimize(self._loss, then=then),
            "kexaone, recompute": optimize(lambda ids: self._loss(ids), then=then, recompute=True),
        }  # fmt: skip

    def _loss(self, ids: Tensor) -> Tensor:
        return self.model(ids, labels=ids, use_cache=False).loss

    def __call__(self, side: str, between: Callable[[], Any] = lambda: None) -> None:
        if side == "checkpointing":
            self.model.gradient_checkpointing_enable()
        self.model.zero_grad(set_to_none=True)
        loss = self.losses[side](self.ids)
        between()
        loss.backward()
        self.model.gradient_checkpointing_disable()


def peaks(preset: str, tokens: int) -> list[Row]:
    """Exact bytes, operator by operator."""
    step, rows = Steps(preset, tokens, "eager"), []
    for side in SIDES:
        # caches of the model, and compilation
        step(side)
        step.model.zero_grad(set_to_none=True)
        kept: list[int] = []
        with Live() as live:
            step(side, lambda found=kept, live=live: found.append(live.now))
        rows.append(Row(side, live.peak, kept[0]))
        print(f"{side:20} peak {live.peak / 2**20:8.1f} MiB, kept {kept[0] / 2**20:8.1f} MiB",
              flush=True)  # fmt: skip
    return rows


def times(preset: str, tokens: int, rounds: int) -> list[Row]:
    """Medians, sides in turn."""
    step = Steps(preset, tokens, "inductor")
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for side in SIDES:
        step(side)
    for _ in range(rounds):
        for side in SIDES:
            begin = time.perf_counter()
            step(side)
            found[side].append((time.perf_counter() - begin) * 1e3)
    rows = [Row(side, milliseconds=statistics.median(found[side])) for side in SIDES]
    for row in rows:
        print(f"{row.side:20} {row.milliseconds:10.1f} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="measurement", help="peaks, times")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mid")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names, rows = options.names or ["peaks", "times"], []
    if unknown := set(names) - {"peaks", "times"}:
        parser.error(f"unknown measurements: {', '.join(sorted(unknown))}")
    if "peaks" in names:
        rows += peaks(options.preset, options.tokens)
    if "times" in names:
        rows += times(options.preset, options.tokens, options.rounds)
    write_json(options.json, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
