"""What each of many processes would hold and send, without the processes and without the memory.

The model is built on the meta device and divided by the code that trains it, over a process group
that only counts to its size. What is held is read off the parts of rank 0; what is sent follows
from the collectives of a step: rings, in which each of P ranks sends (P - 1) / P of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..config import Config
from ..optimizer import MuonAdamW
from ..transformer import KExaone
from .modules import DividedExperts, LocalLinear
from .ranks import Ranks, local, meshes
from .shard import shard

ITEM = 4  # bytes of a float32: what the trainer keeps everything in


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of rank 0. Held: all the time, and `gathered` at the peak. Sent: in a step.

    Activations are not counted.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    sent_weights: int
    sent_tokens: int
    sent_pieces: int
    sent_matrices: int

    @property
    def held(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered

    @property
    def sent(self) -> int:
        return self.sent_weights + self.sent_tokens + self.sent_pieces + self.sent_matrices


def plan(
    config: Config, *, world: int, tp: int = 1, ep: int = 1, batch_size: int, sequence_length: int
) -> Plan:
    """The plan of one step of `batch_size` sequences, of one pass.

    Raises:
        ParallelError: if model and batch do not divide among the ranks.
        RuntimeError: in a process that has joined others.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan is made in a process that has not joined others")
    Ranks(0, world, tp, ep).check(config, batch_size=batch_size, sequence_length=sequence_length)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        with torch.device("meta"):
            model = KExaone(config)
        ranks = Ranks(0, world, tp, ep, *meshes(world, tp, ep))
        losses = shard(model, ranks)
        optimizer = MuonAdamW(model, ranks=ranks)
        weights = sum(local(p).numel() for p in model.parameters())
        state = sum(local(x).numel() for x in optimizer.state_dict().values() if x.dim())
        groups = _groups(losses, ranks)
        matrices = sum(
            local(p).numel() for p in model.parameters() if p in optimizer.divided_matrices
        )
    finally:
        dist.destroy_process_group()
    tokens = batch_size * sequence_length // world
    row = config.hidden_size * ITEM
    layers = config.num_hidden_layers
    sparse = layers - config.first_k_dense_replace
    attentions = layers + (config.mtp_steps if config.mtp_windows else 0)
    # the last group, that of the root, stays whole between the passes; others come twice
    passes = [*(3 for _ in groups[:-1]), 2]
    moved = [n * size * (p - 1) // p for (size, p), n in zip(groups, passes, strict=True)]
    rows = tokens * config.num_experts_per_tok
    return Plan(
        weights=weights * ITEM,
        gradients=weights * ITEM,
        optimizer=state * ITEM,
        # the root and the largest block, with their gradients
        gathered=2 * ITEM * (groups[-1][0] + max((size for size, _ in groups[:-1]), default=0)),
        sent_weights=sum(moved) * ITEM,
        sent_tokens=4 * sparse * rows * row * (ep - 1) // ep,
        sent_pieces=4 * attentions * tokens * row * (tp - 1),
        sent_matrices=2 * matrices * ITEM * (world - 1) // world,
    )


def _groups(losses: nn.Module, ranks: Ranks) -> list[tuple[int, int]]:
    """Elements that FSDP2 gathers at once, and over how many ranks; the root's come last."""
    sizes: dict[str, list[int]] = {}
    for path, module in losses.named_modules():
        for parameter in module.parameters(recurse=False):
            divided = isinstance(module, LocalLinear | DividedExperts)
            over = ranks.world
            if isinstance(module, LocalLinear):
                over = ranks.dp
            elif divided:
                over = ranks.world // ranks.ep
            owner = _owner(path) + (":divided" if divided else "")
            found = sizes.setdefault(owner, [0, over])
            found[0] += parameter.numel() * over // ranks.world
    root = sizes.pop("")
    return [(size, over) for size, over in (*sizes.values(), root) if size]


def _owner(path: str) -> str:
    """The block that a module is part of; empty for what is in none."""
    parts = path.split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else ""
