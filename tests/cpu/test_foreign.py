"""Kernels that nobody here wrote: forward and backward of Liger Kernel and flash-linear-attention.

References are plain torch in float64, or the packages' own naive functions. An error is relative to
the largest element: sums of up to 300 terms in fp32 stay below 300 * 2^-24 = 2e-5, recurrences over
100 steps of 32 terms below 3200 * 2^-24 = 2e-4. A 16-bit result adds its half ulp, and a gradient
that passes through several 16-bit tensors a few of them.
"""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from triton.runtime.autotuner import Autotuner

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
STEPS = 8  # 16-bit roundings between an input and a gradient


@pytest.fixture(autouse=True)
def one_config(monkeypatch):
    """The first configuration of each autotuned kernel: tuning is not what is tested."""
    prune = Autotuner.prune_configs
    monkeypatch.setattr(
        Autotuner, "prune_configs", lambda self, *a, **k: list(prune(self, *a, **k))[:1]
    )


def liger(module, name):
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), f"Liger{name}Function")


def fla(module, name):
    if importlib.util.find_spec("fla") is None:
        pytest.skip("fla-core is not installed")
    return getattr(importlib.import_module(f"fla.{module}"), name)


def tensors(dtype, *shapes, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(dtype) for s in shapes]


def as_list(value):
    return [v for v in (value if isinstance(value, tuple | list) else [value]) if v is not None]


def check(call, reference, inputs, tolerance, wide=torch.float64):
    """Outputs and gradients of `call` against those of `reference` on widened inputs."""
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.to(wide).requires_grad_() for x in inputs]
    out, expected = as_list(call(*ours)), as_list(reference(*theirs))
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(e.shape, generator=generator) for e in expected]
    sum((o.float() * w).sum() for o, w in zip(out, weights, strict=True)).backward()
    sum((e.float() * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    pairs = list(zip(out, expected, strict=True))
    pairs += [(x.grad, y.grad) for x, y in zip(ours, theirs, strict=True) if y.grad is not None]
    for at, (a, b) in enumerate(pairs):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert error <= tolerance, f"tensor {at}: {error:.2e}"


def rms(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def rotate(x, c, s):
    a, b = x.chunk(2, -1)
    return x * c[:, None] + torch.cat([-b, a], -1) * s[:, None]


def sparsemax(x):
    z = x.sort(-1, descending=True)[0]
    k = torch.arange(1, x.shape[-1] + 1)
    total = z.cumsum(-1)
    support = (1 + k * z > total).sum(-1, keepdim=True)
    # at the threshold itself, where 16-bit inputs can be, the gradient is that of the zeros
    return F.relu(x - (total.gather(-1, support - 1) - 1) / support)


def divergence(x, y):
    p, q = y.exp(), x.exp()
    m = (p + q) / 2
    return ((p * (y - m.log()) + q * (x - m.log())) / 2).sum() / x.shape[0]


def experts(x, gate_up, down, weights, chosen):
    rows = []
    for t in range(x.shape[0]):
        row = 0
        for j in range(chosen.shape[1]):
            gate, up = (gate_up[chosen[t, j]] @ x[t]).chunk(2)
            row = row + weights[t, j] * (down[chosen[t, j]] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def neighbours(q, k, v):
    at = torch.arange(q.shape[2])
    near = (at[:, None] - at[None]).abs() <= 3
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~near, float("-inf")).softmax(-1) @ v


def targets(rows, classes):
    found = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(1))
    found[5] = -100
    return found


X = (3, 37, 300)
ROWS, CLASSES = 37, 1000
ANGLES = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(2)).repeat(1, 1, 2)
PHASES = torch.polar(torch.ones(50, 32), ANGLES[0, :, :32])
TARGET = targets(ROWS, CLASSES)
CHOSEN = torch.stack([torch.arange(2) + t % 3 for t in range(40)]).int()


def complex_rotation(x):
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * PHASES.to(torch.complex128)[None, :, None]).flatten(3)


