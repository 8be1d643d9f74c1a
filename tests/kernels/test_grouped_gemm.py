"""The grouped matrix product against float64 per expert, and against PyTorch's grouped_mm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import expert_tiles, expert_weights
from kexaone.kernels import grouped_gemm as op
from kexaone.kernels.grouping import group_by_expert_reference
from kexaone.kernels.tables import use

from .contract import (
    assert_close,
    check_compiled,
    differentiate,
    dtypes,
    laid_out,
    normal,
    same_bits,
    seeds,
)

# one, odd, and over a tile
widths = st.sampled_from([1, 33, 160])
# rows of each expert: none at all, empty ones, one row, exactly and just over a tile
counts = st.sampled_from([
    (0, 0), (1,), (0, 5, 0, 1), (33, 0, 2), (7, 8, 9, 16, 17), (0, 0, 70), (129, 0, 3), (1,) * 11,
])  # fmt: skip
weight_layouts = st.sampled_from(["contiguous", "row strided", "transposed"])


def offsets_of(rows):
    return torch.tensor([0, *rows]).cumsum(0).int()


def weights(experts, n, k, dtype, seed, layout="contiguous"):
    w = normal(experts, n, k, seed=seed + 1, dtype=dtype) / max(1, k) ** 0.5
    if layout == "transposed":
        return w.transpose(1, 2).contiguous().transpose(1, 2)
    return laid_out(w, layout)


def check_experts(x, weight, offsets, *, order=None, top_k=1, seed=0):
    """The contract for the product per expert and per row, and for both gradients."""

    def run(f, x, weight, grad):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = f(x, weight, offsets, order=order, top_k=top_k)
        return y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(y.dtype))

    count = len(x) if order is None else len(order)
    grad = normal(count, weight.shape[1], seed=seed).bfloat16()
    ours = run(op.grouped_gemm, x, weight, grad)
    naive = run(op.grouped_gemm_reference, x, weight, grad)
    wide = x.double(), weight.double(), grad.double()
    exact = run(op.grouped_gemm_reference, *wide)
    sizes = run(op.grouped_gemm_reference, *(t.abs() for t in wide))
    for mine, other, oracle, size in zip(ours, naive, exact, sizes, strict=True):
        assert mine.dtype == other.dtype
        # a short sum may be exact by luck: grant one rounding of the value, and one of the terms
        error = torch.maximum((other.double() - oracle).abs(), size * torch.finfo(torch.float).eps)
        error = torch.maximum(error, oracle.abs() * torch.finfo(x.dtype).eps / 2)
        assert_close(mine, error, oracle, 0)
    for start, end in offsets.unfold(0, 2, 1).tolist():
        part = slice(start, end)
        error = (naive[0].double() - exact[0]).abs()[part] + sizes[0][part] * 2**-23
        assert_close(ours[0][part], error, exact[0][part], None)


@given(rows=counts, n=widths, k=widths, dtype=dtypes, seed=seeds, layout=weight_layouts)
def test_product_meets_the_contract(rows, n, k, dtype, seed, layout):
    x = laid_out(normal(sum(rows), k, seed=seed, dtype=dtype), layout)
    check_experts(x, weights(len(rows), n, k, dtype, seed, layout), offsets_of(rows), seed=seed)


def routed(tokens, top_k, experts, seed):
    scores = normal(tokens, experts, seed=seed)
    return group_by_expert_reference(scores.argsort(1)[:, :top_k], experts=experts)


@given(tokens=st.sampled_from([0, 1, 2, 50]), top_k=st.sampled_from([1, 3, 8]), n=widths, k=widths,
       dtype=st.sampled_from([torch.bfloat16, torch.float32]), seed=seeds)  # fmt: skip
def test_rows_gathered_in_the_loads(tokens, top_k, n, k, dtype, seed):
    routing = routed(tokens, top_k, 9, seed)
    x, weight = normal(tokens, k, seed=seed, dtype=dtype), weights(9, n, k, dtype, seed)
    check_experts(x, weight, routing.offsets, order=routing.order, top_k=top_k, seed=seed)
    gathered = x.index_select(0, routing.order // top_k)
    apart = op.grouped_gemm(gathered, weight, routing.offsets)
    assert same_bits(
        op.grouped_gemm(x, weight, routing.offsets, order=routing.order, top_k=top_k), apart
    )


@given(rows=counts, n=widths, k=widths, seed=seeds, block=st.sampled_from([16, 32]),
       group=st.sampled_from([1, 2, 8]))  # fmt: skip
def test_other_tiles(rows, n, k, seed, block, group):
    """The GPU's kind of tiles: never halved, in groups that share weights."""
    x, weight = normal(sum(rows), k, seed=seed), weights(len(rows), n, k, torch.float32, seed)
    config = expert_tiles.Config(block, block, 32, 16, group, 4, 2)
    with use("grouped_gemm", config), use("grouped_gemm_weight", config):
        check_experts(x, weight, offsets_of(rows), seed=seed)


def test_agrees_with_grouped_mm():
    """PyTorch's own grouped product, to the rounding of its bfloat16 result."""
    rows = (16, 0, 32, 48)
    x = normal(sum(rows), 64, dtype=torch.bfloat16)
    weight, offsets = weights(4, 32, 64, torch.bfloat16, 0), offsets_of(rows)
    theirs = torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])
    ours = op.grouped_gemm(x, weight, offsets)
    ulp = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(ours, theirs, rtol=ulp, atol=ulp * float(theirs.abs().max()))


