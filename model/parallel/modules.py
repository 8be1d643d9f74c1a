"""Attention whose heads, and experts which, are divided over ranks.

Parameters keep their names and become DTensors; the modules take and return local tensors.

Shape letters: T tokens, K experts per token, E experts, P ranks, M rows, H hidden, N packed tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ...kernels.experts import moe_experts
from ...kernels.grouping import group_by_expert
from ...kernels.permute import permute, unpermute
from ..attention import Attention
from ..cache import LayerCache
from ..moe import Experts, Routing
from ..packing import Packing
from .exchange import exchange, join_pieces, send_rows, sum_to_pieces
from .ranks import local


class LocalLinear(nn.Linear):
    """Multiplies with what this rank holds of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, local(self.weight))


class DividedAttention(Attention):
    """Takes and returns pieces of sequences; attends whole ones with this rank's heads."""

    mesh: DeviceMesh

    def forward(
        self,
        x_NH: Tensor,
        packing: Packing,
        *,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
    ) -> Tensor:
        sequences, group = len(packing.lengths), self.mesh.get_group()
        whole = join_pieces(x_NH, sequences=sequences, group=group)
        out = super().forward(whole, packing, rope=rope, cache=cache)
        return sum_to_pieces(out, sequences=sequences, group=group)


def divide_attention(module: Attention, mesh: DeviceMesh) -> list[nn.Module]:
    """Divide the heads over a mesh of one dimension, in place; returns the divided modules."""
    module.__class__ = DividedAttention
    assert isinstance(module, DividedAttention)
    module.mesh = mesh
    divided: list[nn.Module] = []
    for name, dim in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
        linear = getattr(module, name)
        linear.__class__ = LocalLinear
        _divide(linear, "weight", mesh, dim)
        divided.append(linear)
    return divided


class DividedExperts(Experts):
    """This rank's experts serve the tokens of all ranks of the mesh.

    Rows are grouped by expert, and so by rank, sent there, grouped by the experts of that rank, and
    come back to be weighted and summed as without division: by token, in the order of its choices.
    """

    mesh: DeviceMesh

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        group, experts = self.mesh.get_group(), len(self.gate_up_proj)
        ranks = self.mesh.size()
        own = experts // ranks
        groups = group_by_expert(routing.ids_TK, experts=experts)
        counts_E = groups.offsets.diff().long()
        # what each rank has for each of this rank's experts, [P, E / P]
        coming_E = exchange(counts_E, [own] * ranks, [own] * ranks, group)
        # the one place that waits: the host must know how many rows travel
        by_rank = torch.stack([counts_E, coming_E]).unflatten(1, (ranks, own)).sum(-1).tolist()
        sent, received = by_rank
        rows = send_rows(permute(x_TH, groups), sent, received, group=group)
        ids = torch.arange(own, device=rows.device).repeat(ranks)
        ids_M = ids.repeat_interleave(coming_E, output_size=len(rows))
        regrouped = group_by_expert(ids_M.unsqueeze(1), experts=own)
        ones = torch.ones(len(rows), 1, device=rows.device)
        done = moe_experts(
            rows, local(self.gate_up_proj), local(self.down_proj), ones, regrouped.offsets,
            regrouped.order, limit=self.limit,
        )  # fmt: skip
        back = send_rows(done, received, sent, group=group)
        return unpermute(back, groups, routing.weights_TK)


def divide_experts(module: Experts, mesh: DeviceMesh) -> None:
    """Divide the experts over a mesh of one dimension, in place."""
    module.__class__ = DividedExperts
    assert isinstance(module, DividedExperts)
    module.mesh = mesh
    for name in ("gate_up_proj", "down_proj"):
        _divide(module, name, mesh, 0)


def _divide(module: nn.Module, name: str, mesh: DeviceMesh, dim: int) -> None:
    parameter = getattr(module, name)
    placement = Replicate() if mesh.size() == 1 else Shard(dim)
    # every rank has the same values: none needs to be told
    divided = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    setattr(module, name, nn.Parameter(divided))
