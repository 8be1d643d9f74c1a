"""Jobs of the ops that are bound by arithmetic or by reading weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.cross_entropy import linear_cross_entropy
from ..kernels.newton_schulz import newton_schulz, newton_schulz_reference
from ..model.config import Config
from .registry import Job, drawn, job, nbytes


@job("linear_cross_entropy")
def linear_cross_entropy_job(cfg: Config, tokens: int) -> Job:
    """Loss and all gradients in one go, which is how ours computes them."""
    x, weight = drawn(tokens, cfg.hidden_size), drawn(cfg.vocab_size, cfg.hidden_size, seed=1)
    weight *= cfg.hidden_size**-0.5
    targets = torch.randint(0, cfg.vocab_size, (tokens,))

    def step(loss):  # type: ignore[no-untyped-def]
        def run(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
                value = loss(*leaves, targets)
                return value.detach(), *torch.autograd.grad(value, leaves)

        return run

    def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.mT).float(), targets)

    flops = 3 * 2 * tokens * cfg.hidden_size * cfg.vocab_size
    return Job(
        step(lambda *a: linear_cross_entropy(*a).loss),
        {"eager": step(eager), "inductor": step(torch.compile(eager))},
        [x, weight, targets],
        2 * nbytes(x, weight),
        flops=flops,
    )


@job("newton_schulz")
def newton_schulz_job(cfg: Config, tokens: int) -> Job:
    """The stacked gate and up projections of a few experts, float32 as the optimizer keeps them."""
    rows, columns, count = cfg.moe_intermediate_size, cfg.hidden_size, 4
    x = drawn(count, rows, columns, dtype=torch.float32)
    small, large = sorted((rows, columns))
    # per step two symmetric products at half cost and one full one
    flops = 5 * count * (2 * small * small * large * 3 // 2 + small**3)
    return Job(
        newton_schulz,
        {"eager": newton_schulz_reference, "inductor": torch.compile(newton_schulz_reference)},
        [x],
        2 * nbytes(x),
        flops=flops,
    )
