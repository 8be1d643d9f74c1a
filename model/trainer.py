"""Training with bit-exact resume: one optimizer step at a time, checkpoints as whole folders."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import atomic_directory
from .data import DataError, Windows
from .losses import next_token_loss, training_loss, update_router_bias
from .optimizer import MuonAdamW, clip_gradients
from .schedule import learning_rate
from .transformer import KExaone

MODEL, OPTIMIZER, TRAINER = "model", "optimizer.safetensors", "trainer.json"
KEPT_CHECKPOINTS = 2
MAX_RATE, MAX_PASS = 1e6, 1 << 24


class TrainingError(ValueError):
    """Settings out of range, a checkpoint that cannot be resumed, or a loss that diverged."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that shapes a run besides model and data.

    One step takes `accumulation` batches of `batch_size` windows. The learning rate rises for
    `warmup` steps and falls over the last `decay_fraction` of all `steps`; a run too short for
    both cuts the warmup. `save_every` 0 saves only at the end.

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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
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


class Trainer:
    """Trains a model in place.

    Raises:
        DataError: if windows and settings disagree on the length, or a token is not in the
            model's vocabulary.
    """

    def __init__(self, model: KExaone, data: Windows, settings: TrainSettings) -> None:
        if data.length != settings.sequence_length:
            raise DataError(
                f"windows have {data.length} tokens, settings ask for {settings.sequence_length}"
            )
        low, high = int(data.tokens.min()), int(data.tokens.max())
        if low < 0 or high >= model.config.vocab_size:
            raise DataError(
                f"tokens {low}..{high} do not fit a vocabulary of {model.config.vocab_size}"
            )
        self.model = model
        self.data = data
        self.settings = settings
        self.optimizer = MuonAdamW(model, weight_decay=settings.weight_decay)
        self.steps_done = 0

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def step(self) -> StepReport:
        """One optimizer step.

        Raises:
            TrainingError: if the gradient is not finite; the model is then left as it was.
        """
        s = self.settings
        self.model.train()
        self.optimizer.zero_grad()
        sums = torch.zeros(4, device=self.device)
        loads: list[Tensor] = []
        for i in range(s.accumulation):
            ids_BT = self.data.batch(self.steps_done * s.accumulation + i, s.batch_size)
            result = training_loss(
                self.model,
                ids_BT.to(self.device),
                mtp_weight=s.mtp_weight,
                balance_weight=s.balance_weight,
            )
            (result.total / s.accumulation).backward()
            parts = (result.total, result.next_token, result.mtp, result.balance)
            sums += torch.stack([part.detach() for part in parts])
            new = result.expert_loads
            loads = [a + b for a, b in zip(loads, new, strict=True)] if loads else list(new)
        norm = clip_gradients(self.optimizer.parameters, s.clip)
        measured = torch.cat([sums / s.accumulation, norm.float().view(1)]).tolist()
        loss, next_token, mtp, balance, grad_norm = measured
        if not math.isfinite(grad_norm):
            self.optimizer.zero_grad()
            raise TrainingError(
                f"the gradient of step {self.steps_done} is not finite (loss {loss}); "
                f"a lower learning rate may help"
            )
        lr = s.rate(self.steps_done)
        self.optimizer.step(lr)
        self.optimizer.zero_grad()
        update_router_bias(self.model, loads, rate=s.bias_rate)
        self.steps_done += 1
        tokens = s.accumulation * s.batch_size * s.sequence_length
        return StepReport(self.steps_done, loss, next_token, mtp, balance, grad_norm, lr, tokens)

    def run(self, folder: str | os.PathLike[str], report: Callable[[StepReport], None]) -> None:
        """Train up to `settings.steps`, saving under `folder` as set and at the end.

        Raises:
            TrainingError: before the first step if `save` would refuse `folder`, or by `step`.
        """
        self._refuse_later(Path(folder))
        every, total = self.settings.save_every, self.settings.steps
        while self.steps_done < total:
            report(self.step())
            if self.steps_done == total or (every and self.steps_done % every == 0):
                self.save(folder)

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
            total += next_token_loss(self.model, ids_BT)
        self.model.train(training)
        return float(total) / batches

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
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder, ".step-*.tmp-*")
        target = folder / f"step-{self.steps_done:08d}"
        record = {
            "settings": dataclasses.asdict(self.settings),
            "step": self.steps_done,
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "data": self.data.fingerprint,
        }
        with atomic_directory(target) as temporary:
            self.model.save_pretrained(temporary / MODEL)
            state = {k: v.contiguous() for k, v in self.optimizer.state_dict().items()}
            try:
                save_file(state, temporary / OPTIMIZER)
            except SafetensorError as error:
                raise OSError(f"cannot write {target / OPTIMIZER}: {error}") from error
            (temporary / TRAINER).write_text(json.dumps(record, indent=2) + "\n")
        for old in _whole(folder)[:-KEPT_CHECKPOINTS]:
            # renamed first: a kill in the middle must not leave half a folder under a good name
            old.rename(old.with_name(f".{old.name}.old"))
        _remove(folder, ".step-*")
        return target

    def _refuse_later(self, folder: Path) -> None:
        newest = latest(folder)
        if newest is not None and _step_of(newest) > self.steps_done:
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
    ) -> Trainer:
        """Go on exactly where a run was saved; also sets torch's CPU random state.

        Args:
            folder: one step's folder, or the folder of a run, whose latest step is taken.
            data: the windows the run was trained on.
            device: where to train.

        Raises:
            TrainingError: if there is no whole checkpoint, or its files cannot be read or do not
                belong together.
            DataError: if `data` is not what the run was trained on.
        """
        source = Path(folder) if _step_of(Path(folder)) >= 0 else latest(folder)
        if source is None or not (source / TRAINER).is_file():
            raise TrainingError(f"no checkpoint to resume from in {folder}")
        try:
            record: dict[str, Any] = json.loads((source / TRAINER).read_text())
            settings = TrainSettings(**record["settings"])
            step, fingerprint = int(record["step"]), str(record["data"])
            rng = _random_state(record["rng"])
            state = load_file(source / OPTIMIZER)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise TrainingError(f"cannot resume from {source}: {error}") from error
        if fingerprint != data.fingerprint:
            raise DataError(
                f"{source} was trained on other data: text, window length or seed differ"
            )
        try:
            model = KExaone.from_pretrained(source / MODEL)
            trainer = cls(model.to(device), data, settings)
            trainer.optimizer.load_state_dict(state)
        except ValueError as error:
            raise TrainingError(f"cannot resume from {source}: {error}") from error
        trainer.steps_done = step
        torch.set_rng_state(rng)
        return trainer


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole step folder of a run, or None."""
    return max(_whole(Path(folder)), key=_step_of, default=None)


def _whole(folder: Path) -> list[Path]:
    """Step folders under their final name, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _step_of(p) >= 0 and (p / TRAINER).is_file()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else -1


def _remove(folder: Path, pattern: str) -> None:
    for doomed in folder.glob(pattern):
        shutil.rmtree(doomed)


def _random_state(text: str) -> Tensor:
    """Torch's CPU random state from base64, checked but not set."""
    data = bytearray(base64.b64decode(text, validate=True))
    size = len(torch.get_rng_state())
    if len(data) != size:
        raise ValueError(f"the random state must have {size} bytes, got {len(data)}")
    state = torch.frombuffer(data, dtype=torch.uint8)
    torch.Generator().set_state(state)
    return state
