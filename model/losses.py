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
    model: KExaone, ids_BT: Tensor, *, mtp_weight: float = 0.05, balance_weight: float = 1e-4
) -> TrainingLoss:
    """next_token + mtp_weight * mtp + balance_weight * balance, of whole sequences.

    next_token: mean cross-entropy, in nats, of the B * (T - 1) tokens that have a predecessor.
    mtp: the same for tokens predicted further ahead: depth k reads the previous depth's hidden
    state of token i and the embedding of token i + 1 + k, and predicts token i + 2 + k
    (DeepSeek-V3, arXiv 2412.19437, section 2.2); the mean over depths. balance: see
    `balance_loss`, the mean over sparse layers. Nothing here waits for the device beyond what the
    model itself does.

    Raises:
        ValueError: if `ids_BT` is not [B, T] or too short for the deepest prediction.
    """
    depths = model.config.mtp_steps if model.mtp is not None else 0
    if ids_BT.dim() != 2 or ids_BT.shape[0] == 0 or ids_BT.shape[1] < 2 + depths:
        raise ValueError(
            f"training needs ids of shape [B, T] with T >= {2 + depths}, got {tuple(ids_BT.shape)}"
        )
    batch, length = ids_BT.shape
    packing = Packing.of([length] * batch, starts=None, device=ids_BT.device)
    features = model.features(ids_BT.flatten(), packing)
    hidden_BTH = features.hidden_NH.view(batch, length, -1)
    next_token = _cross_entropy(model, hidden_BTH[:, :-1], ids_BT[:, 1:])
    zero = next_token.new_zeros(())
    mtp = _mtp_loss(model, hidden_BTH, ids_BT, depths) if depths else zero
    balances, loads = [], []
    for routing in features.routings:
        scores_TE = routing.scores_TE.float()
        statistics = balance_statistics(scores_TE, routing.ids_TK, sequences=batch)
        balances.append(balance_loss(statistics))
        loads.append(statistics.counts_BE.sum(0))
    balance = torch.stack(balances).mean() if balances else zero
    total = next_token + mtp_weight * mtp + balance_weight * balance
    return TrainingLoss(total, next_token, mtp, balance, tuple(loads))


def next_token_loss(model: KExaone, ids_BT: Tensor) -> Tensor:
    """Only the next-token part of `training_loss`: mean cross-entropy in nats, a scalar."""
    batch, length = ids_BT.shape
    packing = Packing.of([length] * batch, starts=None, device=ids_BT.device)
    hidden_BTH = model.features(ids_BT.flatten(), packing).hidden_NH.view(batch, length, -1)
    return _cross_entropy(model, hidden_BTH[:, :-1], ids_BT[:, 1:])


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


def _cross_entropy(model: KExaone, hidden_BTH: Tensor, targets_BT: Tensor) -> Tensor:
    hidden_NH, targets_N = hidden_BTH.flatten(0, 1), targets_BT.flatten()
    return linear_cross_entropy(hidden_NH, model.lm_head.weight, targets_N).loss


def _mtp_loss(model: KExaone, hidden_BTH: Tensor, ids_BT: Tensor, depths: int) -> Tensor:
    batch, length = ids_BT.shape
    losses = []
    for k in range(depths):
        kept = length - 2 - k  # tokens that still have something to predict
        packing = Packing.of([kept] * batch, starts=None, device=ids_BT.device)
        hidden_NH = model.predict_further(
            hidden_BTH[:, :kept].flatten(0, 1),
            ids_BT[:, 1 + k : 1 + k + kept].flatten(),
            packing,
            step=k,
        )
        hidden_BTH = hidden_NH.view(batch, kept, -1)
        losses.append(_cross_entropy(model, hidden_BTH, ids_BT[:, 2 + k :]))
    return torch.stack(losses).mean()
