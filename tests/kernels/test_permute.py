"""Grouping by expert against a stable sort, and row movement against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import grouping, permute
from kexaone.kernels.grouping import Permutation, group_by_expert
from kexaone.kernels.tables import use

from .contract import (
    check,
    check_compiled,
    differentiate,
    dtypes,
    generator,
    laid_out,
    layouts,
    normal,
    same_bits,
    seeds,
)

SPREADS = ("even", "skewed", "one", "last")
spreads = st.sampled_from(SPREADS)
token_counts = st.sampled_from([0, 1, 2, 7, 33, 150])
sort_configs = st.sampled_from([
    None,
    grouping.Config(block=64, piece=16, chunk=2, num_warps=4),
    grouping.Config(block=32, piece=0, chunk=4, num_warps=4),
    grouping.Config(block=16, piece=16, chunk=16, num_warps=4),
])  # fmt: skip


def chosen(tokens, top_k, experts, spread, seed=0, dtype=torch.int64):
    """Expert ids [tokens, top_k]: all experts, few of them, only expert 0, only the last."""
    if spread in ("one", "last"):
        return torch.full((tokens, top_k), experts - 1 if spread == "last" else 0, dtype=dtype)
    uniform = torch.rand(tokens, top_k, generator=generator(seed))
    return (uniform ** (6 if spread == "skewed" else 1) * experts).to(dtype)


def some_weights(tokens, top_k, seed):
    return torch.rand(tokens, top_k, generator=generator(seed)) + 0.1


@given(tokens=token_counts, top_k=st.sampled_from([1, 2, 8]), spread=spreads, seed=seeds,
       experts=st.sampled_from([1, 5, 16, 33, 128, 256]), config=sort_configs,
       dtype=st.sampled_from([torch.int32, torch.int64]))  # fmt: skip
def test_groups_are_those_of_a_stable_sort(tokens, top_k, spread, seed, experts, config, dtype):
    ids = chosen(tokens, top_k, experts, spread, seed, dtype)
    with use("group_by_expert", config):
        ours = group_by_expert(ids, experts=experts)
    assert all(t.dtype == torch.int32 for t in (ours.offsets, ours.order, ours.position))
    flat = ids.flatten()
    assert ours.offsets.tolist() == [int((flat < e).sum()) for e in range(experts + 1)]
    by_hand = sorted(range(len(flat)), key=flat.tolist().__getitem__)
    assert ours.order.tolist() == by_hand
    assert ours.position[ours.order.long()].tolist() == list(range(len(flat)))
    assert same_bits(ours, grouping.group_by_expert_reference(ids, experts=experts))


@pytest.mark.parametrize("layout", ["row strided", "column strided", "expanded"])
def test_ids_with_strides(layout):
    ids = chosen(40, 8, 32, "even")
    views = {
        "row strided": ids.repeat(1, 2)[:, :8],
        "column strided": ids.repeat_interleave(2, 1)[:, ::2],
        "expanded": ids[:1].expand(40, 8),
    }
    view = views[layout]
    expected = grouping.group_by_expert_reference(view, experts=32)
    assert same_bits(group_by_expert(view, experts=32), expected)


def test_many_blocks():
    """More blocks than the scan takes at once."""
    ids = chosen(4096, 8, 128, "skewed")
    expected = grouping.group_by_expert_reference(ids, experts=128)
    for config in (grouping.Config(64, 64, 64, 4), grouping.Config(64, 0, 64, 4)):
        with use("group_by_expert", config):
            assert same_bits(group_by_expert(ids, experts=128), expected)


@given(tokens=token_counts, top_k=st.sampled_from([1, 3, 8]), spread=spreads, seed=seeds,
       columns=st.sampled_from([1, 7, 128, 300]), dtype=dtypes, layout=layouts,
       block=st.sampled_from([None, 64]))  # fmt: skip
def test_rows_meet_the_contract(tokens, top_k, columns, dtype, layout, spread, seed, block):
    groups = group_by_expert(chosen(tokens, top_k, 5, spread, seed), experts=5)
    x = laid_out(normal(tokens, columns, seed=seed, dtype=dtype), layout)
    moved = laid_out(normal(tokens * top_k, columns, seed=seed + 1, dtype=dtype), layout)
    with use("permute", permute.Config(block, 4) if block else None):
        check(
            lambda x: permute.permute(x, groups),
            lambda x: permute.permute_reference(x, groups),
            [x],
        )
        weights = some_weights(tokens, top_k, seed)
        check(
            lambda y: permute.unpermute(y, groups, weights),
            lambda y: permute.unpermute_reference(y, groups, weights),
            [moved],
        )
        # a token has too few weights for the error of their gradients to be judged token by token
        check(
            lambda y, w: permute.unpermute(y, groups, w),
            lambda y, w: permute.unpermute_reference(y, groups, w),
            [moved, weights],
            by=None,
        )


def test_permute_moves_bits_and_unpermute_undoes_it():
    x = normal(33, 70, dtype=torch.bfloat16)
    groups = group_by_expert(chosen(33, 4, 9, "even"), experts=9)
    moved = permute.permute(x, groups)
    assert same_bits(moved, x[groups.order.long() // 4])
    assert same_bits(permute.unpermute(moved, groups, torch.full((33, 4), 0.25)), x)


def test_weights_with_strides():
    groups = group_by_expert(chosen(9, 4, 5, "even"), experts=5)
    sorted_rows, weights = normal(36, 20), some_weights(9, 4, 0)
    for view in (laid_out(weights, "row strided"), laid_out(weights, "column strided"),
                 weights.t().contiguous().t()):  # fmt: skip
        ours, theirs = (
            differentiate(lambda y, w: permute.unpermute(y, groups, w), [sorted_rows, w], 0)
            for w in (view, weights)
        )
        assert same_bits(ours, theirs)


def test_row_offsets_beyond_32_bits():
    """Two rows 2^31 + 16 elements apart: the memory between them is never touched."""
    stride = 2**31 + 16
    x = torch.empty(stride + 128, dtype=torch.bfloat16).as_strided((2, 128), (stride, 1))
    x.copy_(normal(2, 128))
    groups = group_by_expert(torch.tensor([[1], [0]]), experts=2)
    assert same_bits(permute.permute(x, groups), x[[1, 0]])
    weights = torch.tensor([[0.5], [2.0]])
    ours, theirs = (
        differentiate(lambda y, w: permute.unpermute(y, groups, w), [y, weights], 0)
        for y in (x, x.contiguous())
    )
    assert same_bits(ours, theirs)


def both(x, weights, ids):
    groups = group_by_expert(ids, experts=16)
    moved = permute.permute(x, groups)
    return permute.unpermute(moved * moved, groups, weights), moved


def moving(tokens):
    return (
        normal(tokens, 48, seed=tokens),
        some_weights(tokens, 4, tokens),
        chosen(tokens, 4, 16, "even"),
    )


def test_twice_the_same_bits():
    assert same_bits(*(differentiate(both, moving(300), 0) for _ in range(2)))


def test_compiled_with_dynamic_shapes():
    check_compiled(both, moving, sizes=(5, 9, 400))


def test_opcheck():
    x, weights, ids = moving(7)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    groups = group_by_expert(ids, experts=16)
    moved = permute.permute(x, groups).detach().requires_grad_()
    ops = torch.ops.kexaone
    torch.library.opcheck(ops.group_by_expert, (ids, 16))
    torch.library.opcheck(ops.permute, (x, groups.position))
    torch.library.opcheck(ops.unpermute, (moved, groups.position, weights))
    with torch.no_grad():
        torch.library.opcheck(ops.unpermute_sum, (moved, groups.position, 7))
        torch.library.opcheck(ops.unpermute_backward, (x, moved, groups.position, weights))


def test_reference_is_used_when_asked_and_for_float64():
    x, weights, ids = moving(7)
    with kexaone.impl("reference"):
        expected = both(x, weights, ids)
    assert same_bits(both(x, weights, ids)[1], expected[1])
    out, moved = both(x.double(), weights.double(), ids)
    assert out.dtype == moved.dtype == torch.float64


def test_wrong_shapes_are_refused():
    groups = group_by_expert(chosen(3, 2, 4, "even"), experts=4)
    with pytest.raises(ValueError, match="experts must be positive, got 0"):
        group_by_expert(torch.zeros(0, 2, dtype=torch.int64), experts=0)
    with pytest.raises(ValueError, match="6 slots are no whole number for each of 4 tokens"):
        permute.permute(torch.ones(4, 8), groups)
    with pytest.raises(ValueError, match="5 rows for 6 slots"):
        permute.unpermute(torch.ones(5, 8), groups, torch.ones(3, 2))
    with pytest.raises(ValueError, match="9 weights for 6 slots"):
        permute.unpermute(torch.ones(6, 8), groups, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"weights must be float32, got torch\.bfloat16"):
        permute.unpermute(torch.ones(6, 8), groups, torch.ones(3, 2, dtype=torch.bfloat16))


def test_a_permutation_is_three_tensors():
    groups = group_by_expert(torch.tensor([[2, 0], [0, 2]]), experts=3)
    parts = [t.tolist() for t in (groups.offsets, groups.order, groups.position)]
    assert isinstance(groups, Permutation)
    assert parts == [[0, 2, 2, 4], [1, 2, 0, 3], [2, 0, 1, 3]]
