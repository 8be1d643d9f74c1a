"""The main job on real text: train `mini`, then generate with and without MTP drafts."""

from __future__ import annotations

import io
import math
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..files import atomic_write, check_folder
from .config import Config, ConfigError
from .data import Windows, bigram_entropy
from .generation import MAX_DRAFTS, Generation, Generator
from .sampling import Sampling
from .trainer import StepReport, Trainer, TrainSettings
from .training_run import Corpus, export, read_data, train_with_progress, validation_loss
from .transformer import KExaone

PROMPT_TOKENS, PROMPTS, SAMPLED_TOKENS = 256, 4, 400
NEWLINE, MAX_TOKENS = 10, 100_000
MIN_STEPS, MAX_STEPS = 20, 2000


@dataclass(frozen=True)
class DemoOptions:
    """What `kexaone demo` was asked for. Raises ConfigError if a value is out of range."""

    out: Path
    data: tuple[Path, ...] = ()
    minutes: float = 2.5
    drafts: int = 2
    tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise ConfigError(f"minutes must be positive, got {self.minutes}")
        if not 1 <= self.drafts <= MAX_DRAFTS:
            raise ConfigError(f"drafts must lie in 1..{MAX_DRAFTS}, got {self.drafts}")
        if not 1 <= self.tokens <= MAX_TOKENS:
            raise ConfigError(f"tokens must lie in 1..{MAX_TOKENS}, got {self.tokens}")


def run_demo(options: DemoOptions, terminal: Console) -> dict[str, Any]:
    """Everything the demo prints, returned for `--json`."""
    config = Config.preset("mini")
    picture = options.out / "loss.png"
    check_folder(options.out)
    if picture.is_dir():
        raise ConfigError(f"cannot write {picture}: it is a folder")
    corpus = read_data(options.data, config, None)
    windows = Windows(corpus.train, 256, seed=options.seed)
    entropy = bigram_entropy(corpus.train, corpus.validation, vocab_size=config.vocab_size)
    settings = TrainSettings(
        steps=MAX_STEPS, learning_rate=4e-3, decay_fraction=0.4, warmup=10, seed=options.seed
    )
    torch.manual_seed(options.seed)
    trainer = Trainer(KExaone(config), windows, settings)
    terminal.print(
        f"training mini ({config.parameter_counts()['total']:,} parameters) on "
        f"{len(corpus.train):,} bytes of text for {options.minutes:g} minutes"
    )
    start = time.perf_counter()
    budget = _Budget(trainer, options.minutes)
    reports = train_with_progress(trainer, None, terminal, after_step=budget.plan)
    seconds = time.perf_counter() - start
    loss = validation_loss(trainer, corpus.validation)
    result: dict[str, Any] = {
        "parameters": config.parameter_counts()["total"],
        "steps": trainer.steps_done,
        "training_seconds": seconds,
        "training_tokens_per_second": sum(r.tokens for r in reports) / seconds,
        "losses": [[r.step, r.next_token, r.mtp] for r in reports],
        "validation_loss": loss,
        "bigram_entropy": entropy,
    }
    # the model first: it is what took the time
    export(trainer.model, corpus.tokenizer, options.out / "model")
    draw_losses(reports, entropy, loss, picture)
    terminal.print(
        f"trained at {result['training_tokens_per_second']:,.0f} tokens/s; validation loss "
        f"{loss or math.nan:.3f} nats per byte (byte bigram: {entropy:.3f})\n"
        f"saved {picture} and {options.out / 'model'}"
    )
    return result | _compare_decoding(trainer.model.eval(), corpus, options, terminal)


class _Budget:
    """Plans as many steps as fit the time, anew after each: other programs may take turns.

    The learning rate stays at its peak until the decay begins, so a new plan rewrites no past.
    """

    def __init__(self, trainer: Trainer, minutes: float) -> None:
        self.trainer = trainer
        self.seconds = 60 * minutes
        self.start = time.perf_counter()

    def plan(self) -> None:
        done = self.trainer.steps_done
        elapsed = time.perf_counter() - self.start
        # the first step pays for allocations and would mislead
        if done >= 3:
            steps = max(MIN_STEPS, min(MAX_STEPS, int(done * self.seconds / elapsed)), done)
            self.trainer.settings = replace(self.trainer.settings, steps=steps)


def _prompts(tokens: torch.Tensor) -> list[list[int]]:
    """Prompts evenly spread over the held-out text, each ending after a line's first word."""
    text = bytes(t if t < 256 else NEWLINE for t in tokens.tolist())
    prompts = []
    for i in range(PROMPTS):
        end = max(PROMPT_TOKENS, len(text) * (i + 1) // (PROMPTS + 1))
        # a blank would let a small model indent for ever
        if found := re.compile(rb"\n[A-Za-z]+ ").search(text, end):
            end = found.end()
        prompts.append(tokens[max(0, end - PROMPT_TOKENS) : end].tolist())
    return prompts


def _compare_decoding(
    model: KExaone, corpus: Corpus, options: DemoOptions, terminal: Console
) -> dict[str, Any]:
    """Continue held-out prompts plainly and speculatively in turn, then show a sampled text."""
    prompts = _prompts(corpus.validation)
    context = max(map(len, prompts)) + options.tokens
    generators = [
        Generator(model, batch=1, context=context, drafts=drafts) for drafts in (0, options.drafts)
    ]
    # first once unmeasured: kernels are compiled, and steps recorded
    for generate in generators:
        generate(prompts[:1], max_new_tokens=options.tokens, stop_ids=())
    runs: tuple[list[Generation], list[Generation]] = [], []
    # one prompt at a time and in turn, so that a busy machine slows both alike
    for prompt in prompts:
        for generate, done in zip(generators, runs, strict=True):
            done.append(generate([prompt], max_new_tokens=options.tokens, stop_ids=()))
    plain, fast = runs
    proposed = sum(r.statistics.drafted for r in fast)
    speeds = [statistics.median(r.statistics.tokens_per_second for r in rs) for rs in (plain, fast)]
    ratios = [
        f.statistics.tokens_per_second / p.statistics.tokens_per_second
        for p, f in zip(plain, fast, strict=True)
    ]
    sampled = generators[1](
        prompts[:1],
        max_new_tokens=SAMPLED_TOKENS,
        sampling=Sampling(temperature=0.8, top_p=0.95, seed=options.seed),
        stop_ids=(),
    )
    figures = {
        "drafts": options.drafts,
        "prompts": len(prompts),
        "tokens_per_second_plain": speeds[0],
        "tokens_per_second_speculative": speeds[1],
        "speedup": statistics.median(ratios),
        "acceptance": sum(r.statistics.accepted for r in fast) / proposed if proposed else None,
        "acceptance_sampled": sampled.statistics.acceptance,
        "identical": [p.token_ids for p in plain] == [f.token_ids for f in fast],
        "prompt": corpus.tokenizer.decode(prompts[0]),
        "text": corpus.tokenizer.decode(sampled.token_ids[0]),
    }
    terminal.print("--- prompt, from held-out text ---\n" + figures["prompt"], soft_wrap=True)
    terminal.print(
        f"--- continuation, sampled ({figures['acceptance_sampled']:.0%} of drafts accepted) ---\n"
        + figures["text"],
        soft_wrap=True,
    )
    terminal.print(
        f"--- greedy decoding of {len(prompts)} prompts: {speeds[0]:.0f} tokens/s plain, "
        f"{speeds[1]:.0f} with {options.drafts} MTP drafts "
        f"({figures['acceptance'] or 0:.0%} accepted): {figures['speedup']:.2f}x, outputs "
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
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(path, picture.getvalue())
