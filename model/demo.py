"""The main job on real text: train `mini`, then generate with and without MTP drafts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .config import Config, ConfigError
from .data import Windows, bigram_entropy
from .generation import Generation, generate
from .trainer import StepReport, Trainer, TrainSettings
from .training_run import Corpus, export, read_data, train_with_progress, validation_loss
from .transformer import KExaone

PROMPT_TOKENS = 256
MIN_STEPS, MAX_STEPS = 20, 2000


@dataclass(frozen=True)
class DemoOptions:
    """What `kexaone demo` was asked for. Raises ConfigError if a value is out of range."""

    out: Path
    data: tuple[Path, ...] = ()
    minutes: float = 2.5
    drafts: int = 2
    tokens: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise ConfigError(f"minutes must be positive, got {self.minutes}")
        if not 1 <= self.drafts <= 8:
            raise ConfigError(f"drafts must lie in 1..8, got {self.drafts}")
        if self.tokens < 1:
            raise ConfigError(f"tokens must be >= 1, got {self.tokens}")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is a file, and the demo needs a folder there")


def run_demo(options: DemoOptions, terminal: Console) -> dict[str, Any]:
    """Everything the demo prints, returned for `--json`."""
    config = Config.preset("mini")
    corpus = read_data(options.data, config, None)
    options.out.mkdir(parents=True, exist_ok=True)
    windows = Windows(corpus.train, 256, seed=options.seed)
    entropy = bigram_entropy(corpus.train, corpus.validation, vocab_size=config.vocab_size)
    settings = _settings(options, config, windows)
    torch.manual_seed(options.seed)
    trainer = Trainer(KExaone(config), windows, settings)
    terminal.print(
        f"training mini ({config.parameter_counts()['total']:,} parameters) on "
        f"{len(corpus.train):,} bytes of text, {settings.steps} steps"
    )
    start = time.perf_counter()
    reports = train_with_progress(trainer, None, terminal)
    seconds = time.perf_counter() - start
    loss = validation_loss(trainer, corpus.validation)
    result: dict[str, Any] = {
        "parameters": config.parameter_counts()["total"],
        "steps": settings.steps,
        "training_seconds": seconds,
        "training_tokens_per_second": sum(r.tokens for r in reports) / seconds,
        "losses": [[r.step, r.next_token, r.mtp] for r in reports],
        "validation_loss": loss,
        "bigram_entropy": entropy,
    }
    picture = options.out / "loss.png"
    draw_losses(reports, entropy, loss, picture)
    export(trainer.model, corpus.tokenizer, options.out / "model")
    terminal.print(
        f"trained at {result['training_tokens_per_second']:,.0f} tokens/s; validation loss "
        f"{loss or math.nan:.3f} nats per byte (byte bigram: {entropy:.3f})\n"
        f"saved {picture} and {options.out / 'model'}"
    )
    return result | _compare_decoding(trainer.model.eval(), corpus, options, terminal)


def _settings(options: DemoOptions, config: Config, windows: Windows) -> TrainSettings:
    """As many steps as fit the time on this machine, judged by three steps of a throwaway model."""

    def settings(steps: int) -> TrainSettings:
        return TrainSettings(
            steps=steps, learning_rate=4e-3, decay_fraction=0.4, warmup=10, seed=options.seed
        )

    probe = Trainer(KExaone(config), windows, settings(3))
    probe.step()
    start = time.perf_counter()
    probe.step()
    probe.step()
    per_step = (time.perf_counter() - start) / 2
    return settings(max(MIN_STEPS, min(MAX_STEPS, int(60 * options.minutes / per_step))))


def _compare_decoding(
    model: KExaone, corpus: Corpus, options: DemoOptions, terminal: Console
) -> dict[str, Any]:
    """Generate the same text plainly and speculatively, turn by turn, and print both figures."""
    prompt = corpus.validation[:PROMPT_TOKENS].tolist()
    runs: dict[int, list[Generation]] = {0: [], options.drafts: []}
    # interleaved, so that a busy machine slows both alike
    for _ in range(3):
        for drafts, done in runs.items():
            done.append(
                generate(model, [prompt], max_new_tokens=options.tokens, drafts=drafts, stop_ids=())
            )
    plain, speculative = runs[0], runs[options.drafts]

    def speed(results: list[Generation]) -> float:
        return sorted(r.statistics.tokens_per_second for r in results)[1]

    outputs = {tuple(r.token_ids[0]) for r in (*plain, *speculative)}
    figures = {
        "drafts": options.drafts,
        "tokens_per_second_plain": speed(plain),
        "tokens_per_second_speculative": speed(speculative),
        "speedup": speed(speculative) / speed(plain),
        "acceptance": speculative[0].statistics.acceptance,
        "identical": len(outputs) == 1,
        "prompt": corpus.tokenizer.decode(prompt),
        "text": corpus.tokenizer.decode(plain[0].token_ids[0]),
    }
    terminal.print("--- prompt, from a held-out file ---\n" + figures["prompt"], soft_wrap=True)
    terminal.print("--- continuation ---\n" + figures["text"], soft_wrap=True)
    terminal.print(
        f"--- {figures['tokens_per_second_plain']:.0f} tokens/s plain, "
        f"{figures['tokens_per_second_speculative']:.0f} with {options.drafts} MTP drafts "
        f"({figures['acceptance']:.0%} accepted): {figures['speedup']:.2f}x, outputs "
        f"{'identical' if figures['identical'] else 'DIFFERENT'}"
    )
    return figures


def draw_losses(
    reports: list[StepReport], entropy: float, validation: float | None, path: Path
) -> None:
    """A PNG of the training losses, with the bigram entropy to beat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [r.step for r in reports]
    axes.plot(steps, [r.next_token for r in reports], label="next token")
    axes.plot(steps, [r.mtp for r in reports], label="second token (MTP)", alpha=0.7)
    axes.axhline(entropy, color="grey", linestyle="--", label="byte bigram")
    if validation is not None:
        axes.plot(steps[-1:], [validation], "o", label=f"validation {validation:.3f}")
    axes.set(xlabel="step", ylabel="nats per byte", title="kexaone demo: mini")
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
