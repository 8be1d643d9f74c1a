"""Tiles of a grouped matrix product: how large, which expert's, which rows, and their sums.

Groups are not padded and the host does not know them. Tile t belongs to the last expert e with
offsets[e] // B + e <= t, for tiles of B rows: every expert then owns at least as many tiles as its
rows need, so rows / B + E tiles are enough, and those without rows stop at once. An expert's last
tile is halved while its rows fit the half, down to `least` rows.

Shape letters: M sorted rows, E experts, N outputs, K inputs of the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .arch import Arch
from .lang import tl, triton
from .launch import cdiv
from .tables import Configs, pick


@dataclass(frozen=True)
class Problem:
    """`rows` per expert on average (a power of two), weights [`columns`, `depth`], bytes each."""

    rows: int
    columns: int
    depth: int
    size: int


@dataclass(frozen=True)
class Config:
    """Tiles of `rows` (or half as many, down to `least`) x `columns`, summed `depth` by `depth`.

    `group` tiles of rows share an expert's weights in the cache.
    """

    rows: int
    least: int
    columns: int
    depth: int
    group: int
    num_warps: int
    num_stages: int


def problem_of(count: int, weight: Tensor) -> Problem:
    """The problem of `count` sorted rows, from shapes alone."""
    experts, columns, depth = weight.shape
    mean = triton.next_power_of_2(max(1, cdiv(count, max(1, experts))))
    return Problem(mean, columns, depth, weight.dtype.itemsize)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates, the default first."""
    if arch.is_cpu:
        # three classes only: each further one is a compilation for somebody's odd batch size
        rows, least = (4, 1) if problem.rows <= 2 else (16, 8) if problem.rows <= 16 else (128, 8)
        sizes = [(128, 128 if rows == 128 else 256), (128, 64), (64, 256), (256, 128)]
        # a step past the depth would be masked, and multiplied all the same
        whole = max(16, triton.next_power_of_2(problem.depth))
        return [Config(rows, least, width, min(depth, whole), 1, 4, 1) for width, depth in sizes]
    found = [
        Config(rows, rows, width, depth, 8, warps, stages)
        for rows in (16, 32, 64, 128)
        for width in (64, 128, 256)
        for depth in (32, 64, 128)
        for warps in (4, 8)
        for stages in (4, 3, 2)
    ]
    fitting = [c for c in found if feasible(c, problem, arch)]
    return sorted(fitting, key=lambda c: _default_first(c, problem))


def feasible(config: Config, problem: Problem, arch: Arch) -> bool:
    """Whether the stages fit shared memory and the sums take at most 128 registers a thread."""
    stage = (config.rows + config.columns) * config.depth * problem.size
    sums = config.rows * config.columns / (config.num_warps * arch.warp_size)
    held = arch.buffers(config.num_stages)
    return stage * held <= arch.shared_bytes - 2048 and 8 <= sums <= 64


def heavy_configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates for a kernel that holds other tiles beside its sums: 16 of them a thread."""
    found = configs(problem, arch)
    if arch.is_cpu:
        return found
    return [c for c in found if c.rows * c.columns <= 16 * c.num_warps * arch.warp_size]


def _default_first(config: Config, problem: Problem) -> tuple[float, ...]:
    """Tiles no taller than an expert's rows, then as wide and as deep as pays, then stages."""
    tall = min(128, max(16, problem.rows))
    few = tall <= 32
    return (
        abs(config.rows - tall),
        abs(config.columns - (64 if few else 128)),
        abs(config.depth * problem.size - (256 if few else 128)),
        -config.num_stages,
        config.num_warps,
    )


@triton.jit
def find_tile(offsets_E, columns, E, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              GROUP: tl.constexpr, EXPERTS: tl.constexpr):  # fmt: skip
    """This program's expert, its tile's first row, the expert's end, and the tile's column."""
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.num_programs(0) // across
    group = tl.program_id(0) // (GROUP * across)
    within = tl.program_id(0) % (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    tile = group * GROUP + within % height
    e = tl.arange(0, EXPERTS)
    start = tl.load(offsets_E + e, mask=e < E, other=0)
    expert = tl.sum(((e < E) & (start // BLOCK_M + e <= tile)).to(tl.int32), 0) - 1
    first = tl.load(offsets_E + expert)
    end = tl.load(offsets_E + expert + 1)
    row = first + (tile - first // BLOCK_M - expert) * BLOCK_M
    return expert.to(tl.int64), row, end, within // height * BLOCK_N


@triton.jit
def product(x_MK, w_NK, source, n, K, x_stride, n_stride, k_stride,
            TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """float32 sums of rows `source` of x with rows `n` of w; `TRANSPOSED`: rows of w are dense."""
    k = tl.arange(0, BLOCK_K)
    x = x_MK + source.to(tl.int64)[:, None] * x_stride + k[None, :]
    if TRANSPOSED:
        w = w_NK + n.to(tl.int64)[:, None] * n_stride + k[None, :]
    else:
        w = w_NK + n.to(tl.int64)[None, :] + k.to(tl.int64)[:, None] * k_stride
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if WHOLE:
            a, b = tl.load(x), tl.load(w)
        else:
            live = k < K - start
            a = tl.load(x, mask=live[None, :], other=0.0)
            b = tl.load(w, mask=live[None, :] if TRANSPOSED else live[:, None], other=0.0)
        if TRANSPOSED:
            b = tl.trans(b)
        total = tl.dot(a, b, total, input_precision="ieee")
        x += BLOCK_K
        w += BLOCK_K * k_stride
    return total


@triton.jit
def source_rows(order_M, row, end, top_k, GATHER: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tile's rows, the last repeated past the end, and where each is read."""
    m = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
    return m, tl.load(order_M + m) // top_k if GATHER else m


@dataclass(frozen=True)
class Plan:
    """The grid of a kernel that multiplies `count` rows, and what it is compiled with."""

    config: Config
    grid: tuple[int]
    constants: dict[str, Any]


def plan(op: str, count: int, weight: Tensor, candidates: Configs = configs) -> Plan:
    """How `op` multiplies `count` sorted rows by weights [E, N, K], one of N and K dense."""
    experts, columns, depth = weight.shape
    config: Config = pick(op, candidates, problem_of(count, weight), weight.device)
    tiles = cdiv(count, config.rows) + experts
    constants = {
        "TRANSPOSED": weight.stride(2) == 1,
        "WHOLE": depth % config.depth == columns % config.columns == 0,
        "BLOCK_M": config.rows, "LEAST_M": config.least, "BLOCK_N": config.columns,
        "BLOCK_K": config.depth, "GROUP": config.group,
        "EXPERTS": max(16, triton.next_power_of_2(experts)),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    return Plan(config, (tiles * cdiv(columns, config.columns),), constants)


def dense(weight: Tensor) -> Tensor:
    """`weight` itself if one of its matrices' dimensions has unit stride, else a copy."""
    return weight if 1 in weight.stride()[1:] else weight.contiguous()