# name: function, call of it, reference, shapes
LIGER = {
    "rms_norm": ("rms_norm", "RMSNorm", lambda f, x, w: f(x, w, 1e-6, 0.0, "llama", False),
                 rms, [X, (300,)]),
    "rms_norm_gemma": ("rms_norm", "RMSNorm", lambda f, x, w: f(x, w, 1e-6, 1.0, "gemma", False),
                       lambda x, w: rms(x, 1 + w), [X, (300,)]),
    "layer_norm": ("layer_norm", "LayerNorm", lambda f, x, w, b: f(x, w, b, 1e-5),
                   lambda x, w, b: F.layer_norm(x, (300,), w, b), [X, (300,), (300,)]),
    "fused_add_rms_norm": (
        "fused_add_rms_norm", "FusedAddRMSNorm",
        lambda f, x, y, w: f(x, y, w, 1e-6, 0.0, "llama", False),
        lambda x, y, w: (rms(x + y, w), x + y), [X, X, (300,)]),
    "group_norm": ("group_norm", "GroupNorm", lambda f, x, w, b: f(x, w, b, 12, 4, 1e-5),
                   lambda x, w, b: F.group_norm(x, 4, w, b), [(2, 12, 100), (12,), (12,)]),
    "poly_norm": (
        "poly_norm", "PolyNorm", lambda f, x, w, b: f(x, w, b, 1e-6, False),
        lambda x, w, b: sum(w[i] * rms(x.pow(3 - i), 1.0) for i in range(3)) + b, [X, (3,), ()]),
    "swiglu": ("swiglu", "SiLUMul", lambda f, a, b: f(a, b), lambda a, b: F.silu(a) * b, [X, X]),
    "geglu": ("geglu", "GELUMul", lambda f, a, b: f(a, b),
              lambda a, b: F.gelu(a, approximate="tanh") * b, [X, X]),
    "relu_squared": ("relu_squared", "ReLUSquared", lambda f, x: f(x), lambda x: F.relu(x) ** 2,
                     [X]),
    "softmax": ("softmax", "Softmax", lambda f, x: f(x), lambda x: x.softmax(-1), [X]),
    "sparsemax": ("sparsemax", "Sparsemax", lambda f, x: f(x, -1), sparsemax, [X]),
    "rope": (
        "rope", "Rope", lambda f, q, k: f(q.clone(), k.clone(), ANGLES.cos().to(q.dtype),
                                          ANGLES.sin().to(q.dtype)),
        lambda q, k: [rotate(x, ANGLES.cos(), ANGLES.sin()) for x in (q, k)],
        [(2, 6, 50, 64), (2, 2, 50, 64)]),
    "llama4_rope": ("llama4_rope", "Llama4Rope", lambda f, q, k: f(q.clone(), k.clone(), PHASES),
                    lambda q, k: [complex_rotation(x) for x in (q, k)],
                    [(2, 50, 6, 64), (2, 50, 2, 64)]),
    "cross_entropy": (
        "cross_entropy", "CrossEntropy",
        lambda f, x: f(x, TARGET, None, -100, 0.0, 0.1, "sum", None)[0],
        lambda x: F.cross_entropy(x, TARGET, label_smoothing=0.1, reduction="sum"),
        [(ROWS, CLASSES)]),
    "fused_linear_cross_entropy": (
        "fused_linear_cross_entropy", "FusedLinearCrossEntropy",
        lambda f, x, w, b: f(x, w, TARGET, b)[0],
        lambda x, w, b: F.cross_entropy(x @ w.T + b, TARGET),
        [(ROWS, 64), (CLASSES, 64), (CLASSES,)]),
    "jsd": ("jsd", "JSD",
            lambda f, x: f(x.log_softmax(-1), LOGITS.to(x.dtype).log_softmax(-1), None, 0.5),
            lambda x: divergence(x.log_softmax(-1), LOGITS.double().log_softmax(-1)),
            [(ROWS, 500)]),
    "fused_moe": (
        "fused_moe", "FusedMoE", lambda f, x, g, d, w: f(x, g, d, CHOSEN, w),
        lambda x, g, d, w: experts(x, g, d, w, CHOSEN),
        [(40, 64), (4, 192, 64), (4, 64, 96), (40, 2)]),
    "neighborhood_attention": (
        "fused_neighborhood_attention", "FusedNeighborhoodAttention",
        lambda f, q, k, v: f(q, k, v, 7, 1, None), neighbours, [(2, 3, 50, 32)] * 3),
}  # fmt: skip
LOGITS = torch.randn(ROWS, 500, generator=torch.Generator().manual_seed(3))


