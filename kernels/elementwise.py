"""Tiles for kernels that treat every element, or every 128 of a row, on their own.

Shape letters: T rows, N columns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .arch import Arch
from .lang import tl, triton
from .launch import cdiv

BLOCKS = (128, 256, 512, 1024, 2048, 4096)
"""Widths of a tile: whole scale blocks of 128 columns."""


@dataclass(frozen=True)
class Config:
    """A program takes `rows` rows of `block` columns."""

    block: int
    rows: int
    num_warps: int


def configs(columns: int, arch: Arch) -> list[Config]:
    """Candidates for rows of `columns` elements, the default first."""
    fitting = [block for block in BLOCKS if block < 2 * max(columns, BLOCKS[0])]
    if arch.is_cpu:
        found = [Config(block, 1, 4) for block in fitting]
        return sorted(found, key=lambda config: (-columns % config.block, -config.block))
    found = [Config(*c) for c in itertools.product(fitting, (1, 2, 4, 8), (2, 4, 8))]
    found = [config for config in found if feasible(config, arch)]
    return sorted(found, key=lambda config: _default_first(config, columns, arch))


def feasible(config: Config, arch: Arch) -> bool:
    """Whether a tile leaves each thread between 4 and 32 elements."""
    per_thread = config.block * config.rows / (config.num_warps * arch.warp_size)
    return 4 <= per_thread <= 32


def _default_first(config: Config, columns: int, arch: Arch) -> tuple[float, ...]:
    """Fewest columns past the end, then 8 elements per thread, then four warps, then wide tiles."""
    past_the_end = -columns % config.block
    per_thread = config.block * config.rows / (config.num_warps * arch.warp_size)
    return past_the_end, abs(per_thread - 8), abs(config.num_warps - 4), config.rows


def grid(count: int, columns: int, config: Config) -> tuple[int]:
    """One program per tile; the columns of a row are neighbours."""
    return (cdiv(count, config.rows) * cdiv(columns, config.block),)


@triton.jit
def tile(N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row numbers [ROWS, 1] (64 bits) and column numbers [1, BLOCK] of this program's tile."""
    blocks = tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def group(N, BLOCK: tl.constexpr):
    """Numbers [1, BLOCK / 128] of the scale blocks of this program's tile."""
    first = tl.program_id(0) % tl.cdiv(N, BLOCK) * (BLOCK // 128)
    return first + tl.arange(0, BLOCK // 128)[None, :]


@triton.jit
def share(count):
    """This program's part of `count` pieces of work: its first, and the one after its last.

    They are neighbours, so that a program reads memory in order: processors fetch ahead.
    """
    each = tl.cdiv(count, tl.num_programs(0))
    first = tl.program_id(0).to(tl.int64) * each
    return first, tl.minimum(first + each, count)
