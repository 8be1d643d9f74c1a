"""One kernel launch over many tensors: a table of addresses and the chunks they are cut into.

A launch takes lists of tensors of equal lengths (parameters, their gradients, ...). Program i reads
chunk i of the table, (tensor, number of the chunk in it), then the tensor's row, (addresses,
elements). Chunks of a tensor are equally long but for the last, which alone pays for a mask.

Method: multi-tensor apply of NVIDIA Apex; the addresses travel in memory, so that no list is too
long, and the table is kept for as long as they stay what they are: a step that finds its gradients
where the last one left them uploads nothing.

Shape letters: L tensors, C chunks, A tensors that share a row of the table.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import Arch
from .lang import tl, triton
from .launch import cdiv

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Config:
    """A chunk is `steps` times `block` elements."""

    block: int
    steps: int
    num_warps: int

    @property
    def chunk(self) -> int:
        return self.block * self.steps


def configs(problem: None, arch: Arch) -> list[Config]:
    """Candidates, the default first."""
    if arch.is_cpu:
        return [Config(1024, 16, 4)]
    found = [Config(*c) for c in itertools.product((512, 1024, 2048, 4096), (4, 1, 2, 8), (4, 8))]
    found = [config for config in found if feasible(config, arch)]
    return sorted(found, key=lambda c: abs(c.block - 8 * c.num_warps * arch.warp_size))


def feasible(config: Config, arch: Arch) -> bool:
    """Whether a step leaves each thread between 4 and 16 elements."""
    return 4 <= config.block / (config.num_warps * arch.warp_size) <= 16


@dataclass(frozen=True)
class Table:
    """`rows_LA` addresses and, last, elements; `chunks_C2` tensor and number of the chunk in it.

    `aligned` says whether every address is a multiple of 16 bytes.
    """

    rows_LA: Tensor
    chunks_C2: Tensor
    aligned: bool


def table_of(lists: Sequence[Sequence[Tensor]], chunk: int) -> Table:
    """The table of contiguous tensors on one device, `lists[k][i]` of equal size for all k."""
    addresses = tuple(tuple(t.data_ptr() for t in row) for row in zip(*lists, strict=True))
    return _table(addresses, tuple(t.numel() for t in lists[0]), chunk, lists[0][0].device)


@functools.lru_cache(maxsize=32)
def _table(
    addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], chunk: int, device: torch.device
) -> Table:
    rows = torch.tensor([(*a, size) for a, size in zip(addresses, sizes, strict=True)])
    counts = [cdiv(size, chunk) for size in sizes]
    tensors = torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts))
    numbers = torch.cat([torch.arange(count) for count in counts])
    chunks = torch.stack([tensors, numbers], dim=1)
    aligned = all(a % 16 == 0 for row in addresses for a in row)
    return Table(_upload(rows, device), _upload(chunks, device), aligned)


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device, without waiting for it."""
    x = x.pin_memory() if device.type == "cuda" else x
    return x.to(device, non_blocking=True)


def same_kind(lists: Sequence[Sequence[Tensor]]) -> list[list[list[Tensor]]]:
    """The lists split by dtypes and device, without empty tensors: each part can be one launch."""
    parts: dict[tuple, list[list[Tensor]]] = {}
    for row in zip(*lists, strict=True):
        if row[0].numel():
            key = (row[0].device, *(t.dtype for t in row))
            for into, t in zip(parts.setdefault(key, [[] for _ in row]), row, strict=True):
                into.append(t)
    return list(parts.values())


@triton.jit
def chunk(rows_LA, chunks_C2, A: tl.constexpr, LENGTH: tl.constexpr):
    """This program's row of the table, its first element, and how many elements its tensor has."""
    program = tl.program_id(0).to(tl.int64)
    row_A = rows_LA + tl.load(chunks_C2 + 2 * program) * A
    # a product, so that the compiler sees how it is aligned
    start = tl.load(chunks_C2 + 2 * program + 1) * LENGTH
    return row_A, start, tl.load(row_A + A - 1)


@triton.jit
def pointer(row_A, index: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a row of the table as a pointer."""
    found = tl.load(row_A + index).to(tl.pointer_type(TYPE))
    return tl.multiple_of(found, 16) if ALIGNED else found
