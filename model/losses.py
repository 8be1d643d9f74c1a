"""Training losses: next token, multi-token prediction and expert balance, and the router's bias.

Shape letters: B sequences, T tokens per sequence, H hidden, V vocabulary, E experts, K experts per
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.balance import Balance, balance_statistics
from ..kernels.cross_entropy import linear_cross_entropy
from .moe import MoE
from .packing import Packing
from .parallel.ranks import Ranks
from .transformer import KExaone


@dataclass(frozen=True)
class TrainingLoss:
    """The loss to minimize and its unweighted parts, float32 scalars that carry gradients.

    `expert_loads` counts, per sparse layer, how many tokens each expert got: int64 [E].
    """

    total: Tensor
    next_token: Tensor
    mtp: Tensor
    balance: Tensor
    expert_loads: tuple[Tensor, ...]


def training_loss(
    model: KExaone,
    ids_BT: Tensor,
    *,
    mtp_weight: float = 0.05,
    balance_weight: float = 1e-4,
    ranks: Ranks | None = None,
) -> TrainingLoss:
    """next_token + mtp_weight * mtp + balance_weight * balance, of whole sequences.

    next_token: mean cross-entropy, in nats, of the B * (T - 1) tokens that have a predecessor.
    mtp: the same for tokens predicted further ahead: depth k reads the previous depth's hidden
    state of token i and the embedding of token i + 1 + k, and predicts token i + 2 + k
    (DeepSeek-V3, arXiv 2412.19437, section 2.2); the mean over depths. balance: see
    `balance_loss`, the mean over sparse layers. Nothing here waits for the device beyond what the
    model itself does.

    With `ranks`, `ids_BT` are the sequences of this rank's group, and each loss is this rank's
    share: the shares of all ranks add up to the loss of all sequences. Loads are those of this
    rank's tokens.

    Raises:
        ValueError: if `ids_BT` is not [B, T] or too short for the deepest prediction.
    """
    ranks = ranks or Ranks()
    depths = model.config.mtp_steps if model.mtp is not None else 0
    if ids_BT.dim() != 2 or ids_BT.shape[0] == 0 or ids_BT.shape[1] < 2 + depths:
        raise ValueError(
            f"training needs ids of shape [B, T] with T >= {2 + depths}, got {tuple(ids_BT.shape)}"
        )
    batch, length = ids_BT.shape
    packing = Packing.rectangle(batch, length, device=ids_BT.device)
    features = model.features(ranks.piece(ids_BT).flatten(), packing)
    next_token = _cross_entropy(model, features.hidden_NH, ids_BT, ahead=1, ranks=ranks)
    zero = next_token.new_zeros(())
    mtp = _mtp_loss(model, features.hidden_NH, ids_BT, packing, ranks) if depths else zero
    balances, loads = [], []
    for routing in features.routings:
        scores_TE = routing.scores_TE.float()
        statistics = balance_statistics(scores_TE, routing.ids_TK, sequences=batch)
        loads.append(statistics.counts_BE.sum(0))
        counts_BE = ranks.sum_pieces(statistics.counts_BE.clone())
        balances.append(balance_loss(Balance(statistics.shares_BE, counts_BE)))
    balance = torch.stack(balances).mean() / ranks.world if balances else zero
    total = next_token + mtp_weight * mtp + balance_weight * balance
    return TrainingLoss(total, next_token, mtp, balance, tuple(loads))


def next_token_loss(model: KExaone, ids_BT: Tensor, *, ranks: Ranks | None = None) -> Tensor:
    """Only the next-token part of `training_loss`: mean cross-entropy in nats, a scalar."""
    ranks = ranks or Ranks()
    batch, length = ids_BT.shape
    packing = Packing.rectangle(batch, length, device=ids_BT.device)
    hidden_NH = model.features(ranks.piece(ids_BT).flatten(), packing).hidden_NH
    return _cross_entropy(model, hidden_NH, ids_BT, ahead=1, ranks=ranks)


def balance_loss(balance: Balance) -> Tensor:
    """Sequence-wise balance loss of one layer, a scalar; the least it can be is about 1.

    With f_i = E / (K T) * (times expert i was chosen) and P_i the mean over tokens of its share of
    the sigmoid scores, the loss of a sequence is sum_i f_i P_i (DeepSeek-V3, arXiv 2412.19437, eq.
    17-20, without alpha). Gradients reach the router through P only. Mean over sequences.
    """
    chosen_BE = balance.counts_BE.to(balance.shares_BE.dtype)
    frequency_BE = chosen_BE * (chosen_BE.shape[1] / chosen_BE.sum(1, keepdim=True))
    return (frequency_BE * balance.shares_BE).sum(-1).mean()


@torch.no_grad()
def update_router_bias(model: KExaone, loads: Sequence[Tensor], *, rate: float = 1e-4) -> None:
    """Move every expert's selection bias by `rate`: down if its load is above the mean, else up.

    `loads` holds one [E] count per sparse layer, as in `TrainingLoss.expert_loads`; an expert
    with exactly the mean load stays (auxiliary-loss-free balancing, arXiv 2408.15664).

    Raises:
        ValueError: if there is not one load per sparse layer.
    """
    moes = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    if len(moes) != len(loads):
        raise ValueError(f"the model has {len(moes)} sparse layers, got {len(loads)} loads")
    for moe, load_E in zip(moes, loads, strict=True):
        load_E = load_E.to(torch.float64)
        direction_E = torch.sign(load_E.mean() - load_E)
        bias_E = moe.gate.e_score_correction_bias
        bias_E += rate * direction_E.to(bias_E.dtype)


def _cross_entropy(
    model: KExaone, hidden_NH: Tensor, ids_BT: Tensor, *, ahead: int, ranks: Ranks
) -> Tensor:
    """This rank's share of the mean loss of predicting the token `ahead` of each that has one."""
    batch, length = ids_BT.shape
    piece = length // ranks.tp
    first = ranks.tp_rank * piece
    # tokens of this rank's piece of a sequence that have something to predict
    live = max(0, min(piece, length - ahead - first))
    hidden = hidden_NH.view(batch, piece, -1)[:, :live].flatten(0, 1)
    targets = ids_BT[:, first + ahead : first + ahead + live].flatten()
    loss = linear_cross_entropy(hidden, model.lm_head.weight, targets).loss
    return loss * (live / ((length - ahead) * ranks.dp)) if ranks.world > 1 else loss


def _mtp_loss(
    model: KExaone, hidden_NH: Tensor, ids_BT: Tensor, packing: Packing, ranks: Ranks
) -> Tensor:
    losses = []
    for k in range(model.config.mtp_steps):
        # behind a sequence's end stands its beginning, which nothing sees that is predicted from
        further_BT = ids_BT.roll(-1 - k, 1)
        next_N = ranks.piece(further_BT).flatten()
        hidden_NH = model.predict_further(hidden_NH, next_N, packing, step=k)
        losses.append(_cross_entropy(model, hidden_NH, ids_BT, ahead=2 + k, ranks=ranks))
    return torch.stack(losses).mean()
