"""The kernel layer's public functions: `kexaone.ops.rms_norm(x, weight)` and its siblings.

Tensors come first, everything else is keyword-only. Each runs on CPU and GPU tensors, is a
registered PyTorch op (`torch.ops.kexaone.*`), differentiable where its docstring says so, and
works under torch.compile.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels.attention import attention as attention
    from .kernels.attention_decode import attention_decode as attention_decode
    from .kernels.balance import balance_statistics as balance_statistics
    from .kernels.cross_entropy import linear_cross_entropy as linear_cross_entropy
    from .kernels.cross_entropy import linear_cross_entropy_tokens as linear_cross_entropy_tokens
    from .kernels.dequantize import dequantize_fp8 as dequantize_fp8
    from .kernels.expert_weights_fp8 import weight_gradient_fp8 as weight_gradient_fp8
    from .kernels.experts import moe_experts as moe_experts
    from .kernels.experts_fp8 import moe_experts_fp8 as moe_experts_fp8
    from .kernels.experts_fp8_training import (
        moe_experts_fp8_training as moe_experts_fp8_training,
    )
    from .kernels.gradient_norm import clip_gradients as clip_gradients
    from .kernels.gradient_norm import gradient_norm as gradient_norm
    from .kernels.grouped_gemm import grouped_gemm as grouped_gemm
    from .kernels.grouped_gemm_fp8 import grouped_gemm_fp8 as grouped_gemm_fp8
    from .kernels.grouping import group_by_expert as group_by_expert
    from .kernels.linear_fp8 import linear_fp8 as linear_fp8
    from .kernels.linear_skinny import linear_skinny as linear_skinny
    from .kernels.newton_schulz import newton_schulz as newton_schulz
    from .kernels.optimizer import adamw_step as adamw_step
    from .kernels.permute import permute as permute
    from .kernels.permute import unpermute as unpermute
    from .kernels.qk_norm_rope import qk_norm_rope as qk_norm_rope
    from .kernels.qk_norm_rope_cache import qk_norm_rope_cache as qk_norm_rope_cache
    from .kernels.qk_norm_rope_packed import qk_norm_rope_packed as qk_norm_rope_packed
    from .kernels.quantize import quantize_fp8 as quantize_fp8
    from .kernels.quantize_groups import quantize_fp8_groups as quantize_fp8_groups
    from .kernels.quantize_tiles import quantize_fp8_blocks as quantize_fp8_blocks
    from .kernels.quantize_tiles import quantize_fp8_both as quantize_fp8_both
    from .kernels.quantize_tiles import quantize_fp8_transposed as quantize_fp8_transposed
    from .kernels.rmsnorm import add_rms_norm as add_rms_norm
    from .kernels.rmsnorm import rms_norm as rms_norm
    from .kernels.rmsnorm_fp8 import add_rms_norm_fp8 as add_rms_norm_fp8
    from .kernels.rmsnorm_fp8 import rms_norm_fp8 as rms_norm_fp8
    from .kernels.route import route as route
    from .kernels.swiglu import swiglu as swiglu
    from .kernels.swiglu import swiglu_fp8 as swiglu_fp8

_HOMES = {
    "adamw_step": "optimizer",
    "add_rms_norm": "rmsnorm",
    "add_rms_norm_fp8": "rmsnorm_fp8",
    "attention": "attention",
    "attention_decode": "attention_decode",
    "balance_statistics": "balance",
    "clip_gradients": "gradient_norm",
    "dequantize_fp8": "dequantize",
    "gradient_norm": "gradient_norm",
    "group_by_expert": "grouping",
    "grouped_gemm": "grouped_gemm",
    "grouped_gemm_fp8": "grouped_gemm_fp8",
    "linear_cross_entropy": "cross_entropy",
    "linear_cross_entropy_tokens": "cross_entropy",
    "linear_fp8": "linear_fp8",
    "linear_skinny": "linear_skinny",
    "moe_experts": "experts",
    "moe_experts_fp8": "experts_fp8",
    "moe_experts_fp8_training": "experts_fp8_training",
    "newton_schulz": "newton_schulz",
    "permute": "permute",
    "qk_norm_rope": "qk_norm_rope",
    "qk_norm_rope_cache": "qk_norm_rope_cache",
    "qk_norm_rope_packed": "qk_norm_rope_packed",
    "quantize_fp8": "quantize",
    "quantize_fp8_blocks": "quantize_tiles",
    "quantize_fp8_both": "quantize_tiles",
    "quantize_fp8_groups": "quantize_groups",
    "quantize_fp8_transposed": "quantize_tiles",
    "rms_norm": "rmsnorm",
    "rms_norm_fp8": "rmsnorm_fp8",
    "route": "route",
    "swiglu": "swiglu",
    "swiglu_fp8": "swiglu",
    "unpermute": "permute",
    "weight_gradient_fp8": "expert_weights_fp8",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kexaone.ops' has no attribute {name!r}")
    found = getattr(import_module(f".kernels.{_HOMES[name]}", __package__), name)
    # the next look-up finds it without coming here
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
