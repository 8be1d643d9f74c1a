"""`mini` on the demo's data, with its products in bfloat16 and in float8, over the same steps.

    python -m kexaone.bench.fp8_training [--steps 200] [--dtype bfloat16] [--threads 2]
                                         [--json PATH]

Both sides start from the same weights and see the same batches, in turn, with the demo's settings.
Compared are the next-token loss of the last tenth of the steps, as trained, and the loss on
held-out text, which the trained weights have without any cast. The target is a difference below
1 %.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..files import write_json
from ..model.config import Config
from ..model.data import Windows
from ..model.fp8_training import train_in_fp8
from ..model.trainer import Trainer, TrainSettings
from ..model.training_run import read_data, validation_loss
from ..model.transformer import KExaone

SIDES = ("plain", "float8")


@dataclass(frozen=True)
class Row:
    """Losses in nats per byte; `seconds` is the median step."""

    side: str
    steps: int
    dtype: str
    training: float
    validation: float | None
    seconds: float
    losses: tuple[float, ...]


def train(steps: int, dtype: torch.dtype) -> list[Row]:
    """Both sides, a step of each at a time."""
    config = Config.preset("mini")
    corpus = read_data((), config, None)
    trainers, losses, seconds = [], {s: [] for s in SIDES}, {s: [] for s in SIDES}
    for side in SIDES:
        torch.manual_seed(0)
        model = KExaone(config).to(dtype)
        if side == "float8":
            train_in_fp8(model)
        settings = TrainSettings(steps=steps, learning_rate=4e-3, decay_fraction=0.4, warmup=10)
        trainers.append(Trainer(model, Windows(corpus.train, 256, seed=0), settings))
    for step in range(steps):
        for side, trainer in zip(SIDES, trainers, strict=True):
            begin = time.perf_counter()
            losses[side].append(trainer.step().next_token)
            seconds[side].append(time.perf_counter() - begin)
        if step % 20 == 0:
            print(step, *(f"{side} {losses[side][-1]:.4f}" for side in SIDES), flush=True)
    tail = max(1, steps // 10)
    return [
        Row(side, steps, str(dtype).removeprefix("torch."), statistics.mean(losses[side][-tail:]),
            validation_loss(trainer, corpus.validation), statistics.median(seconds[side]),
            tuple(losses[side]))
        for side, trainer in zip(SIDES, trainers, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = train(options.steps, getattr(torch, options.dtype))
    for row in rows:
        held_out = "" if row.validation is None else f", held out {row.validation:.4f}"
        print(f"{row.side:7} {row.dtype}: training {row.training:.4f}{held_out}, "
              f"{row.seconds:.2f} s per step")  # fmt: skip
    plain, cast = rows
    print(f"float8 ends {cast.training / plain.training - 1:+.2%} beside {options.dtype}")
    write_json(options.json, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
