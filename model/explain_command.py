"""The `kexaone explain` command."""

from __future__ import annotations

import json as reader
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ..files import check_writable, write_json
from ..graph.explain import Explanation, explain, picture
from .config import PRESETS, Config
from .console import console

MEGA = 1e6


def explain_command(
    model: Annotated[str, typer.Argument(help="A preset, or a folder with a config.json.")] = "mid",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 512,
    training: Annotated[bool, typer.Option("--training", help="The loss of a step.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the graph here, a PNG.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write what was found here.")] = None,
) -> None:
    """What `kexaone.optimize` replaces in a transformers model, what it leaves, and the cost.

    The model is built without memory for its weights, and nothing is computed.
    """
    check_writable(plot, json)
    described = Config.preset(model).to_hf() if model in PRESETS else _read(Path(model))
    network = _build(described)
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    with nullcontext() if training else torch.no_grad():
        if training:
            found = explain(lambda ids: network(ids, labels=ids, use_cache=False).loss, ids)
        else:
            found = explain(network, ids, use_cache=False)
    terminal = console()
    if found.whole:
        raise ValueError(f"the graph of {model} cannot be rewritten: {found.whole}")
    terminal.print(_table(found))
    for place in found.places:
        if place.reason:
            terminal.print(f"{place.module or 'model'}: {place.name} stays: {place.reason}")
    terminal.print(
        f"results of the forward pass take at most {found.peak_before / MEGA:.0f} MB at a time, "
        f"{found.peak_after / MEGA:.0f} MB after"
    )
    if plot is not None:
        picture(found, plot, title=model)
    write_json(json, {"model": model, "batch": batch, "length": length, "training": training}
               | found.to_dict())  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is neither a preset nor a folder with a config.json")
    return reader.loads(file.read_text())


def _build(described: dict[str, Any]) -> torch.nn.Module:
    """transformers' model of a configuration, bfloat16, on the meta device."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("kexaone explain needs transformers: pip install transformers") from error
    kind = str(described.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model_type {kind!r}")
    config = transformers.CONFIG_MAPPING[kind](**described)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _table(found: Explanation) -> Table:
    """One line per run of equal layers."""
    table = Table()
    for name in ("layers", "replaced", "calls", "after", "MB moved", "after"):
        table.add_column(name, justify="left" if name in ("layers", "replaced") else "right")
    groups: list[tuple[list[str], dict[str, Any]]] = []
    for layer in found.layers:
        row = found.row(layer)
        body = {k: v for k, v in row.items() if k != "layer"}
        if groups and groups[-1][1] == body:
            groups[-1][0].append(layer)
        else:
            groups.append(([layer], body))
    for layers, row in groups:
        replaced = ", ".join(f"{n} {name}" for name, n in row["replaced"].items())
        table.add_row(
            layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}", replaced,
            str(row["calls_before"]), str(row["calls_after"]),
            f"{row['bytes_before'] / MEGA:.1f}", f"{row['bytes_after'] / MEGA:.1f}",
        )  # fmt: skip
    return table
