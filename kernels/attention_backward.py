"""The gradient of `attention.py`, without atomics: every element is summed in a fixed order.

    p_ij = exp(s_ij - lse_i)           delta_i = dout_i out_i - dlse_i
    ds_ij = p_ij (dout_i v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j       dk_j = scale sum_i ds_ij q_i       dv_j = sum_i p_ij dout_i
    dsink = -sum_i exp(sink - lse_i) delta_i

One kernel walks the keys of a tile of queries for dq (and writes delta), a second one the queries
of a tile of keys for dk and dv, all query heads of the key head in one program. Both compute the
scores again. Method: Dao 2023 (arXiv 2307.08691), with dq in a kernel of its own.

Shape letters: N packed queries, M packed keys, A query heads, G key heads, D head dimension,
B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arch import Arch
from .attention_tiles import (
    EVERYTHING,
    LOG2E,
    Problem,
    find_block,
    key_blocks,
    load_heads,
    load_rows,
    problem_of,
    query_tile,
    rows_of,
    store_rows,
    tokens_of,
    unit_stride,
    visible,
    width,
)
from .lang import jit, tl, triton
from .launch import empty, on, register
from .tables import pick


@dataclass(frozen=True)
class Config:
    """Tiles of query rows by keys, of the kernel for dq and of that for dk and dv.

    `split`: blocks without hidden pairs are done first, in a loop without masks.
    """

    rows: int
    keys: int
    rows_kv: int
    keys_kv: int
    split: bool
    num_warps: int
    num_stages: int


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Candidates, the default first.

    Each warp takes 16 keys of dk and dv; where there are fewer, warps repeat each other's products.
    """
    if arch.is_cpu:
        narrow, wide = (256, 32, 256, 32), (256, 64, 64, 128)
        order = (narrow, wide) if problem.narrow else (wide, narrow)
        return [Config(*tiles, False, 4, 1) for tiles in (*order, (128, 128, 128, 128))]
    found = [
        Config(rows, keys, rows_kv, keys_kv, True, warps, stages)
        for rows in (128, 64, 32, 16)
        for keys in (64, 32, 16)
        for rows_kv in (64, 32, 16)
        for keys_kv in (64, 128, 32, 16)
        for warps in ((4,) if arch.warp_size == 64 else (8, 4))
        for stages in (2, 1)
    ]
    fitting = [c for c in found if feasible(c, problem, arch)]
    return sorted(fitting, key=lambda c: c.keys_kv < 16 * c.num_warps)


def feasible(config: Config, problem: Problem, arch: Arch) -> bool:
    """Whether tiles fit shared memory, and what a thread holds its registers, in both kernels."""
    columns, threads = width(problem.head_dim), config.num_warps * arch.warp_size
    rows, rows_kv = (rows_of(r, problem.group) for r in (config.rows, config.rows_kv))
    keys, keys_kv = config.keys, config.keys_kv
    if problem.itemsize == 4:
        # multiplied without tensor cores, by threads that hold whole rows
        return max(rows, rows_kv) * columns <= 2048 and keys == keys_kv == 16
    # without a pipeline, queries are kept transposed beside what was loaded
    held_rows = config.num_stages + 0.5 * (config.num_stages == 1)
    shared = max(rows + config.num_stages * keys, keys_kv + held_rows * rows_kv)
    # accumulators, scores, addresses and, where the instructions take them from there, the tile
    fixed = 0 if arch.shared_operands else 1
    held = rows * (columns + 2 * keys + fixed * columns / 2) + 0.75 * keys * columns
    held_kv = keys_kv * (2 * columns + 2 * rows_kv + fixed * columns) + 0.75 * rows_kv * columns
    most_kv = 172 if arch.shared_operands and columns <= 128 else 124
    fits = held <= 152 * threads and held_kv <= most_kv * threads and keys * columns <= 8192
    return fits and 2 * problem.itemsize * columns * shared <= arch.shared_bytes


@triton.jit
def _dq_step(q, grad, lse, delta, k_MGD, v_MGD, first, start, high, position, window, scale,
             k_stride, v_stride, acc, MASKED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
             KEYS: tl.constexpr):  # fmt: skip
    key = start + tl.arange(0, KEYS)
    live = key < high if MASKED else key >= 0
    k = load_rows(k_MGD, first + key, k_stride, live, D, WIDTH)
    v = load_rows(v_MGD, first + key, v_stride, live, D, WIDTH)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(tl.fma(scores, scale, -lse[:, None]) * LOG2E)
    if MASKED:
        p = tl.where(visible(position[:, None], key[None, :], window), p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, acc, input_precision="ieee")


