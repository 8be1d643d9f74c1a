"""Public kernels that multiply matrices, launched on meta tensors as their own functions do.

Liger Kernel's fused mixture of experts with the configuration it has without tuning, the Triton
attention of flash-linear-attention, and torchao's block-scaled float8 products with the middle of
the tiles it tunes over (128 x 128, 8 warps, 2 stages). Shapes are those of the 236B model.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .. import ops
from ..autotune.cases import HEAD, KEYS, QUERIES, WIDTH, Builder, E, H, K, T, train
from ..kernels.arch import Arch
from ..kernels.grouping import Permutation, group_by_expert_reference
from ..kernels.quantize import QuantizedRows
from ..kernels.quantize_groups import QuantizedGroups

FP8 = torch.float8_e4m3fn
_LIGER_ROWS = 64
_SHARED = {"hopper": 227 * 1024, "ampere": 163 * 1024}


def floats(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def grouping(b: Builder) -> Permutation:
    """Tokens spread evenly over the experts."""
    ids = (torch.arange(T * K) * 37 % E).view(T, K)
    found = group_by_expert_reference(ids, experts=E)
    return Permutation(b.data(found.offsets), b.data(found.order), b.data(found.position))


def experts(arch: Arch, b: Builder) -> None:
    routing, weights = grouping(b), b.floats(T, K, dtype=torch.float32)
    gate_up, down = b.floats(E, 2 * WIDTH, H), b.floats(E, H, WIDTH)
    train(ops.moe_experts(b.floats(T, H), gate_up, down, weights, routing.offsets, routing.order))


def _liger_tiles(b: Builder) -> tuple[Tensor, Tensor, Tensor]:
    """Starts of experts, first row of each tile, and its expert."""
    rows = T * K // E
    starts = torch.arange(E + 1, dtype=torch.int32) * rows
    firsts = torch.arange(T * K // _LIGER_ROWS, dtype=torch.int32) * _LIGER_ROWS
    return b.data(starts), b.data(firsts), b.data(firsts // rows)


def liger_up(arch: Arch, b: Builder) -> None:
    from liger_kernel.ops import fused_moe_kernels as liger

    starts, firsts, owners = _liger_tiles(b)
    order = group_by_expert_reference((torch.arange(T * K) * 37 % E).view(T, K), experts=E).order
    kernel: Any = liger._fused_up_proj_swiglu_kernel
    kernel.fn[(len(firsts), WIDTH // 128)](
        floats(T, H), floats(E, 2 * WIDTH, H), b.data(order // K), starts, firsts, owners,
        floats(T * K, 2 * WIDTH), floats(T * K, WIDTH), H_dim=H, I_dim=WIDTH,
        stride_x_T=H, stride_x_H=1, stride_w_E=2 * WIDTH * H, stride_w_N=H, stride_w_K=1,
        stride_pre_TK=2 * WIDTH, stride_pre_N=1, stride_post_TK=WIDTH, stride_post_N=1,
        BLOCK_M=_LIGER_ROWS, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=2,
    )  # fmt: skip


def liger_down(arch: Arch, b: Builder) -> None:
    from liger_kernel.ops import fused_moe_kernels as liger

    starts, firsts, owners = _liger_tiles(b)
    kernel: Any = liger._fused_down_proj_kernel
    kernel.fn[(len(firsts), H // 128)](
        floats(T * K, WIDTH), floats(E, H, WIDTH), starts, firsts, owners, floats(T * K, H),
        H_dim=H, I_dim=WIDTH, stride_post_TK=WIDTH, stride_post_I=1, stride_w_E=H * WIDTH,
        stride_w_H=WIDTH, stride_w_I=1, stride_Y_TK=H, stride_Y_H=1,
        BLOCK_M=_LIGER_ROWS, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=2,
    )  # fmt: skip


def liger_weight(arch: Arch, b: Builder) -> None:
    from liger_kernel.ops import fused_moe_kernels as liger

    starts = _liger_tiles(b)[0]
    order = group_by_expert_reference((torch.arange(T * K) * 37 % E).view(T, K), experts=E).order
    kernel: Any = liger._moe_bwd_dW1_kernel
    kernel.fn[(E * H // 64, 2 * WIDTH // 128)](
        floats(T, H), floats(T * K, 2 * WIDTH), b.data(order // K), starts, floats(E, 2 * WIDTH, H),
        H_dim=H, I_dim=WIDTH, stride_x_T=H, stride_x_H=1, stride_d_pre_TK=2 * WIDTH,
        stride_d_pre_N=1, stride_dW1_E=2 * WIDTH * H, stride_dW1_N=H, stride_dW1_H=1,
        BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=2,
    )  # fmt: skip


def attention(arch: Arch, b: Builder) -> None:
    q, k, v = b.floats(T, QUERIES, HEAD), b.floats(T, KEYS, HEAD), b.floats(T, KEYS, HEAD)
    starts = b.data(torch.tensor([0, T], dtype=torch.int32))
    train(ops.attention(q, k, v, cu_seqlens=starts).out)


def _fla(arch: Arch) -> Any:
    """The scope in which its launchers plan for `arch`."""

    def enough(name: str = "none", *_: Any, **__: Any) -> bool:
        return arch.backend == "cuda" and arch.shared_bytes >= _SHARED.get(name, 0)

    return mock.patch("fla.ops.attn.parallel.check_shared_mem", enough)


def fla_forward(arch: Arch, b: Builder) -> None:
    from fla.ops.attn.parallel import parallel_attn_fwd

    absent: Any = None
    q, k, v = floats(1, T, QUERIES, HEAD), floats(1, T, KEYS, HEAD), floats(1, T, KEYS, HEAD)
    with _fla(arch):
        parallel_attn_fwd(q, k, v, absent, absent, HEAD**-0.5)


def fla_backward(arch: Arch, b: Builder) -> None:
    from fla.ops.attn.parallel import parallel_attn_bwd

    absent: Any = None
    q, k, v = floats(1, T, QUERIES, HEAD), floats(1, T, KEYS, HEAD), floats(1, T, KEYS, HEAD)
    out, lse = floats(1, T, QUERIES, HEAD), floats(1, T, QUERIES, dtype=torch.float32)
    with _fla(arch):
        parallel_attn_bwd(q, k, v, out, absent, lse, floats(*out.shape), scale=HEAD**-0.5)


def linear_fp8(arch: Arch, b: Builder) -> None:
    rows = QuantizedRows(floats(T, H, dtype=FP8), floats(T, H // 128, dtype=torch.float32))
    scales = floats(QUERIES * HEAD // 128, H // 128, dtype=torch.float32)
    ops.linear_fp8(rows, floats(QUERIES * HEAD, H, dtype=FP8), scales)


def torchao_linear(arch: Arch, b: Builder) -> None:
    from torchao.prototype.blockwise_fp8_training import kernels as torchao

    columns, kernel = QUERIES * HEAD, torchao.triton_fp8_gemm_1x128_128x128_kernel
    fixed: Any = kernel
    fixed.fn[(T // 128, columns // 128)](
        floats(T, H, dtype=FP8), H, 1, floats(columns, H, dtype=FP8), 1, H, floats(T, columns),
        columns, 1, floats(H // 128, T, dtype=torch.float32), 1, T,
        floats(columns // 128, H // 128, dtype=torch.float32), 1, H // 128, T, columns, H,
        out_dtype=torch.bfloat16, BLOCK_SIZE_M=128, BLOCK_SIZE_N=128, BLOCK_SIZE_K=128,
        num_warps=8, num_stages=2,
    )  # fmt: skip


def weight_fp8(arch: Arch, b: Builder) -> None:
    """One expert that has all the rows, as torchao's kernel knows no groups."""
    offsets = b.data(torch.tensor([0, T], dtype=torch.int32))
    places = T + 128
    grad, x = (
        QuantizedGroups(floats(n, places, dtype=FP8), floats(places // 128, n, dtype=torch.float32))
        for n in (2 * WIDTH, H)
    )
    ops.weight_gradient_fp8(grad, x, offsets)


def torchao_weight(arch: Arch, b: Builder) -> None:
    from torchao.prototype.blockwise_fp8_training import kernels as torchao

    fixed: Any = torchao.triton_fp8_gemm_1x128_128x1_kernel
    fixed.fn[(2 * WIDTH // 128, H // 128)](
        floats(2 * WIDTH, T, dtype=FP8), T, 1, floats(H, T, dtype=FP8), 1, T, floats(2 * WIDTH, H),
        floats(T // 128, 2 * WIDTH, dtype=torch.float32), 1, 2 * WIDTH,
        floats(T // 128, H, dtype=torch.float32), H, 1, 2 * WIDTH, H, T,
        BLOCK_SIZE_M=128, BLOCK_SIZE_N=128, BLOCK_SIZE_K=128, num_warps=8, num_stages=2,
    )  # fmt: skip
