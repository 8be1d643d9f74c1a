"""How decode attention spreads the keys of one sequence over programs, and joins their parts.

A sequence of one new row has one program per key head, too few for a machine, and each would walk
all keys alone. So the keys are cut into splits; each yields an output and the log of its share of
the denominator, and the join weights them by it. Method: Dao et al. 2023, "Flash-Decoding". How
many splits is decided from shapes alone: nothing waits for the device, and a recorded graph stays
valid.

Shape letters: C splits, R rows (tokens times heads), D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .arch import Arch
from .attention_tiles import LOG2E, rows_of, tokens_of, width
from .lang import jit, tl, triton
from .launch import cdiv


@dataclass(frozen=True)
class Problem:
    """What tiles and splits depend on: `longest` rows per sequence, at most `keys` seen by one."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    itemsize: int
    longest: int
    keys: int


@dataclass(frozen=True)
class Config:
    """Tiles of at most `rows` rows by `keys` keys; splits of `least` keys or more, until there are
    `programs` programs."""

    rows: int
    keys: int
    least: int
    programs: int
    num_warps: int
    num_stages: int

    def tokens(self, problem: Problem) -> int:
        """Tokens of a tile."""
        most = max(1, min(problem.longest, 1 << 15))
        return min(triton.next_power_of_2(most), tokens_of(self.rows, problem.group))

    def tile_rows(self, problem: Problem) -> int:
        """Rows of a tile."""
        rows = triton.next_power_of_2(self.tokens(problem) * problem.group)
        return rows_of(min(self.rows, rows), problem.group)

    def splits(self, problem: Problem) -> int:
        """Programs that share the keys of one tile and head."""
        tiles = cdiv(problem.longest, self.tokens(problem))
        programs = max(1, tiles * problem.batch * problem.kv_heads)
        return max(1, min(self.programs // programs, problem.keys // self.least, 64))


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates, the default first."""
    if arch.is_cpu:
        return [Config(128, 128, 512, 4 * arch.processors, 4, 1)]
    found = [
        Config(rows, keys, 256, 2 * arch.processors, warps, stages)
        for rows in (128, 64, 32, 16)
        for keys in (64, 32, 128, 16)
        for warps in (4, 8)
        for stages in (3, 2, 1)
    ]
    return [c for c in found if feasible(c, problem, arch)]


def feasible(config: Config, problem: Problem, arch: Arch) -> bool:
    """Whether tiles fit shared memory, and what a thread holds its registers."""
    columns, rows = width(problem.head_dim), max(16, config.tile_rows(problem))
    if problem.itemsize == 4:
        return rows * columns <= 2048 and config.keys == 16
    shared = problem.itemsize * columns * (rows + 2 * config.num_stages * config.keys)
    held = rows * (columns + config.keys) + config.keys * columns
    held += 0 if arch.shared_operands else rows * columns / 2
    return shared <= arch.shared_bytes and held <= 124 * config.num_warps * arch.warp_size


@jit(do_not_specialize=["rows", "splits"])
def _join_kernel(parts_CRD, part_lse_CR, out_RD, lse_R, rows, splits, D: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """One row's parts, weighted by what each adds to the denominator."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    top = tl.load(part_lse_CR + row)
    for split in range(1, splits):
        top = tl.maximum(top, tl.load(part_lse_CR + split.to(tl.int64) * rows + row))
    total, acc = 0.0, tl.zeros([WIDTH], tl.float32)
    for split in range(0, splits):
        part = split.to(tl.int64) * rows + row
        weight = tl.exp2(tl.load(part_lse_CR + part) - top)
        total += weight
        acc += weight * tl.load(parts_CRD + part * D + at, mask=at < D, other=0.0)
    tl.store(out_RD + row * D + at, (acc / total).to(out_RD.dtype.element_ty), mask=at < D)
    tl.store(lse_R + row, (top + tl.log2(total)) / LOG2E)


def join(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fill out [N, A, D] and lse [N, A] from parts [C, N, A, D] and their base-2 logarithms.

    Called inside the scope in which kernels run on the tensors' device.
    """
    splits, head_dim = len(parts), parts.shape[-1]
    _join_kernel[(lse.numel(),)](parts, part_lse, out, lse, lse.numel(), splits, D=head_dim,
                                 WIDTH=width(head_dim), num_warps=1)  # fmt: skip
