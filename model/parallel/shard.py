"""A model over all ranks: heads and experts divided, everything else sharded by FSDP2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..losses import next_token_loss, training_loss
from ..moe import MoE
from ..transformer import DecoderLayer, KExaone
from .modules import divide_attention, divide_experts
from .ranks import Ranks, block, local


class Losses(nn.Module):
    """The model with its losses: everything between a batch and a backward pass.

    A module of its own because the losses read weights of the model, and those that FSDP2 shards
    are whole only while a module that it knows runs.
    """

    def __init__(self, model: KExaone, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.ranks = model, ranks

    def forward(
        self, ids_BT: Tensor, *, mtp_weight: float = 0.0, balance_weight: float = 0.0,
        only_next: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """This rank's share of each loss: total, next token, MTP, balance; then expert loads."""
        if only_next:
            return (next_token_loss(self.model, ids_BT, ranks=self.ranks),)
        found = training_loss(
            self.model, ids_BT, mtp_weight=mtp_weight, balance_weight=balance_weight,
            ranks=self.ranks,
        )  # fmt: skip
        return found.total, found.next_token, found.mtp, found.balance, *found.expert_loads

    def reshard(self) -> None:
        """Give up weights that a pass without a backward pass has left whole: FSDP2's method."""


def shard(model: KExaone, ranks: Ranks) -> Losses:
    """Spread a model, which every rank holds whole and alike, over the ranks, in place."""
    losses = Losses(model, ranks)
    if ranks.world == 1:
        return losses
    assert ranks.all is not None and ranks.dense is not None and ranks.expert is not None
    mtp = list(model.mtp.layers) if model.mtp is not None else []
    for layer in [*model.model.layers, *mtp]:
        assert isinstance(layer, DecoderLayer)
        if ranks.tp > 1:
            projections = divide_attention(layer.self_attn, ranks.dense["tp"])
            fully_shard(projections, mesh=ranks.dense["dp"])
        if ranks.ep > 1 and isinstance(layer.mlp, MoE):
            divide_experts(layer.mlp.experts, ranks.expert["ep"])
            fully_shard(layer.mlp.experts, mesh=ranks.expert["copies"])
        fully_shard(layer, mesh=ranks.all)
    fully_shard(losses, mesh=ranks.all)
    for module in losses.modules():
        if isinstance(module, FSDPModule):
            # a rank's loss is its share of the sum, so gradients add up
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return losses


@torch.no_grad()
def gathered(model: KExaone, ranks: Ranks) -> KExaone | None:
    """The whole model on the CPU of rank 0, None on other ranks; all must call it."""
    if ranks.world == 1:
        return model
    whole = {}
    for name, tensor in model.state_dict().items():
        value = tensor
        if isinstance(tensor, DTensor):
            # each element is on one rank: no order of gathering nested shards to get right
            value = torch.zeros(tensor.shape, dtype=tensor.dtype, device=local(tensor).device)
            value[block(tensor)] = local(tensor)
            ranks.sum(value)
        if ranks.rank == 0:
            whole[name] = value.cpu()
    if ranks.rank:
        return None
    with torch.device("meta"):
        copy = KExaone(model.config)
    copy.load_state_dict(whole, assign=True)
    return copy
