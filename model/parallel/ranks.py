"""The processes of one training run, and which part of its work each of them has.

Every rank has tokens of its own. Ranks of a tensor-parallel group share their sequences, each rank
with an equal piece of every sequence; only attention sees whole sequences, with some of the heads.
Experts are divided over an expert-parallel group, to which tokens travel. What is not divided so
is sharded over all ranks by FSDP2. No element of a parameter lies on two ranks, and a gradient is
the sum over all ranks, so each rank's loss is its share of the sum.

Shape letters: B sequences, T tokens per sequence.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from ..config import Config


class ParallelError(ValueError):
    """A number of processes, or a division of the work, that does not fit."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`; `tp` ranks share a sequence, `ep` ranks share the experts.

    `Ranks()` is a process alone. Meshes are None there.
    """

    rank: int = 0
    world: int = 1
    tp: int = 1
    ep: int = 1
    all: DeviceMesh | None = None
    dense: DeviceMesh | None = None  # (dp, tp)
    expert: DeviceMesh | None = None  # (copies, ep)

    @property
    def dp(self) -> int:
        """Number of groups with different sequences."""
        return self.world // self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    def sequences(self, ids_BT: Tensor) -> Tensor:
        """The sequences of this rank's group."""
        return ids_BT.chunk(self.dp)[self.dp_rank]

    def piece(self, x_BT: Tensor) -> Tensor:
        """This rank's piece of every sequence."""
        return x_BT.chunk(self.tp, 1)[self.tp_rank]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def sum_pieces(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share sequences, in place."""
        if self.tp > 1:
            assert self.dense is not None
            dist.all_reduce(x, group=self.dense.get_group("tp"))
        return x

    def gather(self, value: object) -> list[object]:
        """A small value of every rank."""
        if self.world == 1:
            return [value]
        found: list[object] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def check(self, config: Config, *, batch_size: int, sequence_length: int) -> None:
        """Raises ParallelError unless model and batches divide among the ranks."""
        rules = [
            (batch_size % self.dp == 0, f"batch_size ({batch_size}) must be a multiple of the "
             f"{self.dp} groups of ranks that have different sequences"),
            (sequence_length % self.tp == 0,
             f"sequence_length ({sequence_length}) must be a multiple of tp ({self.tp})"),
            (config.num_key_value_heads % self.tp == 0,
             f"num_key_value_heads ({config.num_key_value_heads}) must be a multiple of tp "
             f"({self.tp})"),
            (config.num_experts % self.ep == 0,
             f"num_experts ({config.num_experts}) must be a multiple of ep ({self.ep})"),
            (self.world == 1 or not config.tie_word_embeddings,
             "tied embeddings train in one process only"),
        ]  # fmt: skip
        for holds, message in rules:
            if not holds:
                raise ParallelError(message)


def launched() -> bool:
    """Whether torchrun, or something like it, has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def restarted() -> bool:
    """Whether torchrun has started this process again, after one of them had ended."""
    return launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def connect(*, tp: int = 1, ep: int = 1, device: str = "cpu") -> Ranks:
    """Join the processes that torchrun has started; alone without it.

    Raises:
        ParallelError: the processes do not divide by `tp` or `ep`.
    """
    world = int(os.environ["WORLD_SIZE"]) if launched() else 1
    for name, size in (("tp", tp), ("ep", ep)):
        if size < 1 or world % size:
            raise ParallelError(f"{name} must divide the {world} processes, got {size}")
    if not launched():
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return Ranks(dist.get_rank(), world, tp, ep, *meshes(world, tp, ep, device=device))


def meshes(
    world: int, tp: int, ep: int, *, device: str = "cpu"
) -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
    """The fields `all`, `dense` and `expert`."""
    return (
        init_device_mesh(device, (world,), mesh_dim_names=("all",)),
        init_device_mesh(device, (world // tp, tp), mesh_dim_names=("dp", "tp")),
        init_device_mesh(device, (world // ep, ep), mesh_dim_names=("copies", "ep")),
    )


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor; gradients flow back into it."""
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x


def block(x: Tensor) -> tuple[slice, ...]:
    """Where what this rank holds lies in the whole tensor."""
    from torch.distributed.tensor import DTensor

    if not isinstance(x, DTensor):
        return tuple(slice(0, n) for n in x.shape)
    if not local(x).numel():
        return tuple(slice(0, 0) for _ in x.shape)
    (chunk,) = x.__create_chunk_list__()
    pairs = zip(chunk.offsets, chunk.sizes, strict=True)
    return tuple(slice(start, start + size) for start, size in pairs)


@torch.no_grad()
def fill(x: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of `whole` into `x`."""
    local(x).copy_(whole[block(x)])
