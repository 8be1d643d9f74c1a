"""`Work` of the common kernel families from their sizes: rows, matrix products, attention.

These describe a well made kernel of its family, not a particular one: what it must move and
compute, how its tiles fill the processors, and whether it hides one kind of work behind another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .model import Machine, Prediction, Work, predict

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
HIDDEN = 0.75
"""The part of the lesser work that a kernel with specialised warps hides behind the greater."""


def rows(count: int, read: float, written: float = 0.0, *, resident: int = 8) -> Work:
    """A kernel that reads and writes so many bytes in each of `count` rows, once.

    A program takes as many rows as make 4 KiB, and has no more than 16 KiB under way.
    """
    flight = min(max(read, 4096.0), 16_384.0)
    return Work(count, count * read, count * written, count * read, resident=resident,
                in_flight=flight)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """Products of matrices [m, k] x [k, n] for several `groups` of rows m.

    `scaled`: the sums are rescaled every 128 products, outside of the matrix units. `gathered`: the
    first product's rows come from `gathered` different ones.
    """

    groups: tuple[float, ...]
    n: int
    k: int
    kind: str = "bf16"
    out_size: int = 2
    scaled: bool = False
    weights: float = 1.0  # copies of the second matrix: 1 per group
    gathered: float = 0.0

    @property
    def rows(self) -> float:
        return sum(self.groups)

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.n * self.k


@dataclass(frozen=True)
class Tile:
    """Sizes of a tile, of how many rows of tiles share the cache, and how a program runs it.

    `stages` 0: as many as fit, up to eight. `pointers`: threads compute the addresses that they
    load from, four instructions for 16 bytes each; else the hardware copies tiles.
    """

    m: int
    n: int
    k: int
    group: int = 8
    warps: int = 8
    stages: int = 0
    overlap: float = HIDDEN
    pointers: bool = False


TILES = tuple(
    Tile(m, n, k)
    for m in (64, 128, 256)
    for n in (64, 96, 112, 128, 160, 192, 256)
    for k in (64, 128)
    if m * n <= 256 * 128
)
"""What a library for matrix products chooses from."""


def fits(tile: Tile, size: int, machine: Machine, shared_bytes: int) -> bool:
    """Whether a tile's stages fit shared memory and its sums the registers."""
    stage = (tile.m + tile.n) * tile.k * size
    sums = tile.m * tile.n / (tile.warps * 32)
    return stage * max(3, tile.stages) <= shared_bytes and sums <= 128


