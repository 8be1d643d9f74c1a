"""What is tuned on a device that is there: the ops with real tensors, at the shapes of a preset.

A task makes its inputs once and says what is computed from them; the backward pass runs too where
the inputs want it. The launchers then say which kernels that takes and which problems they solve:
one task may tune several kernels, and a kernel that two tasks share is tuned once.

To add an op, write a function from `Setting` to `Task` and list it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that its kernels see."""

    hidden: int
    dense: int
    width: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    window: int


SHAPES = {
    "k-exaone-236b": Shapes(6144, 18432, 2048, 128, 8, 64, 8, 128, 153_600, 128),
    "mid": Shapes(1024, 3072, 512, 32, 8, 16, 2, 128, 32_000, 128),
    "mini": Shapes(128, 384, 64, 32, 8, 8, 2, 32, 288, 64),
}


@dataclass(frozen=True)
class Setting:
    """Shapes, and where and in which type the floating-point tensors are."""

    shapes: Shapes
    tokens: int
    device: torch.device
    dtype: torch.dtype

    def floats(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Normal values, the same on every run."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * scale).to(self.device, self.dtype)

    def integers(self, values: Tensor) -> Tensor:
        return values.to(self.device)


@dataclass(frozen=True)
class Task:
    """`function` of `inputs`; its gradients too if `trains`. `op` is what `--op` selects."""

    op: str
    problem: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    trains: bool = True


def _norm(s: Setting) -> Task:
    x, weight = s.floats(s.tokens, s.shapes.hidden), s.floats(s.shapes.hidden, seed=1)
    return Task("rms_norm", f"{s.tokens} x {s.shapes.hidden}", ops.rms_norm, (x, weight))


def _swiglu(s: Setting) -> Task:
    x = s.floats(s.tokens, 2 * s.shapes.dense)
    return Task("swiglu", f"{s.tokens} x {s.shapes.dense}", ops.swiglu, (x,))


def _qk_norm_rope(s: Setting) -> Task:
    c = s.shapes
    q, k = (s.floats(s.tokens, heads, c.head_dim, seed=heads) for heads in (c.heads, c.kv_heads))
    weights = [s.floats(c.head_dim, seed=i) for i in (1, 2)]
    angle = torch.rand(s.tokens, c.head_dim // 2, generator=torch.Generator().manual_seed(3))
    cos, sin = (s.integers(t) for t in (angle.cos(), angle.sin()))

    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return ops.qk_norm_rope(q, k, q_weight, k_weight, cos=cos.to(wide), sin=sin.to(wide))

    return Task("qk_norm_rope", f"{s.tokens} tokens", run, (q, k, *weights))


def _attention(s: Setting, window: int) -> Task:
    c = s.shapes
    q = s.floats(s.tokens, c.heads, c.head_dim)
    k, v = (s.floats(s.tokens, c.kv_heads, c.head_dim, seed=i) for i in (1, 2))
    starts = s.integers(torch.tensor([0, s.tokens], dtype=torch.int32))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, cu_seqlens=starts, window=window).out

    name = f"{s.tokens} tokens" + (f", window {window}" if window else "")
    return Task("attention", name, run, (q, k, v))


def _grouped(s: Setting) -> tuple[Any, Tensor]:
    """Tokens spread over the experts by chance, and weights of their choices."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(s.tokens, s.shapes.experts, generator=generator)
    weights, ids = scores.topk(s.shapes.top_k, dim=1)
    found = ops.group_by_expert(s.integers(ids), experts=s.shapes.experts)
    return found, s.integers(weights / weights.sum(1, keepdim=True))


def _experts(s: Setting, trains: bool) -> Task:
    c = s.shapes
    found, weights = _grouped(s)
    x = s.floats(s.tokens, c.hidden)
    gate_up = s.floats(c.experts, 2 * c.width, c.hidden, seed=1, scale=c.hidden**-0.5)
    down = s.floats(c.experts, c.hidden, c.width, seed=2, scale=c.width**-0.5)

    def run(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return ops.moe_experts(x, gate_up, down, weights.to(wide), found.offsets, found.order)

    return Task("moe_experts", f"{s.tokens} tokens", run, (x, gate_up, down), trains)


def _permute(s: Setting) -> Task:
    found, _ = _grouped(s)
    return Task("permute", f"{s.tokens} tokens", lambda x: ops.permute(x, found),
                (s.floats(s.tokens, s.shapes.hidden),))  # fmt: skip


def _route(s: Setting) -> Task:
    c = s.shapes
    bias = s.integers(torch.zeros(c.experts))

    def run(x: Tensor, weight: Tensor) -> Any:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return ops.route(x, weight, bias.to(wide), top_k=c.top_k, scaling=2.5).weights_TK

    weight = s.floats(c.experts, c.hidden, seed=1, scale=c.hidden**-0.5)
    return Task("route", f"{s.tokens} tokens", run, (s.floats(s.tokens, c.hidden), weight))


def _group_by_expert(s: Setting) -> Task:
    generator = torch.Generator().manual_seed(4)
    ids = torch.rand(s.tokens, s.shapes.experts, generator=generator).topk(s.shapes.top_k)[1]
    return Task("group_by_expert", f"{s.tokens} tokens",
                lambda ids: ops.group_by_expert(ids, experts=s.shapes.experts).order,
                (s.integers(ids),), trains=False)  # fmt: skip


def _cross_entropy(s: Setting) -> Task:
    c = s.shapes
    targets = s.integers(torch.arange(s.tokens) * 17 % c.vocabulary)
    inputs = (s.floats(s.tokens, c.hidden),
              s.floats(c.vocabulary, c.hidden, seed=1, scale=c.hidden**-0.5))  # fmt: skip
    return Task("linear_cross_entropy", f"{s.tokens} tokens",
                lambda x, w: ops.linear_cross_entropy(x, w, targets).loss, inputs)  # fmt: skip


def _quantize(s: Setting) -> Task:
    return Task("quantize_fp8", f"{s.tokens} x {s.shapes.hidden}",
                lambda x: ops.quantize_fp8(x).scales,
                (s.floats(s.tokens, s.shapes.hidden),), trains=False)  # fmt: skip


def _skinny(s: Setting) -> Task:
    c = s.shapes
    weight = s.floats(c.heads * c.head_dim, c.hidden, seed=1, scale=c.hidden**-0.5)
    return Task("linear_skinny", f"{s.tokens} tokens", ops.linear_skinny,
                (s.floats(s.tokens, c.hidden), weight), trains=False)  # fmt: skip


def _decode(s: Setting, window: int) -> Task:
    c, slots = s.shapes, 4096
    keys, values = (s.floats(s.tokens, c.kv_heads, slots, c.head_dim, seed=i) for i in (1, 2))
    lengths = s.integers(torch.full((s.tokens,), slots, dtype=torch.int32))
    starts = s.integers(torch.arange(s.tokens + 1, dtype=torch.int32))

    def run(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        found = ops.attention_decode(
            q, keys, values, longest=1, window=window, lengths=lengths, cu_seqlens=starts
        )
        return found.out

    name = f"{s.tokens} x {slots}" + (f", window {window}" if window else "")
    q = s.floats(s.tokens, c.heads, c.head_dim)
    return Task("attention_decode", name, run, (q, keys, values), trains=False)


Maker = Callable[[Setting], Task]
TRAINING: dict[str, tuple[Maker, ...]] = {
    "moe_experts": (lambda s: _experts(s, True),),
    "attention": (lambda s: _attention(s, 0), lambda s: _attention(s, s.shapes.window)),
    "linear_cross_entropy": (_cross_entropy,),
    "rms_norm": (_norm,),
    "qk_norm_rope": (_qk_norm_rope,),
    "swiglu": (_swiglu,),
    "route": (_route,),
    "group_by_expert": (_group_by_expert,),
    "permute": (_permute,),
    "quantize_fp8": (_quantize,),
}
"""Tasks over the tokens of a training step or of a prompt."""

DECODING: dict[str, tuple[Maker, ...]] = {
    "moe_experts": (lambda s: _experts(s, False),),
    "attention_decode": (lambda s: _decode(s, 0), lambda s: _decode(s, s.shapes.window)),
    "linear_skinny": (_skinny,),
}
"""Tasks over the few tokens of a decoding step."""

OPS = tuple(dict.fromkeys((*TRAINING, *DECODING)))
