"""Optimizer against torch.optim, and properties of the learning-rate schedule."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kexaone import impl
from kexaone.model.config import Config
from kexaone.model.moe import Experts
from kexaone.model.optimizer import MuonAdamW, clip_gradients, orthogonalize
from kexaone.model.schedule import learning_rate
from kexaone.model.transformer import KExaone

SMALL = dataclasses.replace(
    Config.preset("mini"), windows=(8, 8, 8, 0), num_experts=8, num_experts_per_tok=2
)
IMPLEMENTATIONS = ["reference", "triton"]


class Mixed(nn.Module):
    """One parameter of every kind the optimizer tells apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(20, 16)
        self.wide = nn.Linear(48, 16, bias=False)
        self.tall = nn.Linear(16, 48, bias=False)
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.norm = nn.LayerNorm(16, bias=False)


def draw_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_muon_agrees_with_torch(kind: str) -> None:
    ours, theirs = Mixed(), Mixed()
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    optimizer = MuonAdamW(ours, weight_decay=0.1)
    oracle = torch.optim.Muon(
        [theirs.wide.weight, theirs.tall.weight],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    for i in range(5):
        for model in (ours, theirs):
            draw_gradients(model, i)
        with impl(kind):
            optimizer.step(0.02)
        oracle.step()
    for name in ("wide.weight", "tall.weight"):
        moved = ours.get_parameter(name) - start[name]
        expected = theirs.get_parameter(name) - start[name]
        # torch iterates in bfloat16 (unit roundoff 2^-9), five steps of three products with a
        # slope of up to 3.4 each; measured 6e-3
        assert relative(moved, expected) < 0.03
    momentum = optimizer.state_dict()["wide.weight.momentum"]
    assert torch.equal(momentum, oracle.state[theirs.wide.weight]["momentum_buffer"])


def test_adamw_agrees_with_torch() -> None:
    ours, theirs = Mixed(), Mixed()
    optimizer = MuonAdamW(ours, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    decayed = [theirs.embed_tokens.weight, theirs.lm_head.weight]
    oracle = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [theirs.norm.weight], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for i in range(5):
        lr = 0.01 / (i + 1)
        for group in oracle.param_groups:
            group["lr"] = lr
        for model in (ours, theirs):
            draw_gradients(model, i)
        optimizer.step(lr)
        oracle.step()
    for name in ("embed_tokens.weight", "lm_head.weight", "norm.weight"):
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name))


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32), (1, 7)])
def test_orthogonalize_flattens_singular_values(shape: tuple[int, int], kind: str) -> None:
    torch.manual_seed(1)
    u, s, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.linspace(1, 0.02, len(s))
    with impl(kind):
        result = orthogonalize(u @ s.diag() @ vt)
    # the singular vectors stay, so U^T R V is diagonal with the new singular values
    core = u.T @ result @ vt.T
    assert core.diag().min() > 0.6 and core.diag().max() < 1.25
    assert (core - core.diag().diag()).abs().max() < 1e-3


def test_orthogonalize_zero_and_tiny() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4, 5)), torch.zeros(3, 4, 5))
    assert orthogonalize(torch.full((4, 5), 1e-30)).isfinite().all()


def test_batched_equals_one_by_one() -> None:
    experts = Experts(SMALL)
    torch.manual_seed(2)
    for p in experts.parameters():
        nn.init.normal_(p)
        p.grad = torch.randn_like(p)
    before = {n: p.detach().clone() for n, p in experts.named_parameters()}
    MuonAdamW(experts, weight_decay=0.0).step(0.1)
    for name, p in experts.named_parameters():
        assert p.grad is not None
        grads = p.grad.chunk(2, dim=1) if name == "gate_up_proj" else (p.grad,)
        halves = [torch.stack([orthogonalize(m) for m in part]) for part in grads]
        scale = 0.2 * math.sqrt(max(grads[0].shape[1:]))
        expected = before[name] - 0.1 * scale * torch.cat(halves, dim=1)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-4)


def test_model_parameters_go_to_the_right_optimizer() -> None:
    names = MuonAdamW(KExaone(SMALL)).state_dict()
    for muon in (
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.0.mlp.down_proj.weight",
        "mtp.fc.weight",
    ):
        assert f"{muon}.momentum" in names
    for adamw in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert f"{adamw}.square" in names


def test_absent_and_zero_gradients() -> None:
    model = Mixed()
    optimizer = MuonAdamW(model, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.wide.weight.grad = None
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert optimizer.state_dict()["norm.weight.step"] == 1
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_state_dict_is_exact() -> None:
    first, second = Mixed(), Mixed()
    one, two = MuonAdamW(first), MuonAdamW(second)
    draw_gradients(first, 0)
    one.step(0.1)
    two.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    second.load_state_dict(first.state_dict())
    for model, optimizer in ((first, one), (second, two)):
        draw_gradients(model, 1)
        optimizer.step(0.1)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_state_dict_that_does_not_fit() -> None:
    optimizer = MuonAdamW(Mixed())
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"wide\.weight\.momentum must be"):
        optimizer.load_state_dict(state | {"wide.weight.momentum": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="extra"):
        optimizer.load_state_dict(state | {"extra": torch.zeros(())})
    with pytest.raises(ValueError, match="weight_decay"):
        MuonAdamW(Mixed(), weight_decay=-1.0)


def test_clip_returns_the_norm_before() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([p], 1.0)) == pytest.approx(5)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))


@given(st.data())
def test_schedule(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 500))
    warmup = data.draw(st.integers(0, total))
    decay = data.draw(st.integers(0, total - warmup))
    peak = data.draw(st.floats(1e-6, 1.0))
    rates = [
        learning_rate(i, peak=peak, total=total, warmup=warmup, decay=decay)
        for i in range(total + 2)
    ]
    assert all(0 < r <= peak for r in rates[:total]) and rates[total:] == [0.0, 0.0]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert all(r == peak for r in rates[max(warmup - 1, 0) : total - decay])
    falling = rates[total - decay : total + 1]
    steps = [a - b for a, b in itertools.pairwise(falling)]
    assert all(s == pytest.approx(peak / decay) for s in steps)


@pytest.mark.parametrize("bad", [{"warmup": 8}, {"step": -1}, {"decay": -1}])
def test_schedule_errors(bad: dict[str, int]) -> None:
    arguments = {"step": 0, "total": 10, "warmup": 2, "decay": 3} | bad
    step = arguments.pop("step")
    with pytest.raises(ValueError, match="warmup"):
        learning_rate(step, peak=1.0, **arguments)
