"""What is audited: the ops at the shapes of K-EXAONE 236B.

A case calls public functions on meta tensors. To add an op, add a `Case`: `b.floats` makes a tensor
that takes part in autograd, `b.data` one whose contents are known (offsets of groups, starts of
sequences), and `train` runs the backward pass too. Where a kernel's access cannot be 16 bytes wide,
name its argument in `narrow` with the reason.

Shape letters: T tokens, H hidden, E experts (each WIDTH wide), K experts of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..kernels.argmax import argmax
from ..kernels.grouping import Permutation, group_by_expert_reference
from ..kernels.quantize import QuantizedRows
from .capture import storage_of

T, H, WIDTH, E, K = 8192, 6144, 2048, 128, 8
QUERIES, KEYS, HEAD = 64, 8, 128
VOCABULARY = 153_600
FP8 = torch.float8_e4m3fn


class Builder:
    """Makes meta tensors and remembers what is known of their contents."""

    def __init__(self) -> None:
        self.contents: dict[int, np.ndarray] = {}
        self._kept: list[Tensor] = []

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A contiguous tensor that requires a gradient."""
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    def data(self, values: Tensor) -> Tensor:
        """A tensor with known contents, for what steers a kernel."""
        tensor = torch.empty_like(values, device="meta")
        self._kept.append(tensor)
        self.contents[storage_of(tensor)] = values.contiguous().numpy()
        return tensor


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result: a tensor or a dataclass of tensors."""
    if isinstance(result, Tensor):
        return [result]
    return [getattr(result, f.name) for f in dataclasses.fields(result)]


def train(*outputs: Any) -> None:
    """The backward pass with contiguous gradients."""
    wanted = [t for t in outputs if t.requires_grad]
    torch.autograd.backward(wanted, [torch.empty_like(t) for t in wanted])


@dataclass(frozen=True)
class Case:
    """One op with one problem. `fp8`: only for architectures that have the type.

    `narrow` maps a kernel's argument (as the report names it), or `target:argument`, to the reason
    why its accesses may be under 16 bytes.
    """

    op: str
    problem: str
    call: Callable[[Builder], Any]
    fp8: bool = False
    narrow: Mapping[str, str] = field(default_factory=dict)


def _rms_norm(b: Builder) -> None:
    train(ops.rms_norm(b.floats(T, H), b.floats(H)))


def _add_rms_norm(b: Builder) -> None:
    out = ops.add_rms_norm(b.floats(T, H), b.floats(T, H), b.floats(H))
    train(out.normed, out.total)


def _heads(b: Builder, tokens: int = T) -> tuple[Tensor, ...]:
    """Queries, keys and the two norms' weights."""
    return (b.floats(tokens, QUERIES, HEAD), b.floats(tokens, KEYS, HEAD), b.floats(HEAD),
            b.floats(HEAD))  # fmt: skip


