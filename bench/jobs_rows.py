"""Jobs of the ops that are bound by memory: norms, rotary embedding, SwiGLU, casts, routing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from ..kernels.quantize import quantize_fp8, quantize_reference
from ..kernels.rmsnorm import add_rms_norm, rms_norm, rms_norm_reference
from ..kernels.rmsnorm_fp8 import rms_norm_fp8
from ..kernels.route import route, route_reference
from ..kernels.swiglu import swiglu, swiglu_reference
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


@job("qk_norm_rope")
def qk_norm_rope_job(cfg: Config, tokens: int) -> Job:
    dim = cfg.head_dim
    q = drawn(tokens, cfg.num_attention_heads, dim)
    k = drawn(tokens, cfg.num_key_value_heads, dim, seed=1)
    weights = [drawn(dim, seed=s) for s in (2, 3)]
    angle = torch.outer(torch.arange(tokens), cfg.rope_theta ** -(torch.arange(dim // 2) * 2 / dim))
    cos, sin = angle.cos(), angle.sin()

    def eager(*x: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rope_reference(*x, cos=cos, sin=sin, positions=None, eps=1e-5)

    moved = nbytes(q, k)
    return Job(
        lambda *x: qk_norm_rope(*x, cos=cos, sin=sin),
        {"eager": eager, "inductor": torch.compile(eager)},
        [q, k, *weights],
        2 * moved + nbytes(cos, sin),
        3 * moved + nbytes(cos, sin),
    )


@job("swiglu")
def swiglu_job(cfg: Config, tokens: int) -> Job:
    gate, up = (drawn(tokens, cfg.intermediate_size, seed=s) for s in (0, 1))
    peers = {"eager": swiglu_reference, "inductor": torch.compile(swiglu_reference),
             "F.silu": lambda gate, up: F.silu(gate) * up}  # fmt: skip
    return Job(swiglu, peers, [gate, up], 3 * nbytes(gate), 5 * nbytes(gate))


@job("quantize_fp8")
def quantize_fp8_job(cfg: Config, tokens: int) -> Job:
    x = drawn(tokens, cfg.hidden_size)

    def eager(x: Tensor) -> Tensor:
        out = quantize_reference(x)
        return out.values

    return Job(
        lambda x: quantize_fp8(x).values,
        {"eager": eager, "inductor": torch.compile(eager)},
        [x],
        nbytes(x) + x.numel() + x.numel() // 128 * 4,
    )


@job("route")
def route_job(cfg: Config, tokens: int) -> Job:
    """The router's product in float32 and the choice of experts; compared by its weights."""
    x = drawn(tokens, cfg.hidden_size)
    weight = drawn(cfg.num_experts, cfg.hidden_size, seed=1) * cfg.hidden_size**-0.5
    bias = drawn(cfg.num_experts, seed=2, dtype=torch.float32) * 0.01

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return route_reference(x, weight, bias, top_k=cfg.num_experts_per_tok).weights_TK

    return Job(
        lambda x, weight: route(x, weight, bias, top_k=cfg.num_experts_per_tok).weights_TK,
        {"eager": eager, "inductor": torch.compile(eager)},
        [x, weight],
        nbytes(x, weight) + tokens * cfg.num_experts * 4,
        2 * nbytes(x, weight) + tokens * cfg.num_experts * 4,
        flops=2 * tokens * cfg.num_experts * cfg.hidden_size,
    )