def run_liger(name, dtype):
    module, function, call, reference, shapes = LIGER[name]
    apply = liger(module, function).apply
    inputs = tensors(dtype, *shapes, scale=0.3 if name in ("fused_moe", "poly_norm") else 1.0)
    tolerance = 300 * 2.0**-24 + (STEPS * HALF_ULP[dtype] if dtype != torch.float32 else 0)
    check(lambda *x: call(apply, *x), reference, inputs, tolerance)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "fused_moe" else n for n in LIGER]
)
def test_liger(name):
    run_liger(name, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LIGER)
def test_liger_in_16_bits(name, dtype):
    run_liger(name, dtype)


SEQUENCE = (2, 100, 2, 32)


def swap(x):
    return x.transpose(1, 2)


def causal(q, k, v):
    scores = swap(q).float() @ swap(k).float().transpose(-1, -2) * q.shape[-1] ** -0.5
    return swap(scores.tril() @ swap(v).float())


def convolution(x, w, b):
    padded = F.pad(swap(x.float()), (3, 0))
    return swap(F.silu(F.conv1d(padded, w.float()[:, None], b.float(), groups=x.shape[-1])))


def decay(x):
    return F.logsigmoid(x.float()).to(x.dtype)


def unit(x):
    return F.normalize(x.float(), dim=-1).to(x.dtype)