@jit(do_not_specialize=["sequences", "window"])
def _dq_kernel(
    grad_NAD, lse_grad_NA, q_NAD, k_MGD, v_MGD, out_NAD, lse_NA, starts_B, starts_k_B,
    delta_NA, dq_NAD,
    sequences, window, scale, grad_stride, grad_head_stride, q_stride, q_head_stride,
    k_stride, k_head_stride, v_stride, v_head_stride,
    SPLIT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    token, head, live, position, start_k, window, low, high = query_tile(
        starts_B, starts_k_B, sequences, window, GROUP, TOKENS, ROWS)  # fmt: skip
    kv_head = tl.program_id(1).to(tl.int64)
    at = token * HEADS + head
    q = load_heads(q_NAD, token, head, q_stride, q_head_stride, live, D, WIDTH)
    grad = load_heads(grad_NAD, token, head, grad_stride, grad_head_stride, live, D, WIDTH)
    out = load_rows(out_NAD, at, D, live, D, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    delta -= tl.load(lse_grad_NA + at, mask=live, other=0.0)
    tl.store(delta_NA + at, delta, mask=live)
    lse = tl.load(lse_NA + at, mask=live, other=0.0)
    k_MGD += kv_head * k_head_stride
    v_MGD += kv_head * v_head_stride

    begin, blocks, first_full, end_full = key_blocks(low, high, window, SPLIT, KEYS)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if SPLIT:
        for block in range(first_full, end_full):
            acc = _dq_step(
                q, grad, lse, delta, k_MGD, v_MGD, start_k, begin + block * KEYS, high, position,
                window, scale, k_stride, v_stride, acc, False, D, WIDTH, KEYS,
            )  # fmt: skip
    for edge in range(0, blocks - (end_full - first_full)):
        block = tl.where(edge < first_full, edge, edge + end_full - first_full)
        acc = _dq_step(
            q, grad, lse, delta, k_MGD, v_MGD, start_k, begin + block * KEYS, high, position,
            window, scale, k_stride, v_stride, acc, True, D, WIDTH, KEYS,
        )  # fmt: skip
    store_rows(dq_NAD, at, D, acc * scale, live, D, WIDTH)


@triton.jit
def _dkv_step(k, v, q_NAD, grad_NAD, lse_NA, delta_NA, first, place, length, behind, key, window,
              scale, kv_head, q_stride, q_head_stride, grad_stride, grad_head_stride, dk, dv,
              MASKED: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
              WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)
    token, head = place + row // GROUP, kv_head * GROUP + row % GROUP
    # a row that is not live is all zero, and so is what it adds
    live = (row < TOKENS * GROUP) & (token < length)
    position = behind + token
    token = first + token
    q = load_heads(q_NAD, token, head, q_stride, q_head_stride, live, D, WIDTH)
    grad = load_heads(grad_NAD, token, head, grad_stride, grad_head_stride, live, D, WIDTH)
    lse = tl.load(lse_NA + token * HEADS + head, mask=live, other=0.0)
    delta = tl.load(delta_NA + token * HEADS + head, mask=live, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.exp2(tl.fma(scores, scale, -lse[None, :]) * LOG2E)
    if MASKED:
        p = tl.where(visible(position[None, :], key[:, None], window), p, 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return tl.dot(ds, q, dk, input_precision="ieee"), dv


@jit(do_not_specialize=["sequences", "window"])
def _dkv_kernel(
    grad_NAD, q_NAD, k_MGD, v_MGD, lse_NA, delta_NA, starts_B, starts_k_B, dk_MGD, dv_MGD,
    sequences, window, scale, grad_stride, grad_head_stride, q_stride, q_head_stride,
    k_stride, k_head_stride, v_stride, v_head_stride,
    SPLIT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1).to(tl.int64)
    b, place = find_block(starts_k_B, tl.program_id(0), sequences, KEYS)
    start_q, start_k = tl.load(starts_B + b), tl.load(starts_k_B + b).to(tl.int64)
    length = tl.load(starts_B + b + 1) - start_q
    length_k = (tl.load(starts_k_B + b + 1) - start_k).to(tl.int32)
    behind, window = length_k - length, tl.minimum(window, length_k)
    first = start_q.to(tl.int64)

    key = place + tl.arange(0, KEYS)
    live = key < length_k
    k = load_rows(k_MGD + kv_head * k_head_stride, start_k + key, k_stride, live, D, WIDTH)
    v = load_rows(v_MGD + kv_head * v_head_stride, start_k + key, v_stride, live, D, WIDTH)
    last = tl.minimum(place + KEYS, length_k) - 1
    # queries begin .. end - 1 see a key of this tile
    begin = tl.maximum(place - behind, 0)
    end = tl.minimum(last + window - behind, length)
    blocks = tl.cdiv(tl.maximum(end - begin, 0), TOKENS)
    dk, dv = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    first_full = blocks * 0
    end_full = first_full
    if SPLIT:
        first_full = tl.minimum(tl.cdiv(tl.maximum(last - behind - begin, 0), TOKENS), blocks)
        whole = tl.maximum(place + window - behind - begin, 0) // TOKENS
        end_full = tl.maximum(first_full, tl.minimum(whole, blocks))
        for block in range(first_full, end_full):
            dk, dv = _dkv_step(
                k, v, q_NAD, grad_NAD, lse_NA, delta_NA, first, begin + block * TOKENS, length,
                behind, key, window, scale, kv_head, q_stride, q_head_stride, grad_stride,
                grad_head_stride, dk, dv, False, HEADS, GROUP, D, WIDTH, TOKENS, ROWS,
            )  # fmt: skip
    for edge in range(0, blocks - (end_full - first_full)):
        block = tl.where(edge < first_full, edge, edge + end_full - first_full)
        dk, dv = _dkv_step(
            k, v, q_NAD, grad_NAD, lse_NA, delta_NA, first, begin + block * TOKENS, length,
            behind, key, window, scale, kv_head, q_stride, q_head_stride, grad_stride,
            grad_head_stride, dk, dv, True, HEADS, GROUP, D, WIDTH, TOKENS, ROWS,
        )  # fmt: skip
    at = (start_k + key) * (HEADS // GROUP) + kv_head
    store_rows(dk_MGD, at, D, dk * scale, live, D, WIDTH)
    store_rows(dv_MGD, at, D, dv, live, D, WIDTH)


def _backward(
    grad: Tensor, lse_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None, sinks: Tensor | None, out: Tensor, lse: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and sinks (empty without sinks)."""
    tokens, heads, head_dim = q.shape
    q, k, v, grad = (unit_stride(x) for x in (q, k, v, grad))
    starts = cu_seqlens.contiguous()
    starts_k = starts if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    problem = problem_of(q, k.shape[1], window)
    config = pick("attention_backward", configs, problem, q.device)
    block, block_kv = (tokens_of(r, problem.group) for r in (config.rows, config.rows_kv))
    dq = empty(*q.shape, like=q)
    dk, dv = empty(*k.shape, like=k), empty(*v.shape, like=v)
    delta = empty(tokens, heads, like=q, dtype=torch.float32)
    sequences, kv_heads = len(starts) - 1, k.shape[1]
    strides = (*grad.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    common = {"SPLIT": config.split, "HEADS": heads, "GROUP": problem.group, "D": head_dim,
              "WIDTH": width(head_dim), "num_warps": config.num_warps,
              "num_stages": config.num_stages}  # fmt: skip
    span, lse, lse_grad = window or EVERYTHING, lse.contiguous(), lse_grad.contiguous()
    if sequences and heads:
        with on(q):
            if tokens:
                _dq_kernel[(tokens // block + sequences, kv_heads)](
                    grad, lse_grad, q, k, v, out.contiguous(), lse, starts, starts_k, delta, dq,
                    sequences, span, scale, *strides, TOKENS=block,
                    ROWS=rows_of(config.rows, problem.group), KEYS=config.keys, **common,
                )  # fmt: skip
            if len(k):
                _dkv_kernel[(len(k) // config.keys_kv + sequences, kv_heads)](
                    grad, q, k, v, lse, delta, starts, starts_k, dk, dv,
                    sequences, span, scale, *strides, TOKENS=block_kv,
                    ROWS=rows_of(config.rows_kv, problem.group), KEYS=config.keys_kv, **common,
                )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    share = (sinks.float() - lse).exp() * delta
    return dq, dk, dv, -share.sum(0).to(sinks.dtype)


def _fake(
    grad: Tensor, lse_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None, sinks: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), like


op = register(
    "attention_backward(Tensor grad, Tensor lse_grad, Tensor q, Tensor k, Tensor v,"
    " Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? sinks, Tensor out, Tensor lse,"
    " SymInt window, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake,
)
