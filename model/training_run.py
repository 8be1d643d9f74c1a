"""One training run from data to a checkpoint that can be generated from: the job of `train`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer

from ..files import atomic_write, check_folder
from . import console as ui
from .allocator import keep_freed_memory
from .config import Config
from .data import DataError, Windows, encode_bytes, read_corpus, stdlib_source, tokenize
from .parallel.ranks import Ranks, connect, restarted
from .parallel.shard import gathered
from .step_folders import latest
from .stopping import stop_on_signals
from .tokenizer import FILE, byte_tokenizer, load_tokenizer
from .trainer import StepReport, Trainer, TrainSettings
from .transformer import KExaone

HELD_OUT = 0.05


@dataclass(frozen=True)
class Corpus:
    """Text as tokens, and the tokenizer that made them."""

    train: torch.Tensor
    validation: torch.Tensor
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Options:
    """What `kexaone train` was asked for; `settings` are fields of TrainSettings."""

    out: Path
    preset: str = "mini"
    model: Path | None = None
    tokenizer: Path | None = None
    data: tuple[Path, ...] = ()
    resume: bool = False
    tp: int = 1
    ep: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


def find_tokenizer(config: Config, folder: Path | None) -> Tokenizer:
    """The tokenizer of `folder`, or the byte tokenizer for a model made for bytes.

    Raises TokenizerError, or DataError if bytes would collide with the model's special tokens.
    """
    if folder is not None:
        return load_tokenizer(folder, config)
    if config.eos_token_ids != (257,) or config.vocab_size < 259:
        raise DataError("this model is not made for bytes as tokens: give --tokenizer FOLDER")
    return byte_tokenizer()


def read_data(paths: tuple[Path, ...], config: Config, tokenizer_folder: Path | None) -> Corpus:
    """Tokens of the files, their last 5 % held out; without files, Python's standard library."""
    tokenizer = find_tokenizer(config, tokenizer_folder)
    is_bytes = tokenizer.to_str() == byte_tokenizer().to_str()

    def encode(text: bytes) -> torch.Tensor:
        if is_bytes:
            return encode_bytes(text)
        try:
            return torch.tensor(tokenizer.encode(text.decode("utf-8")).ids, dtype=torch.int32)
        except UnicodeDecodeError:
            raise DataError("training data is not UTF-8 text") from None

    eos = config.eos_token_ids[0] if config.eos_token_ids else 0
    if not paths:
        split = stdlib_source()
        train, validation = (tokenize(d, eos=eos, encode=encode) for d in split)
    else:
        tokens = tokenize(read_corpus(paths), eos=eos, encode=encode)
        kept = math.ceil(len(tokens) * (1 - HELD_OUT))
        train, validation = tokens[:kept], tokens[kept:]
    return Corpus(train, validation, tokenizer)


def run_training(options: Options, terminal: Console) -> dict[str, Any]:
    """Train as asked, show progress, save; returns the measurements for `--json`.

    Under torchrun every process calls this. After a restart, the run goes on from its newest
    checkpoint, if it has one.
    """
    settings = TrainSettings(**options.settings)
    ranks = connect(tp=options.tp, ep=options.ep)
    terminal.quiet = terminal.quiet or ranks.rank > 0
    if restarted() and latest(options.out) is not None:
        options = replace(options, resume=True)
    check_folder(options.out)
    config = Config.from_hf(options.model) if options.model else Config.preset(options.preset)
    if settings.sequence_length > config.max_position_embeddings:
        raise DataError(
            f"sequences of {settings.sequence_length} tokens exceed the model's context of "
            f"{config.max_position_embeddings}"
        )
    # weights, gradients and one running mean at least, in float32
    size = config.parameter_counts()["total"]
    ui.check_memory(12 * size, f"training {size:,} parameters")
    corpus = read_data(options.data, config, options.tokenizer or options.model)
    windows = Windows(corpus.train, settings.sequence_length, seed=settings.seed)
    trainer = _trainer(options, settings, config, windows, ranks)
    before = trainer.steps_done
    terminal.print(
        f"training {config.parameter_counts()['total']:,} parameters on {len(corpus.train):,} "
        f"tokens, steps {before + 1} to {trainer.settings.steps}"
    )
    reports = train_with_progress(trainer, options.out, terminal)
    result: dict[str, Any] = {
        "rank": ranks.rank,
        "steps": trainer.steps_done,
        "resumed_from": before if options.resume else None,
        "losses": [[r.step, r.next_token] for r in reports],
        "skipped": [r.step for r in reports if r.skipped],
    }
    if trainer.steps_done < trainer.settings.steps:
        terminal.print(f"stopped and saved at step {trainer.steps_done}; --resume goes on")
        return result
    result["validation_loss"] = validation_loss(trainer, corpus.validation)
    final = options.out / "model"
    whole = gathered(trainer.model, ranks)
    if whole is not None:
        export(whole, corpus.tokenizer, final)
    if result["validation_loss"] is not None:
        terminal.print(f"validation loss {result['validation_loss']:.4f} nats per token")
    terminal.print(f"saved {final}")
    return result | {"model": str(final)}


def _trainer(
    options: Options, settings: TrainSettings, config: Config, windows: Windows, ranks: Ranks
) -> Trainer:
    if not options.resume:
        torch.manual_seed(settings.seed)
        source = options.model
        model = KExaone.from_pretrained(source) if source else KExaone(config)
        return Trainer(model, windows, settings, ranks)
    trainer = Trainer.resume(options.out, windows, ranks=ranks)
    # a longer run may go on with more steps; everything else must stay as it was
    if replace(settings, steps=1) != replace(trainer.settings, steps=1):
        raise DataError("the options differ from those of the run to resume")
    if settings.steps <= trainer.steps_done:
        raise DataError(
            f"the run already has {trainer.steps_done} steps, asked for {settings.steps}"
        )
    trainer.settings = settings
    return trainer


def train_with_progress(
    trainer: Trainer,
    out: Path | None,
    terminal: Console,
    *,
    after_step: Callable[[], None] = lambda: None,
) -> list[StepReport]:
    """All remaining steps with a progress bar; saves under `out` unless it is None.

    `after_step` may change the number of steps in the trainer's settings.
    """
    reports: list[StepReport] = []
    with keep_freed_memory(), ui.progress(terminal) as bar:
        done, total = trainer.steps_done, trainer.settings.steps
        task = bar.add_task("training", total=total, completed=done, note="")

        def show(report: StepReport) -> None:
            reports.append(report)
            after_step()
            bar.update(
                task,
                completed=report.step,
                total=trainer.settings.steps,
                note=f"loss {report.next_token:.3f}",
            )

        if out is None:
            while trainer.steps_done < trainer.settings.steps:
                show(trainer.step())
        else:
            with stop_on_signals() as stop:
                trainer.run(out, show, stop=stop)
    return reports


def validation_loss(trainer: Trainer, tokens: torch.Tensor, *, limit: int = 16) -> float | None:
    """Nats per held-out token over at most `limit` batches; None if there are too few tokens."""
    if len(tokens) < trainer.settings.sequence_length:
        return None
    held_out = Windows(tokens, trainer.settings.sequence_length, seed=0)
    batches = max(1, min(limit, len(held_out) // trainer.settings.batch_size))
    return trainer.evaluate(held_out, batches)


def export(model: KExaone, tokenizer: Tokenizer, folder: Path) -> None:
    """Save model and tokenizer as a folder that `kexaone generate` and transformers load."""
    model.save_pretrained(folder)
    atomic_write(folder / FILE, tokenizer.to_str(pretty=False))