def product_work(product: Product, tile: Tile, machine: Machine, shared_bytes: int) -> Work:
    """The work of a product with one tile size."""
    size = SIZES[product.kind]
    groups = np.asarray([g for g in product.groups if g > 0])
    down, across = np.ceil(groups / tile.m), math.ceil(product.n / tile.n)
    programs = float(down.sum() * across)
    steps = math.ceil(product.k / tile.k)
    stage = (tile.m + tile.n) * tile.k * size
    stages = tile.stages or max(3, min(8, shared_bytes // stage))
    resident = max(1, min(
        int(shared_bytes // (stage * stages)),
        int(65_536 // (tile.m * tile.n + 64 * 32 * tile.warps)), 64 // tile.warps,
    ))  # fmt: skip
    first = (product.gathered or product.rows) * product.k * size
    second = len(groups) * product.n * product.k * size
    written = product.rows * product.n * product.out_size
    wave = machine.processors * resident
    read = _from_memory(product, tile, groups, across, wave, machine)
    padded = programs * tile.m * tile.n * steps * tile.k
    # a multiply and an add for each sum and scale, in single instructions
    vector = padded / 128 if product.scaled else 0.0
    requested = programs * steps * stage
    return Work(
        programs, max(read, first + second), written, requested, matrix=2 * padded,
        kind=product.kind, vector=vector, resident=resident, in_flight=stage * (stages - 1),
        overlap=tile.overlap, instructions=requested / 16 / 32 * 4 if tile.pointers else 0.0,
        # a tile is written when it is finished; only another program could hide that
        tail=written if resident == 1 else 0.0,
    )  # fmt: skip


def _from_memory(
    product: Product, tile: Tile, groups: np.ndarray, across: int, wave: float, machine: Machine
) -> float:
    """Bytes of the operands that come from memory, when each wave of tiles keeps its own cached."""
    size, cache = SIZES[product.kind], machine.cache_mib * 2**20
    total = 0.0
    for rows, count in zip(*np.unique(groups, return_counts=True), strict=True):
        down = math.ceil(rows / tile.m)
        a, b = rows * product.k * size, product.n * product.k * size
        if a + b <= cache:
            total += float(count * (a + b))
            continue
        # `group` rows of tiles advance together over the columns, wave by wave
        height = min(tile.group, down)
        width = max(1.0, min(across, wave / height))
        sweeps_a, sweeps_b = math.ceil(across / width), math.ceil(down / height)
        kept_a = a / sweeps_b <= cache / 2
        kept_b = b <= cache / 2
        total += float(count) * (a * (1 if kept_a else sweeps_a) + b * (1 if kept_b else sweeps_b))
    return float(total)


def best_product(
    product: Product, machine: Machine, shared_bytes: int, tiles: Sequence[Tile] = TILES
) -> tuple[Prediction, Tile]:
    """The fastest tile and its time."""
    size = SIZES[product.kind]
    found = [t for t in tiles if fits(t, size, machine, shared_bytes)]
    timed = [(predict(product_work(product, t, machine, shared_bytes), machine), t) for t in found]
    return min(timed, key=lambda pair: pair[0].us)


@dataclass(frozen=True)
class Attention:
    """Softmax attention of `batch` sequences; `queries` heads share `groups` heads of keys."""

    batch: int
    rows: int
    keys: int
    queries: int
    groups: int
    dim: int
    causal: bool = False
    backward: bool = False
    size: int = 2

    @property
    def pairs(self) -> float:
        """Scores of all heads."""
        per_head = self.rows * self.keys * (0.5 if self.causal else 1.0)
        return self.batch * self.queries * per_head

    @property
    def flops(self) -> float:
        """As the literature counts: two products forward, five backward."""
        return self.pairs * self.dim * (10 if self.backward else 4)


def attention_work(a: Attention, machine: Machine, *, overlap: float, rate: float = 1.0) -> Work:
    """The work of a tiled kernel; `rate`: of the matrix units' rate that its instruction has."""
    tile = 128
    blocks = math.ceil(a.rows / tile)
    programs = a.batch * a.queries * blocks
    # the triangle's diagonal tiles are computed whole
    padding = 1 + tile / a.keys if a.causal else 1.0
    q = a.batch * a.rows * a.queries * a.dim * a.size
    kv = 2 * a.batch * a.keys * a.groups * a.dim * a.size
    moved = (q + kv, q) if not a.backward else (3 * q + 2 * kv, q + kv)
    pairs = a.pairs * padding
    # scale, maximum, subtract, add; backward: also the difference and product of gradients
    vector = pairs * (8 if a.backward else 4)
    return Work(
        programs, *moved, requested=programs * a.keys * 2 * a.dim * a.size / (2 if a.causal else 1),
        matrix=a.flops * padding / rate, kind="bf16", vector=vector, special=pairs,
        overlap=overlap,
    )  # fmt: skip


def decode_work(a: Attention, *, pieces: int = 1) -> Work:
    """The work of attention over a cache by few rows: the cache is read once."""
    kv = 2 * a.batch * a.keys * a.groups * a.dim * a.size
    q = a.batch * a.rows * a.queries * a.dim * a.size
    programs = a.batch * a.groups * pieces
    return Work(programs, kv + q, q, kv + q, in_flight=2 * 64 * a.dim * a.size, resident=2)


def routed(tokens: int, experts: int, top_k: int, *, skew: float = 0.0) -> tuple[float, ...]:
    """Expected rows of each expert, in order of size.

    `skew` 0: every expert equally likely, so counts are binomial and their expected order
    statistics are taken from quantiles of the normal approximation; above 0, the popularity of the
    r-th expert falls as r^-skew (Zipf).
    """
    popularity = np.arange(1, experts + 1, dtype=float) ** -skew
    mean = tokens * top_k * popularity / popularity.sum()
    mean = np.minimum(mean, tokens)
    if skew == 0:
        quantiles = (np.arange(experts) + 0.5) / experts
        spread = math.sqrt(max(0.0, mean[0] * (1 - top_k / experts)))
        normal = np.asarray([_normal_quantile(q) for q in quantiles])
        mean = np.maximum(0.0, mean + spread * normal)
    if tokens * top_k < 4 * experts:
        return _few(tokens, experts, top_k, popularity / popularity.sum())
    rounded = np.maximum(0, np.round(mean))
    return tuple(float(x) for x in np.sort(rounded)[::-1])


def _few(tokens: int, experts: int, top_k: int, popularity: np.ndarray) -> tuple[float, ...]:
    """Counts where most are small: the same draw of the choices on every run."""
    generator = np.random.default_rng(0)
    counts = np.zeros(experts)
    for _ in range(tokens):
        chosen = generator.choice(experts, size=top_k, replace=False, p=popularity)
        counts[chosen] += 1
    return tuple(float(x) for x in np.sort(counts)[::-1])


def _normal_quantile(q: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(q)
