"""The commands of the model: `kexaone demo`, `train` and `info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..files import check_writable, write_json
from . import console as ui
from .cache import cache_bytes
from .config import PRESETS, Config

DataPaths = Annotated[
    list[Path] | None,
    typer.Option("--data", help="Text file, repeatable. Default: Python's own library."),
]


def info(
    model: Annotated[str, typer.Argument(help="A preset, or a checkpoint folder.")] = "mini",
    context: Annotated[int, typer.Option(help="Tokens of context to size the caches for.")] = 8192,
    json: ui.JsonPath = None,
) -> None:
    """Architecture, exact parameter counts and cache size of a preset or checkpoint."""
    config = Config.preset(model) if model in PRESETS else _config_of(model)
    if context < 1:
        raise ValueError(f"context must be >= 1, got {context}")
    check_writable(json)
    counts = config.parameter_counts()
    sizes = cache_bytes(config, context, chunk=512, drafts=0, itemsize=2)
    windowed = sum(w > 0 for w in config.windows)
    table = Table(title=model, show_header=False)
    table.add_row(
        "layers",
        f"{config.num_hidden_layers} ({windowed} windowed, {config.num_hidden_layers - windowed} "
        f"global; {config.first_k_dense_replace} dense), {len(config.mtp_windows)} MTP",
    )
    table.add_row(
        "hidden, heads",
        f"{config.hidden_size}, {config.num_attention_heads} queries / "
        f"{config.num_key_value_heads} keys x {config.head_dim}",
    )
    table.add_row(
        "experts",
        f"{config.num_experts}, {config.num_experts_per_tok} per token, "
        f"{config.num_shared_experts} shared, width {config.moe_intermediate_size}",
    )
    for name, count in counts.items():
        table.add_row(f"parameters: {name}", f"{count:,}")
    for name, size in sizes.items():
        table.add_row(f"cache bytes at {context:,} tokens, 16-bit: {name}", f"{size:,}")
    ui.console().print(table)
    write_json(
        json,
        {
            "model": model,
            "config": config.to_hf(),
            "parameters": counts,
            "context": context,
            "cache_bytes": sizes,
        },
    )


def _config_of(name: str) -> Config:
    if not Path(name).exists():
        raise ValueError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a folder")
    return Config.from_hf(name)


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")],
    preset: Annotated[
        str | None, typer.Option(help="Architecture to train from scratch. Default: mini.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder to start from.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder with a tokenizer.json. Default: the model's, or bytes."),
    ] = None,
    data: DataPaths = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in OUT.")] = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences per pass.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    accumulation: Annotated[int, typer.Option(help="Passes per step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak rate.")] = 3e-4,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    tp: Annotated[int, typer.Option(help="Ranks that share a sequence, under torchrun.")] = 1,
    ep: Annotated[int, typer.Option(help="Ranks that share the experts, under torchrun.")] = 1,
    not_finite: Annotated[
        str, typer.Option(help="Gradient with NaN: raise, or skip its batches.")
    ] = "raise",
    json: ui.JsonPath = None,
) -> None:
    """Train on text: Muon and AdamW, WSD schedule, MTP and balance losses, exact resume."""
    from .training_run import Options, run_training

    if preset and model:
        raise ValueError("give either --preset or --model")
    check_writable(json)
    options = Options(
        out=out,
        preset=preset or "mini",
        model=model,
        tokenizer=tokenizer,
        data=tuple(data or ()),
        resume=resume,
        tp=tp,
        ep=ep,
        settings={
            "steps": steps,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "accumulation": accumulation,
            "learning_rate": learning_rate,
            "save_every": save_every,
            "seed": seed,
            "not_finite": not_finite,
        },
    )
    result = run_training(options, ui.console())
    if result["rank"] == 0:
        write_json(json, result)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model and picture.")] = Path(
        "kexaone-demo"
    ),
    data: DataPaths = None,
    minutes: Annotated[float, typer.Option(help="Training time to aim for.")] = 2.5,
    drafts: Annotated[int, typer.Option(help="MTP drafts per step.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    json: ui.JsonPath = None,
) -> None:
    """Train the mini model on real text, then generate with and without MTP drafts."""
    from .demo import DemoOptions, run_demo

    check_writable(json)
    options = DemoOptions(
        out=out, data=tuple(data or ()), minutes=minutes, drafts=drafts, tokens=tokens, seed=seed
    )
    write_json(json, run_demo(options, ui.console()))