@pytest.mark.parametrize("count", [1, 3, 17, 64, 200])
def test_tiles_cover_every_row_once(count):
    """The map from programs to tiles, for every split of rows among three experts."""
    for block in (1, 4, 16):
        tiles = -(-count // block) + 3
        for first in range(0, count + 1, 5):
            for second in range(first, count + 1, 7):
                offsets = [0, first, second, count]
                seen = []
                for tile in range(tiles):
                    e = sum(offsets[i] // block + i <= tile for i in range(3)) - 1
                    row = offsets[e] + (tile - offsets[e] // block - e) * block
                    seen += range(row, min(row + block, offsets[e + 1]))
                assert sorted(seen) == list(range(count))


def test_twice_the_same_bits():
    routing = routed(100, 4, 8, 0)
    data = [normal(100, 96, dtype=torch.bfloat16), weights(8, 64, 96, torch.bfloat16, 1)]

    def run(x, w):
        return op.grouped_gemm(x, w, routing.offsets, order=routing.order, top_k=4)

    assert same_bits(differentiate(run, data, 0), differentiate(run, data, 0))


def test_offsets_beyond_32_bits():
    """Experts, rows of x and rows of W 2^31 + 16 elements apart; nothing between is touched."""
    far = 2**31 + 16
    memory = torch.empty(far + 32 * 32, dtype=torch.bfloat16)
    weight = memory.as_strided((2, 32, 32), (far, 32, 1))
    values = weights(2, 32, 32, torch.bfloat16, 3)
    weight.copy_(values)
    x, offsets = normal(5, 32, dtype=torch.bfloat16), offsets_of((2, 3))
    assert same_bits(op.grouped_gemm(x, weight, offsets), op.grouped_gemm(x, values, offsets))
    rows = memory.as_strided((2, 32), (far, 1))
    rows.copy_(x[:2])
    few = offsets_of((1, 1))
    expected = op.grouped_gemm(x[:2], values, few)
    assert same_bits(op.grouped_gemm(rows, values, few), expected)
    tall = memory.as_strided((1, 2, 32), (0, far, 1))
    expected = op.grouped_gemm(x, tall.contiguous(), offsets_of((5,)))
    assert same_bits(op.grouped_gemm(x, tall, offsets_of((5,))), expected)


def test_only_wanted_gradients_are_computed():
    x, weight = normal(6, 32), weights(2, 16, 32, torch.float32, 0)
    offsets = offsets_of((2, 4))
    both = differentiate(lambda x, w: op.grouped_gemm(x, w, offsets), [x, weight], 0)[1]
    assert same_bits(differentiate(lambda x: op.grouped_gemm(x, weight, offsets), [x], 0)[1][0],
                     both[0])  # fmt: skip
    assert same_bits(differentiate(lambda w: op.grouped_gemm(x, w, offsets), [weight], 0)[1][0],
                     both[1])  # fmt: skip


@pytest.mark.parametrize("gather", [False, True])
def test_opcheck(gather):
    routing = routed(5, 2, 3, 0)
    x = normal(5 if gather else 10, 32).requires_grad_()
    weight = weights(3, 16, 32, torch.float32, 0).requires_grad_()
    order = routing.order if gather else None
    torch.library.opcheck(torch.ops.kexaone.grouped_gemm, (x, weight, routing.offsets, order, 2))
    with torch.no_grad():
        for wanted in ([True, True], [False, True]):
            torch.library.opcheck(
                torch.ops.kexaone.grouped_gemm_backward,
                (normal(10, 16), x, weight, routing.offsets, order, 2, wanted),
            )


def test_compiled_with_dynamic_shapes():
    weight = weights(4, 32, 64, torch.float32, 0)

    def block(x, w, offsets, order):
        return op.grouped_gemm(x, w, offsets, order=order, top_k=2).relu()

    def inputs(tokens):
        routing = routed(tokens, 2, 4, tokens)
        return normal(tokens, 64, seed=tokens), weight, routing.offsets, routing.order

    check_compiled(block, inputs, sizes=(7, 9, 17))


def test_reference_is_used_when_asked_and_for_float64():
    x, weight, offsets = normal(4, 64), weights(2, 16, 64, torch.float32, 0), offsets_of((3, 1))
    with kexaone.impl("reference"):
        assert same_bits(
            op.grouped_gemm(x, weight, offsets), op.grouped_gemm_reference(x, weight, offsets)
        )
    assert op.grouped_gemm(x.double(), weight.double(), offsets).dtype == torch.float64


def test_wrong_shapes_are_refused():
    x, weight, offsets = torch.ones(4, 64), torch.ones(2, 16, 64), offsets_of((3, 1))
    with pytest.raises(ValueError, match=r"weight must be \[E, N, 64\]"):
        op.grouped_gemm(x, torch.ones(2, 64, 16), offsets)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 as x is"):
        op.grouped_gemm(x, weight.half(), offsets)
    with pytest.raises(ValueError, match=r"offsets must be int32 \[3\], got torch.int64 \[3\]"):
        op.grouped_gemm(x, weight, offsets.long())
    with pytest.raises(ValueError, match=r"order must be int32 \[M\]"):
        op.grouped_gemm(x, weight, offsets, order=torch.arange(4))


def test_configs_fit_every_target():
    from kexaone.kernels.arch import ARCHS

    for arch in ARCHS.values():
        for rows in (1, 32, 1024):
            for size in (2, 4):
                problem = expert_tiles.Problem(rows, 4096, 6144, size)
                assert expert_tiles.configs(problem, arch)
                assert expert_weights.weight_configs(problem, arch)
