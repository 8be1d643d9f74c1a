"""Jobs of the ops that are bound by memory: norms, rotary embedding, SwiGLU, casts, routing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.rmsnorm import add_rms_norm, rms_norm, rms_norm_reference
from ..kernels.rmsnorm_fp8 import rms_norm_fp8
from ..model.config import Config
from .registry import Job, drawn, job, nbytes


@job("rms_norm")
def rms_norm_job(cfg: Config, tokens: int) -> Job:
    x, weight = drawn(tokens, cfg.hidden_size), drawn(cfg.hidden_size, seed=1)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, eps=1e-5)

    peers = {
        "eager": eager,
        "inductor": torch.compile(eager),
        "F.rms_norm": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5),
    }
    return Job(rms_norm, peers, [x, weight], nbytes(x, x, weight), nbytes(x, x, x, weight, weight))


@job("add_rms_norm")
def add_rms_norm_job(cfg: Config, tokens: int) -> Job:
    x, residual = (drawn(tokens, cfg.hidden_size, seed=s) for s in (0, 1))
    weight = drawn(cfg.hidden_size, seed=2)

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return rms_norm_reference(total, weight, eps=1e-5), total

    return Job(
        add_rms_norm,
        {"eager": eager, "inductor": torch.compile(eager)},
        [x, residual, weight],
        nbytes(x, x, x, x, weight),
        nbytes(x, x, x, x, weight, weight),
    )


@job("rms_norm_fp8")
def rms_norm_fp8_job(cfg: Config, tokens: int) -> Job:
    x, weight = drawn(tokens, cfg.hidden_size), drawn(cfg.hidden_size, seed=1)

    def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = rms_norm_reference(x, weight, eps=1e-5).float().unflatten(-1, (-1, 128))
        amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        values = (groups * (448 / amax)).to(torch.float8_e4m3fn)
        return values.flatten(-2), amax.squeeze(-1) / 448

    return Job(
        rms_norm_fp8,
        {"eager": eager, "inductor": torch.compile(eager)},
        [x, weight],
        nbytes(x, weight) + x.numel() + x.numel() // 128 * 4,
    )
