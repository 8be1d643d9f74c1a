"""Mixture of experts: sigmoid router with a selection bias, grouped experts, shared expert.

Method: DeepSeek-V3 (arXiv 2412.19437), auxiliary-loss-free balancing by a per-expert bias that
takes part in the choice of experts but not in their weights.

Shape letters: T tokens, H hidden, E experts, K experts per token, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dispatch import choose
from ..kernels.experts import moe_experts
from ..kernels.experts_fp8 import moe_experts_fp8
from ..kernels.experts_fp8_training import moe_experts_fp8_training
from ..kernels.grouping import group_by_expert
from ..kernels.quantize import QuantizedRows
from ..kernels.route import route
from .config import Config
from .fp8 import dequantize
from .layers import SwiGLU, swiglu


@dataclass(frozen=True)
class Routing:
    """What the router decided: sigmoid scores [T, E], expert ids [T, K], weights [T, K] float32."""

    scores_TE: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


class Router(nn.Module):
    """Scores in float32 whatever the model's dtype; ties in the choice go to the lower index."""

    e_score_correction_bias: Tensor

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.num_experts, cfg.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(cfg.num_experts))
        self.top_k = cfg.num_experts_per_tok
        self.scaling = cfg.routed_scaling_factor
        self.normalize = cfg.norm_topk_prob

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Router:
        # model.to(bfloat16) must not round the bias: it accumulates steps of 1e-4
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype not in (torch.float32, torch.float64):
            self.e_score_correction_bias = bias.to(moved.device, torch.float32)
        return self

    def forward(self, x_TH: Tensor) -> Routing:
        routed = route(x_TH, self.weight, self.e_score_correction_bias, top_k=self.top_k,
                       scaling=self.scaling, normalize=self.normalize)  # fmt: skip
        return Routing(routed.scores_TE, routed.ids_TK, routed.weights_TK)


class Experts(nn.Module):
    """All routed experts of a layer; gate and up projections are stored stacked, gate rows first.

    The weights may be float8 with one float32 scale per 128 x 128 block. They are then widened in
    the kernel, or one expert at a time where gradients are wanted.
    """

    gate_up_proj_scale: Tensor | None
    down_proj_scale: Tensor | None

    def __init__(self, cfg: Config, *, limit: float = 0.0) -> None:
        super().__init__()
        experts, width, hidden = cfg.num_experts, cfg.moe_intermediate_size, cfg.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.register_buffer("gate_up_proj_scale", None)
        self.register_buffer("down_proj_scale", None)
        self.limit = limit
        self.training_fp8 = False

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Sum over the chosen experts of weight x expert(x), [T, H]; weighted after down_proj."""
        scaled = self.gate_up_proj_scale is not None
        if choose(x_TH) == "reference" or (scaled and torch.is_grad_enabled()):
            return self._one_by_one(x_TH, routing)
        groups = group_by_expert(routing.ids_TK, experts=len(self.gate_up_proj))
        sorted_rows = routing.weights_TK, groups.offsets, groups.order
        if self.training_fp8 and torch.is_grad_enabled() and not scaled:
            return moe_experts_fp8_training(x_TH, self.gate_up_proj, self.down_proj, *sorted_rows,
                                            limit=self.limit)  # fmt: skip
        if self.gate_up_proj_scale is None or self.down_proj_scale is None:
            return moe_experts(x_TH, self.gate_up_proj, self.down_proj, *sorted_rows,
                               limit=self.limit)  # fmt: skip
        gate_up = QuantizedRows(self.gate_up_proj, self.gate_up_proj_scale)
        down = QuantizedRows(self.down_proj, self.down_proj_scale)
        return moe_experts_fp8(x_TH, gate_up, down, *sorted_rows, limit=self.limit)

    def _one_by_one(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """The same in plain PyTorch, an expert at a time."""
        tokens, top_k = routing.ids_TK.shape
        chosen = routing.ids_TK.flatten()
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(self.gate_up_proj)).tolist()
        groups = x_TH.index_select(0, order // top_k).split(counts)
        # unbind, not indexing: its backward stacks the gradients once
        gate_up, down = self.gate_up_proj.unbind(), self.down_proj.unbind()
        outputs = []
        for e, group in enumerate(groups):
            if len(group):
                gate_up_e = self._widen(gate_up[e], self.gate_up_proj_scale, e, x_TH.dtype)
                down_e = self._widen(down[e], self.down_proj_scale, e, x_TH.dtype)
                gate, up = F.linear(group, gate_up_e).chunk(2, dim=-1)
                outputs.append(F.linear(swiglu(gate, up, self.limit), down_e))
        if not outputs:
            return torch.zeros_like(x_TH)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        per_token = torch.cat(outputs).index_select(0, position).view(tokens, top_k, -1)
        return (per_token * routing.weights_TK.unsqueeze(-1)).sum(1).to(x_TH.dtype)

    @staticmethod
    def _widen(weight: Tensor, scale: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor:
        return weight if scale is None else dequantize(weight, scale[expert], dtype=dtype)


class MoE(nn.Module):
    """Routed experts plus an unscaled, un-gated shared expert."""

    def __init__(self, cfg: Config, *, limit: float = 0.0) -> None:
        super().__init__()
        self.gate = Router(cfg)
        self.experts = Experts(cfg, limit=limit)
        self.shared_experts = None
        if cfg.num_shared_experts:
            width = cfg.num_shared_experts * cfg.moe_intermediate_size
            self.shared_experts = SwiGLU(cfg.hidden_size, width, limit=limit)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Routing]:
        routing = self.gate(x_TH)
        out = self.experts(x_TH, routing)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x_TH)
        return out, routing
