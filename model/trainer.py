"""Training with bit-exact resume: one optimizer step at a time, checkpoints as whole folders."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import atomic_directory
from .config import Config
from .data import DataError, Windows
from .losses import update_router_bias
from .optimizer import MuonAdamW, clip_gradients
from .parallel.checkpoint import RECORD, STATE, load_state, save_state
from .parallel.ranks import Ranks, local
from .parallel.shard import shard
from .schedule import learning_rate
from .step_folders import drop_old, folder_of, latest, random_state, remove, step_of
from .transformer import KExaone

MODEL, OPTIMIZER, CONFIG = "model", "optimizer.safetensors", "config"
MAX_RATE, MAX_PASS = 1e6, 1 << 24


class TrainingError(ValueError):
    """Settings out of range, a checkpoint that cannot be resumed, or a loss that diverged."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that shapes a run besides model and data.

    One step takes `accumulation` batches of `batch_size` windows. The learning rate rises for
    `warmup` steps and falls over the last `decay_fraction` of all `steps`; a run too short for
    both cuts the warmup. `save_every` 0 saves only at the end. `not_finite` says what to do about a
    gradient that is NaN or infinite: "raise", or "skip" its batches.

    Raises:
        TrainingError: if a field is out of range.
    """

    steps: int
    batch_size: int = 8
    sequence_length: int = 256
    accumulation: int = 1
    learning_rate: float = 3e-4
    warmup: int = 20
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.05
    balance_weight: float = 1e-4
    bias_rate: float = 1e-4
    seed: int = 0
    save_every: int = 0
    not_finite: str = "raise"

    def __post_init__(self) -> None:
        if self.not_finite not in ("raise", "skip"):
            raise TrainingError(f"not_finite must be 'raise' or 'skip', got {self.not_finite!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "str":
                continue
            kinds = int if field.type == "int" else int | float
            if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
                raise TrainingError(f"{field.name} must be a finite {field.type}, got {value!r}")
        for name in ("steps", "batch_size", "accumulation", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be positive, got {getattr(self, name)}")
        for name in [
            "warmup",
            "weight_decay",
            "mtp_weight",
            "balance_weight",
            "bias_rate",
            "seed",
            "save_every",
        ]:
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) > MAX_RATE:
                raise TrainingError(f"{name} must be <= {MAX_RATE:g}, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise TrainingError(f"seed must be below 2^63, got {self.seed}")
        tokens = self.batch_size * self.sequence_length
        if tokens > MAX_PASS:
            raise TrainingError(f"a pass of {tokens:,} tokens is too large: use accumulation")
        if self.sequence_length < 2:
            raise TrainingError(f"sequence_length must be >= 2, got {self.sequence_length}")
        if not 0 <= self.decay_fraction <= 1:
            raise TrainingError(f"decay_fraction must lie in 0..1, got {self.decay_fraction}")

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        decay = round(self.decay_fraction * self.steps)
        warmup = min(self.warmup, self.steps - decay)
        return learning_rate(
            step, peak=self.learning_rate, total=self.steps, warmup=warmup, decay=decay
        )


@dataclass(frozen=True)
class StepReport:
    """What one step did: losses before its update, in nats; `step` counts steps done so far."""

    step: int
    loss: float
    next_token: float
    mtp: float
    balance: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: bool = False


class Trainer:
    """Trains a model in place.

    With `ranks`, one of the processes that train it together: `model` must be the same on all of
    them and is spread over them. A batch is that of all, whatever their number.

    Raises:
        ParallelError: if the model or its batches do not divide among the ranks.
        DataError: if windows and settings disagree on the length, or a token is not in the
            model's vocabulary.
    """

    def __init__(
        self, model: KExaone, data: Windows, settings: TrainSettings, ranks: Ranks | None = None
    ) -> None:
        self.ranks = ranks or Ranks()
        if data.length != settings.sequence_length:
            raise DataError(
                f"windows have {data.length} tokens, settings ask for {settings.sequence_length}"
            )
        low, high = int(data.tokens.min()), int(data.tokens.max())
        if low < 0 or high >= model.config.vocab_size:
            raise DataError(
                f"tokens {low}..{high} do not fit a vocabulary of {model.config.vocab_size}"
            )
        self.ranks.check(
            model.config, batch_size=settings.batch_size, sequence_length=settings.sequence_length
        )
        self.model = model
        self.losses = shard(model, self.ranks)
        self.data = data
        self.settings = settings
        self.optimizer = MuonAdamW(model, weight_decay=settings.weight_decay, ranks=self.ranks)
        self.steps_done = 0

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def step(self) -> StepReport:
        """One optimizer step.

        Where a loss or the gradient is not finite, the model is left as it was: the batch is
        passed over if the settings say "skip".

        Raises:
            TrainingError: if they say "raise". The message names the step, the first tensors that
                are not finite and the ranks that hold them.
        """
        s = self.settings
        self.model.train()
        self.optimizer.zero_grad()
        sums = torch.zeros(4, device=self.device)
        loads: list[Tensor] = []
        for i in range(s.accumulation):
            ids_BT = self.data.batch(self.steps_done * s.accumulation + i, s.batch_size)
            parts = self.losses(
                self.ranks.sequences(ids_BT).to(self.device),
                mtp_weight=s.mtp_weight,
                balance_weight=s.balance_weight,
            )
            (parts[0] / s.accumulation).backward()
            sums += torch.stack([part.detach() for part in parts[:4]])
            loads = [a + b for a, b in zip(loads, parts[4:], strict=True)] if loads else parts[4:]
        own = sums.clone()
        sums = self.ranks.sum(sums)
        norm = clip_gradients(self.optimizer.parameters, s.clip, self.ranks)
        measured = torch.cat([sums / s.accumulation, norm.float().view(1)]).tolist()
        loss, next_token, mtp, balance, grad_norm = measured
        lr = s.rate(self.steps_done)
        tokens = s.accumulation * s.batch_size * s.sequence_length
        skipped = not math.isfinite(grad_norm + loss)
        if skipped:
            found = self._not_finite(own)
            self.optimizer.zero_grad()
            message = (
                f"the gradient of step {self.steps_done} is not finite (loss {loss}): {found}; "
                f"a lower learning rate may help"
            )
            if s.not_finite == "raise":
                raise TrainingError(message)
            if self.ranks.rank == 0:
                logging.getLogger(__name__).warning("skipped: %s", message)
        else:
            self.optimizer.step(lr)
            self.optimizer.zero_grad()
            if loads:
                loads = list(self.ranks.sum(torch.stack(list(loads))))
            update_router_bias(self.model, loads, rate=s.bias_rate)
        self.steps_done += 1
        return StepReport(
            self.steps_done, loss, next_token, mtp, balance, grad_norm, lr, tokens, skipped
        )

    def _not_finite(self, losses: Tensor) -> str:
        """The first tensors that are NaN or infinite, and on which rank; all ranks must call it."""
        names = [
            name
            for name, value in zip(("loss", "next_token", "mtp", "balance"), losses, strict=True)
            if not value.isfinite()
        ][:1]
        for name, parameter in self.model.named_parameters():
            grad = parameter.grad
            if len(names) < 3 and grad is not None and not local(grad).isfinite().all():
                names.append(f"gradient of {name}")
        found = self.ranks.gather(names)
        texts = [f"{', '.join(x)} on rank {i}" for i, x in enumerate(found) if x]  # type: ignore
        return "; ".join(texts[:4]) or "the sum of finite gradients"

    def run(
        self,
        folder: str | os.PathLike[str],
        report: Callable[[StepReport], None],
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train up to `settings.steps`, saving under `folder` as set and at the end.

        Once `stop` is true on any rank, all save and return after the step they are in.

        Raises:
            TrainingError: before the first step if `save` would refuse `folder`, or by `step`.
        """
        self._refuse_later(Path(folder))
        every, total = self.settings.save_every, self.settings.steps
        while self.steps_done < total:
            report(self.step())
            stopping = bool(self.ranks.sum(torch.tensor(int(stop()), device=self.device)))
            if self.steps_done == total or stopping or (every and self.steps_done % every == 0):
                self.save(folder)
            if stopping:
                return

    @torch.no_grad()
    def evaluate(self, windows: Windows, batches: int) -> float:
        """Mean next-token loss, in nats per token, over the first `batches` batches."""
        if batches < 1:
            raise ValueError(f"batches must be positive, got {batches}")
        training = self.model.training
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(batches):
            ids_BT = windows.batch(i, self.settings.batch_size).to(self.device)
            total += self.losses(self.ranks.sequences(ids_BT), only_next=True)[0]
        self.losses.reshard()
        self.model.train(training)
        return float(self.ranks.sum(total)) / batches

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `folder`/step-NNNNNNNN, whole or not at all, and drop all but the last two.

        The model lies in its sub-folder `model`, which `KExaone.from_pretrained` loads. Only one
        trainer may save under `folder` at a time: what a killed one left half-written is removed.

        Raises:
            TrainingError: if `folder` holds a later step: another run's, which must not mix.
            OSError: if the disk is full or refuses; the earlier checkpoints are unchanged.
        """
        folder = Path(folder)
        self._refuse_later(folder)
        target = folder / folder_of(self.steps_done)
        record = {
            "settings": dataclasses.asdict(self.settings),
            "step": self.steps_done,
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "data": self.data.fingerprint,
        }
        if self.ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            remove(folder, ".step-*.tmp-*")
        if self.ranks.world > 1:
            record[CONFIG] = self.model.config.to_hf()
            save_state(self._state(), target, self.ranks, json.dumps(record, indent=2) + "\n")
        else:
            self._save_alone(target, json.dumps(record, indent=2) + "\n")
        if self.ranks.rank == 0:
            drop_old(folder)
        return target

    def _save_alone(self, target: Path, record: str) -> None:
        with atomic_directory(target) as temporary:
            self.model.save_pretrained(temporary / MODEL)
            state = {k: v.contiguous() for k, v in self.optimizer.state_dict().items()}
            try:
                save_file(state, temporary / OPTIMIZER)
            except SafetensorError as error:
                raise OSError(f"cannot write {target / OPTIMIZER}: {error}") from error
            (temporary / RECORD).write_text(record)

    def _state(self) -> dict[str, Tensor]:
        """Model and optimizer, each tensor as far as this rank holds it."""
        state = {f"model.{k}": v.detach() for k, v in self.model.state_dict().items()}
        return state | {f"optimizer.{k}": v for k, v in self.optimizer.state_dict().items()}

    def _refuse_later(self, folder: Path) -> None:
        newest = latest(folder)
        if newest is not None and step_of(newest) > self.steps_done:
            raise TrainingError(
                f"{folder} holds {newest.name}, later than step {self.steps_done}; resume from "
                f"it or use another folder"
            )

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        data: Windows,
        *,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ) -> Trainer:
        """Go on exactly where a run was saved; also sets torch's CPU random state.

        Args:
            folder: one step's folder, or the folder of a run, whose latest step is taken.
            data: the windows the run was trained on.
            device: where to train.
            ranks: the processes that go on; there may be more or fewer than before.

        Raises:
            TrainingError: if there is no whole checkpoint, or its files cannot be read or do not
                belong together.
            DataError: if `data` is not what the run was trained on.
        """
        source = Path(folder) if step_of(Path(folder)) >= 0 else latest(folder)
        if source is None or not (source / RECORD).is_file():
            raise TrainingError(f"no checkpoint to resume from in {folder}")
        try:
            record: dict[str, Any] = json.loads((source / RECORD).read_text())
            settings = TrainSettings(**record["settings"])
            step, fingerprint = int(record["step"]), str(record["data"])
            rng = random_state(record["rng"])
            shared = (source / STATE).is_dir()
            config = Config.from_hf(record[CONFIG]) if shared else None
            state = {} if shared else load_file(source / OPTIMIZER)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise TrainingError(f"cannot resume from {source}: {error}") from error
        if fingerprint != data.fingerprint:
            raise DataError(
                f"{source} was trained on other data: text, window length or seed differ"
            )
        try:
            model = KExaone(config) if config else KExaone.from_pretrained(source / MODEL)
            trainer = cls(model.to(device), data, settings, ranks)
            if shared:
                load_state(trainer._state(), source, trainer.ranks)
            else:
                trainer.optimizer.load_state_dict(state)
        except ValueError as error:
            raise TrainingError(f"cannot resume from {source}: {error}") from error
        trainer.steps_done = step
        torch.set_rng_state(rng)
        return trainer
