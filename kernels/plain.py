"""PyTorch's small operators as kernels, for steps that are recorded without PyTorch (`capture`).

    add(x, y) = x + y            take(table, ids)[n] = table[ids[n]]          concatenate along rows

Everywhere else PyTorch's own are used. Sums are taken in float32 and rounded once, as PyTorch does.

Shape letters: N rows, C columns, V rows of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .lang import jit, tl
from .launch import cdiv, empty, on, require, rows

BLOCK = 1024


@jit(do_not_specialize=["N"])
def _add_kernel(x_N, y_N, out_N, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_N + at, mask=at < N).to(tl.float32)
    total = x + tl.load(y_N + at, mask=at < N).to(tl.float32)
    tl.store(out_N + at, total.to(out_N.dtype.element_ty), mask=at < N)


@jit
def _copy_kernel(x_NC, ids_N, out_NC, C, x_stride, out_stride, TAKE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(ids_N + row).to(tl.int64) if TAKE else row
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_NC + source * x_stride + column, mask=column < C)
    tl.store(out_NC + row * out_stride + column, x, mask=column < C)


def _copy(x: Tensor, out: Tensor, ids: Tensor | None = None) -> None:
    count, columns = out.shape
    if out.numel():
        with on(x):
            _copy_kernel[(count, cdiv(columns, BLOCK))](
                x, out if ids is None else ids, out, columns, x.stride(0), out.stride(0),
                TAKE=ids is not None, BLOCK=BLOCK,
            )  # fmt: skip


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y of one shape and dtype. Raises ValueError otherwise."""
    require(x.shape == y.shape and x.dtype == y.dtype,
            f"need one shape and dtype, got {x.dtype} {tuple(x.shape)} and {y.dtype} "
            f"{tuple(y.shape)}")  # fmt: skip
    x, y = x.contiguous(), y.contiguous()
    out = empty(*x.shape, like=x)
    if out.numel():
        with on(x):
            _add_kernel[(cdiv(out.numel(), BLOCK),)](x, y, out, out.numel(), BLOCK=BLOCK)
    return out


def take(table: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [...] of table [V, C]; ids are not checked. Raises ValueError if not 2-D."""
    require(table.dim() == 2, f"the table must be [V, C], got {tuple(table.shape)}")
    table, flat = rows(table), ids.reshape(-1).contiguous()
    out = empty(len(flat), table.shape[1], like=table)
    _copy(table, out, flat)
    return out.view(*ids.shape, table.shape[1])


def concatenate(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat of [N, C] tensors along their columns. Raises ValueError on other shapes."""
    require(
        all(p.dim() == 2 and p.shape[0] == parts[0].shape[0] for p in parts) and dim in (1, -1),
        f"need [N, C] tensors of one N, along their columns; got dim {dim} of "
        f"{[tuple(p.shape) for p in parts]}",
    )
    out = empty(parts[0].shape[0], sum(p.shape[1] for p in parts), like=parts[0])
    start = 0
    for part in parts:
        _copy(rows(part), out[:, start : start + part.shape[1]])
        start += part.shape[1]
    return out