# name: module, function, reference, its call, the reference's call, shapes, slow to compile
FLA = {
    "linear_attention": ("ops.linear_attn", "chunk_linear_attn", None,
                         lambda f, q, k, v: f(q, k, v, normalize=False)[0],
                         lambda r, q, k, v: causal(q, k, v), [SEQUENCE] * 3, False),
    "gla_chunk": ("ops.gla", "chunk_gla", "ops.gla.naive.naive_recurrent_gla",
                  lambda f, q, k, v, g: f(q, k, v, decay(g))[0],
                  lambda r, q, k, v, g: r(q, k, v, decay(g))[0], [SEQUENCE] * 4, True),
    "gla_recurrent": ("ops.gla", "fused_recurrent_gla", "ops.gla.naive.naive_recurrent_gla",
                      lambda f, q, k, v, g: f(q, k, v, gk=decay(g))[0],
                      lambda r, q, k, v, g: r(q, k, v, decay(g))[0], [SEQUENCE] * 4, False),
    "simple_gla": ("ops.simple_gla", "chunk_simple_gla",
                   "ops.simple_gla.naive.naive_recurrent_simple_gla",
                   lambda f, q, k, v, g: f(q, k, v, decay(g))[0],
                   lambda r, q, k, v, g: r(q, k, v, decay(g))[0],
                   [SEQUENCE] * 3 + [SEQUENCE[:3]], True),
    "gated_delta": ("ops.gated_delta_rule", "chunk_gated_delta_rule",
                    "ops.gated_delta_rule.naive.naive_recurrent_gated_delta_rule",
                    lambda f, q, k, v, g, b: f(q, unit(k), v, decay(g), b.sigmoid())[0],
                    lambda r, q, k, v, g, b: r(q, unit(k), v, b.sigmoid(), decay(g))[0],
                    [SEQUENCE] * 3 + [SEQUENCE[:3]] * 2, True),
    "kda": ("ops.kda", "chunk_kda", "ops.kda.naive.naive_recurrent_kda",
            lambda f, q, k, v, g, b: f(q, unit(k), v, decay(g), b.sigmoid())[0],
            lambda r, q, k, v, g, b: r(q, unit(k), v, decay(g), b.sigmoid())[0],
            [SEQUENCE] * 4 + [SEQUENCE[:3]], True),
    "rwkv6": ("ops.rwkv6", "chunk_rwkv6", "ops.rwkv6.recurrent_naive.naive_recurrent_rwkv6",
              lambda f, q, k, v, w, u: f(q, k, v, decay(w), u, scale=1.0)[0],
              lambda r, q, k, v, w, u: swap(r(swap(q), swap(k), swap(v), swap(decay(w)), u,
                                              scale=1.0)[0]),
              [SEQUENCE] * 4 + [SEQUENCE[2:]], True),
    "hgrn": ("ops.hgrn", "chunk_hgrn", "ops.hgrn.naive.naive_recurrent_hgrn",
             lambda f, x, g: f(x, decay(g))[0], lambda r, x, g: r(x, decay(g))[0],
             [(2, 100, 64)] * 2, False),
    "attention": ("ops.attn.parallel", "parallel_attn", "ops.attn.naive.naive_parallel_attn",
                  lambda f, q, k, v: f(q, k, v, window_size=16),
                  lambda r, q, k, v: r(q.float(), k.float(), v.float(), window_size=16)[0],
                  [(2, 100, 4, 32), SEQUENCE, SEQUENCE], False),
    "forgetting_attention": (
        "ops.forgetting_attn", "parallel_forgetting_attn",
        "ops.forgetting_attn.naive.naive_forgetting_attn",
        lambda f, q, k, v, g: f(q, k, v, decay(g)), lambda r, q, k, v, g: r(q, k, v, decay(g)),
        [SEQUENCE] * 3 + [SEQUENCE[:3]], False),
    "stickbreaking": (
        "ops.stickbreaking_attn", "parallel_stickbreaking_attn",
        "ops.stickbreaking_attn.naive.naive_stickbreaking_attn",
        lambda f, q, k, v: f(q, k, v)[0], lambda r, q, k, v: r(q.float(), k.float(), v.float())[0],
        [SEQUENCE] * 3, True),
    "causal_conv1d": ("modules.causal_conv1d.ops", "causal_conv1d", None,
                      lambda f, x, w, b: f(x, w, b, activation="silu")[0],
                      lambda r, x, w, b: convolution(x, w, b), [(2, 100, 70), (70, 4), (70,)],
                      False),
    "l2norm": ("modules.norm.l2norm", "l2norm", None, lambda f, x: f(x), lambda r, x: unit(x),
               [(77, 100)], False),
    "rms_norm_gated": ("modules.norm.fused_norm_gate", "rms_norm_gated", None,
                       lambda f, x, z, w: f(x, z, w, None),
                       lambda r, x, z, w: rms(x.float(), w.float()) * F.silu(z.float()),
                       [(77, 128), (77, 128), (128,)], False),
    "token_shift": ("modules.token_shift", "token_shift", "modules.token_shift.token_shift_ref",
                    lambda f, x: f(x), lambda r, x: r(x), [(2, 100, 64)], False),
}  # fmt: skip


def run_fla(name, dtype):
    module, function, naive, call, reference, shapes, _ = FLA[name]
    apply = fla(module, function)
    plain = fla(*naive.rsplit(".", 1)) if naive else None
    tolerance = 3200 * 2.0**-24 + (STEPS * HALF_ULP[dtype] if dtype != torch.float32 else 0)
    # the naive functions compute in fp32 whatever they are given
    check(lambda *x: call(apply, *x), lambda *x: reference(plain, *x), tensors(dtype, *shapes),
          tolerance, torch.float32)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if FLA[n][-1] else n for n in FLA]
)
def test_flash_linear_attention(name):
    run_fla(name, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLA)
def test_flash_linear_attention_in_bfloat16(name):
    run_fla(name, torch.bfloat16)
