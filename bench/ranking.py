"""Judging choices of tiles that others found by measurement: `kexaone bench --predict FOLDER`.

The folder holds `index.csv` and the files it lists, each the fastest configuration of one Triton
kernel (the expert layer of vLLM and SGLang) for each number of tokens. There are no times in them:
what can be asked is how the model times the published winner among all configurations that were
tried, and whether its own choice is ever slower, by its own account, than the framework's default.

Both products of a layer run with one configuration. Tokens choose their experts evenly.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..autotune.model import Machine, machines, predict
from ..autotune.workloads import SIZES, Product, Tile, product_work, routed
from ..kernels.arch import ARCHS
from .published import machine_of

CLOSE = 1.05
TOP = 8
_KEYS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
_NVIDIA = ((16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128, 256), (1, 16, 32, 64), (4, 8),
           (2, 3, 4, 5))  # fmt: skip
_AMD = ((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (32, 64, 128, 256), (1, 4, 8, 16, 32),
        (1, 2, 4, 8), (2,))  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One problem: `tokens` through `experts`, `width` wide, of a model with `hidden` features."""

    gpu: str
    experts: int
    width: int
    hidden: int
    top_k: int
    kind: str
    block: bool
    tokens: int


@dataclass(frozen=True)
class Verdict:
    """How one published winner does: its time over the best, and its place among the shapes.

    `place` counts the different tiles (M, N, K) that are predicted faster, `equal` is the part of
    all of them within 5 % of the best: where it is large, the model says little. `default` is the
    time of the framework's default over our best.
    """

    layer: Layer
    file: str
    ratio: float
    place: int
    equal: float
    default: float


def layers(folder: Path) -> list[tuple[Layer, str, dict[str, int]]]:
    """The problems whose sizes are known, their file, and their winners. Raises ValueError."""
    index = folder / "index.csv"
    if not index.is_file():
        raise ValueError(f"{folder} has no index.csv")
    found = []
    with open(index, newline="") as file:
        for line in csv.DictReader(file):
            hidden, top_k = line["hidden_size_if_known"], line["top_k_if_known"]
            gpu = machine_of(line["gpu"].replace("_", " "))
            if line["gemm"] != "both" or not hidden or not top_k or gpu is None:
                continue
            kind = "fp8" if "fp8" in line["dtype"] else "bf16"
            if kind not in machines()[gpu].matrix_flops_per_clock:
                continue
            winners = json.loads((folder / line["file"]).read_text())
            for tokens, config in winners.items():
                if tokens.isdigit():
                    layer = Layer(gpu, int(line["E"]), int(line["N"]), int(hidden), int(top_k),
                                  kind, bool(line["block_shape"]), int(tokens))  # fmt: skip
                    found.append((layer, line["file"], config))
    return found


def tile_of(config: dict[str, int], layer: Layer) -> Tile:
    """A published configuration; a block scale caps the depth of a step."""
    m, n, k, group, warps, stages = (config[name] for name in _KEYS)
    return Tile(m, n, min(k, 128) if layer.block else k, group, warps, stages, 0.0, True)


def candidates(layer: Layer) -> list[Tile]:
    """Every tile that the published tuners try and that fits the GPU."""
    machine = machines()[layer.gpu]
    space = _AMD if machine.arch.startswith("gfx") else _NVIDIA
    found = [Tile(*sizes, 0.0, True) for sizes in itertools.product(*space)]
    if layer.block:
        found = [t for t in found if t.k <= 128]
    return [t for t in found if _fits(t, layer, machine)]


def _fits(tile: Tile, layer: Layer, machine: Machine) -> bool:
    stage = (tile.m + tile.n) * tile.k * SIZES[layer.kind]
    arch = ARCHS[machine.arch]
    held = tile.stages - (arch.backend == "hip")
    sums = tile.m * tile.n / (tile.warps * arch.warp_size)
    return stage * held <= arch.shared_bytes and sums <= 256


def layer_us(layer: Layer, tile: Tile) -> float:
    """The predicted time of both products with one tile."""
    machine = machines()[layer.gpu]
    shared = ARCHS[machine.arch].shared_bytes
    up, down = _products(layer)
    return sum(predict(product_work(p, tile, machine, shared), machine).us for p in (up, down))


@functools.lru_cache(maxsize=256)
def _products(layer: Layer) -> tuple[Product, Product]:
    groups = routed(layer.tokens, layer.experts, layer.top_k)
    scaled = layer.block
    up = Product(groups, 2 * layer.width, layer.hidden, layer.kind, scaled=scaled,
                 gathered=layer.tokens)  # fmt: skip
    return up, Product(groups, layer.hidden, layer.width, layer.kind, scaled=scaled)


def default(layer: Layer) -> Tile:
    """vLLM 0.33's rule for problems without a file; on AMD two stages, all that its tuner tries."""
    tile = _default_cuda(layer)
    return replace(tile, stages=2) if machines()[layer.gpu].arch.startswith("gfx") else tile


def _default_cuda(layer: Layer) -> Tile:
    m = layer.tokens
    if layer.block:
        return Tile(16 if m <= 64 else 64, 64 if m <= 8 else 128, 128, 1 if m <= 16 else 32, 4,
                    4 if m <= 4 else 3, 0.0, True)  # fmt: skip
    height = 16 if m <= 32 else 32 if m <= 96 else 64 if m <= 512 else 128
    return Tile(height, 64 if m <= 64 else 128, 128 if layer.kind == "fp8" or m <= 64 else 64,
                16 if m // layer.experts > 128 else 1, 4 if m <= 128 else 8,
                4 if m <= 32 else 3, 0.0, True)  # fmt: skip


def judge(layer: Layer, file: str, config: dict[str, int]) -> Verdict | None:
    """The verdict on one winner; None where it does not fit the GPU as described."""
    winner = tile_of(config, layer)
    machine = machines()[layer.gpu]
    timed = {t: layer_us(layer, t) for t in candidates(layer)}
    if not timed or not _fits(winner, layer, machine):
        return None
    timed.setdefault(winner, layer_us(layer, winner))
    best = min(timed.values())
    shapes: dict[tuple[int, int, int], float] = {}
    for tile, us in timed.items():
        shape = (tile.m, tile.n, tile.k)
        shapes[shape] = min(us, shapes.get(shape, us))
    mine = shapes[winner.m, winner.n, winner.k]
    place = sum(us < mine for us in shapes.values())
    usual = default(layer)
    usual_us = layer_us(layer, usual) if _fits(usual, layer, machine) else float("inf")
    equal = sum(us <= CLOSE * best for us in shapes.values()) / len(shapes)
    return Verdict(layer, file, timed[winner] / best, place, equal, usual_us / best)


@dataclass(frozen=True)
class Ranking:
    """Of the problems of one GPU and type: how the model takes the published winners."""

    gpu: str
    kind: str
    problems: int
    close: float
    top: float
    median: float
    equal: float
    beats_default: float


def rankings(verdicts: Sequence[Verdict]) -> list[Ranking]:
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for v in verdicts:
        kind = v.layer.kind + (" in blocks" if v.layer.block else "")
        groups.setdefault((v.layer.gpu, kind), []).append(v)
    return [
        Ranking(
            gpu, kind, len(found), sum(v.ratio <= CLOSE for v in found) / len(found),
            sum(v.place < TOP for v in found) / len(found),
            statistics.median(v.ratio for v in found),
            statistics.median(v.equal for v in found),
            sum(v.default >= 1 for v in found) / len(found),
        )
        for (gpu, kind), found in sorted(groups.items())
    ]  # fmt: skip