def _tables(b: Builder, tokens: int = T) -> dict[str, Any]:
    """Cosines and sines, one row per token."""
    return {
        name: b.floats(tokens, HEAD // 2, dtype=torch.float32).detach() for name in ("cos", "sin")
    }


def _qk_norm_rope(b: Builder, turned: bool = True) -> None:
    out = ops.qk_norm_rope(*_heads(b), **(_tables(b) if turned else {}))
    train(*tensors(out))


def _qk_norm_rope_packed(b: Builder) -> None:
    qkv = b.floats(T, (QUERIES + 2 * KEYS) * HEAD)
    out = ops.qk_norm_rope_packed(qkv, b.floats(HEAD), b.floats(HEAD), key_heads=KEYS, **_tables(b))
    train(*tensors(out))


@torch.no_grad()
def _qk_norm_rope_cache(b: Builder) -> None:
    tokens, slots = 64, 8192
    q, k, q_weight, k_weight = _heads(b, tokens)
    keys, values = (b.floats(tokens, KEYS, slots, HEAD) for _ in range(2))
    each, last = b.data(torch.arange(tokens)), b.data(torch.full((tokens,), slots - 1))
    ops.qk_norm_rope_cache(q, k, torch.empty_like(k), q_weight, k_weight, keys, values, each, last,
                           **_tables(b, tokens))  # fmt: skip


def _cross_entropy(op: Callable[..., Any]) -> Callable[[Builder], None]:
    def call(b: Builder) -> None:
        targets = b.data(torch.arange(T) * 17 % VOCABULARY)
        out = op(b.floats(T, H), b.floats(VOCABULARY, H), targets)
        train(*tensors(out))

    return call


def _grouping(b: Builder, tokens: int) -> Permutation:
    """Tokens spread evenly over the experts."""
    ids = (torch.arange(tokens * K) * 37 % E).view(tokens, K)
    found = group_by_expert_reference(ids, experts=E)
    return Permutation(b.data(found.offsets), b.data(found.order), b.data(found.position))


def _permute(b: Builder) -> None:
    train(ops.permute(b.floats(T, H), _grouping(b, T)))


def _unpermute(b: Builder) -> None:
    weights = b.floats(T, K, dtype=torch.float32)
    train(ops.unpermute(b.floats(T * K, H), _grouping(b, T), weights))


def _route(b: Builder) -> None:
    bias = b.floats(E, dtype=torch.float32).detach()
    out = ops.route(b.floats(T, H), b.floats(E, H), bias, top_k=K, scaling=2.5)
    train(*(t for t in tensors(out) if t.is_floating_point()))


def _balance(b: Builder) -> None:
    ids = b.data((torch.arange(T * K) * 37 % E).view(T, K))
    train(ops.balance_statistics(b.floats(T, E, dtype=torch.float32), ids, sequences=2).shares_BE)


def _grouped_gemm(tokens: int) -> Callable[[Builder], None]:
    def call(b: Builder) -> None:
        found = _grouping(b, tokens)
        train(ops.grouped_gemm(b.floats(tokens * K, H), b.floats(E, WIDTH, H), found.offsets))

    return call


def _moe_experts(tokens: int) -> Callable[[Builder], None]:
    def call(b: Builder) -> None:
        found, weights = _grouping(b, tokens), b.floats(tokens, K, dtype=torch.float32)
        gate_up, down = b.floats(E, 2 * WIDTH, H), b.floats(E, H, WIDTH)
        train(ops.moe_experts(b.floats(tokens, H), gate_up, down, weights, found.offsets,
                              found.order))  # fmt: skip

    return call


def _float8(b: Builder, *shape: int, block: int = 128) -> QuantizedRows:
    """float8 values with scales of `block` x 128, no gradient."""
    *outer, rows, columns = shape
    scales = b.floats(*outer, -(-rows // block), -(-columns // 128), dtype=torch.float32).detach()
    return QuantizedRows(b.floats(*outer, rows, columns).detach().to(FP8), scales)


def _linear_fp8(tokens: int) -> Callable[[Builder], None]:
    def call(b: Builder) -> None:
        ops.linear_fp8(b.floats(tokens, H).detach(), *tensors(_float8(b, QUERIES * HEAD, H)))

    return call


def _grouped_gemm_fp8(b: Builder) -> None:
    weight, rows = _float8(b, E, WIDTH, H), _float8(b, T * K, H, block=1)
    ops.grouped_gemm_fp8(rows, weight.values, weight.scales, _grouping(b, T).offsets)


def _moe_experts_fp8(tokens: int) -> Callable[[Builder], None]:
    def call(b: Builder) -> None:
        found, weights = _grouping(b, tokens), b.floats(tokens, K, dtype=torch.float32).detach()
        ops.moe_experts_fp8(b.floats(tokens, H).detach(), _float8(b, E, 2 * WIDTH, H),
                            _float8(b, E, H, WIDTH), weights, found.offsets,
                            found.order)  # fmt: skip

    return call


def _moe_experts_fp8_training(b: Builder) -> None:
    found, weights = _grouping(b, T), b.floats(T, K, dtype=torch.float32)
    gate_up, down = b.floats(E, 2 * WIDTH, H), b.floats(E, H, WIDTH)
    train(ops.moe_experts_fp8_training(b.floats(T, H), gate_up, down, weights, found.offsets,
                                       found.order))  # fmt: skip


def _attention(window: int, dim: int = HEAD) -> Callable[[Builder], None]:
    def call(b: Builder) -> None:
        q, k, v = b.floats(T, QUERIES, dim), b.floats(T, KEYS, dim), b.floats(T, KEYS, dim)
        starts = b.data(torch.tensor([0, T], dtype=torch.int32))
        out = ops.attention(q, k, v, cu_seqlens=starts, window=window)
        train(out.out)

    return call


def _attention_decode(window: int) -> Callable[[Builder], None]:
    sequences, slots = 64, 256 if window else T

    def call(b: Builder) -> None:
        keys, values = (b.floats(sequences, KEYS, slots, HEAD).detach() for _ in range(2))
        each = torch.arange(sequences + 1, dtype=torch.int32)
        ops.attention_decode(
            b.floats(sequences, QUERIES, HEAD).detach(), keys, values, longest=1, window=window,
            lengths=b.data(torch.full((sequences,), T, dtype=torch.int32)), cu_seqlens=b.data(each),
        )  # fmt: skip

    return call


def _adamw(b: Builder) -> None:
    weight, gradient = b.floats(8192, H).detach(), b.floats(8192, H).detach()
    means, squares = (b.floats(8192, H, dtype=torch.float32).detach() for _ in range(2))
    ops.adamw_step([weight], [gradient], [means], [squares], step=1, lr=1e-4)


_MIXED = "copies to shared memory go by what a thread multiplies: 8 bytes of float8, as two of 4"
_GFX950 = {f"gfx950:{name}": _MIXED for name in ("w_ENH", "w_ENH+x_TH", "w_ENK+x_MK")}
CASES = (
    Case("rms_norm", f"{T} x {H}", _rms_norm),
    Case("add_rms_norm", f"{T} x {H}", _add_rms_norm),
    Case("rms_norm", "65536 wide", lambda b: train(ops.rms_norm(b.floats(512, 65536),
                                                               b.floats(65536)))),
    Case("rms_norm_fp8", f"{T} x {H}", lambda b: ops.rms_norm_fp8(b.floats(T, H), b.floats(H)),
         fp8=True),
    Case("add_rms_norm_fp8", f"{T} x {H}", lambda b: ops.add_rms_norm_fp8(
        b.floats(T, H), b.floats(T, H), b.floats(H)), fp8=True),
    Case("qk_norm_rope", f"{T} tokens", _qk_norm_rope),
    Case("qk_norm_rope", f"{T} tokens, not turned", lambda b: _qk_norm_rope(b, turned=False)),
    Case("qk_norm_rope_packed", f"{T} tokens", _qk_norm_rope_packed),
    Case("qk_norm_rope_cache", "64 tokens", _qk_norm_rope_cache),
    Case("argmax", f"64 x {VOCABULARY}", lambda b: argmax(b.floats(64, VOCABULARY))),
    Case("linear_cross_entropy", f"{T} x {H} x {VOCABULARY}",
         _cross_entropy(lambda *a: ops.linear_cross_entropy(*a))),
    Case("linear_cross_entropy_tokens", f"{T} x {H} x {VOCABULARY}",
         _cross_entropy(lambda *a: ops.linear_cross_entropy_tokens(*a))),
    Case("swiglu", f"{T} x {WIDTH}", lambda b: train(ops.swiglu(b.floats(T, WIDTH),
                                                                b.floats(T, WIDTH)))),
    Case("swiglu", f"{T} x {WIDTH}, one tensor", lambda b: train(ops.swiglu(
        b.floats(T, 2 * WIDTH)))),
    Case("swiglu_fp8", f"{T} x {WIDTH}", lambda b: ops.swiglu_fp8(b.floats(T, 2 * WIDTH)),
         fp8=True),
    Case("quantize_fp8", f"{T} x {H}", lambda b: ops.quantize_fp8(b.floats(T, H)), fp8=True),
    Case("quantize_fp8_blocks", f"{T} x {H}", lambda b: ops.quantize_fp8_blocks(b.floats(T, H)),
         fp8=True),
    Case("quantize_fp8_transposed", f"{T} x {H}",
         lambda b: ops.quantize_fp8_transposed(b.floats(T, H)), fp8=True),
    Case("quantize_fp8_both", f"{T} x {H}", lambda b: ops.quantize_fp8_both(b.floats(T, H)),
         fp8=True),
    Case("dequantize_fp8", f"{T} x {H}", lambda b: ops.dequantize_fp8(
        *tensors(_float8(b, T, H, block=1))), fp8=True),
    Case("route", f"{T} tokens", _route),
    Case("balance_statistics", f"{T} tokens", _balance),
    Case("group_by_expert", f"{T} tokens", lambda b: ops.group_by_expert(
        b.data(torch.arange(T * K).view(T, K) * 37 % E), experts=E)),
    Case("permute", f"{T} tokens", _permute),
    Case("unpermute", f"{T} tokens", _unpermute),
    Case("grouped_gemm", f"{T} tokens", _grouped_gemm(T)),
    Case("grouped_gemm", "64 tokens", _grouped_gemm(64)),
    Case("moe_experts", f"{T} tokens", _moe_experts(T)),
    Case("moe_experts", "64 tokens", _moe_experts(64)),
    Case("linear_fp8", f"{T} tokens", _linear_fp8(T), fp8=True),
    Case("linear_fp8", "64 tokens", _linear_fp8(64), fp8=True),
    Case("linear_skinny", "16 tokens", lambda b: ops.linear_skinny(
        b.floats(16, H).detach(), b.floats(QUERIES * HEAD, H).detach())),
    Case("grouped_gemm_fp8", f"{T} tokens", _grouped_gemm_fp8, fp8=True),
    Case("moe_experts_fp8", f"{T} tokens", _moe_experts_fp8(T), fp8=True,
         narrow=_GFX950),
    Case("moe_experts_fp8", "64 tokens", _moe_experts_fp8(64), fp8=True,
         narrow=_GFX950),
    Case("moe_experts_fp8_training", f"{T} tokens", _moe_experts_fp8_training, fp8=True),
    Case("attention", f"{T} tokens, window 128", _attention(128)),
    Case("attention", f"{T} tokens", _attention(0)),
    Case("attention", f"{T} tokens, heads of 64", _attention(0, 64)),
    Case("attention", f"{T} tokens, heads of 256", _attention(0, 256)),
    Case("attention_decode", f"64 x {T}, window 128", _attention_decode(128)),
    Case("attention_decode", f"64 x {T}", _attention_decode(0)),
    Case("newton_schulz", f"{E} x {WIDTH} x {H}",
         lambda b: ops.newton_schulz(b.floats(E, WIDTH, H).detach())),
    Case("adamw_step", f"8192 x {H}", _adamw),
    Case("gradient_norm", f"8192 x {H}", lambda b: ops.gradient_norm([b.floats(8192, H).detach()])),
)  # fmt: skip
