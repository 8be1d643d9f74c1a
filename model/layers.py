"""RMSNorm, rotary embedding and SwiGLU: the small parts of a decoder block.

Shape letters: N packed tokens, H hidden size, A heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.rmsnorm import rms_norm
from ..kernels.swiglu import swiglu as fused_swiglu


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are taken: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """y = cast(x / sqrt(mean(x^2) + eps)) * weight, statistics in float32 (Zhang & Sennrich 2019).

    The cast to the input's dtype comes before the weight: the order that Llama, T5 and the
    released K-EXAONE code use.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


def rope_tables(positions_N: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x theta^(-2i/D), float32 [N, 1, D/2] each (Su et al. 2021).

    Angles are taken in float64: at position 262143 a float32 product is already off by 0.01 rad.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions_N.device, dtype=torch.float64)
    angles = positions_N.double()[:, None, None] * theta ** (-exponent / head_dim)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x_NAD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of every head ("neox" half-split layout)."""
    first, second = x_NAD.to(wide(x_NAD.dtype)).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_NAD.dtype)


def swiglu(gate: Tensor, up: Tensor, limit: float = 0.0) -> Tensor:
    """silu(gate) * up; with a limit > 0, gate is first clamped from above and up on both sides."""
    return fused_swiglu(gate, up, limit=limit)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, limit: float = 0.0) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.limit = limit

    def forward(self, x_NH: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_NH), self.up_proj(x_NH), self.limit))
