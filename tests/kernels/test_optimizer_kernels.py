"""Fused AdamW, gradient norm and clipping over lists of tensors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import gradient_norm as norms
from kexaone.kernels import optimizer as op
from kexaone.kernels import tensor_list
from kexaone.kernels.tables import use
from kexaone.kernels.tensor_list import Config

from .contract import DTYPES, assert_close, check, dtypes, laid_out, normal, same_bits, seeds

NUMBERS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# around a chunk of CHUNK elements: none, one, a tail, whole chunks
CHUNK = Config(block=128, steps=2, num_warps=4)
sizes = st.lists(st.sampled_from([0, 1, 7, 127, 255, 256, 257, 1000]), min_size=1, max_size=4)


def state(sizes, dtype, seed, state_dtype=torch.float32):
    """Parameters, gradients, means and squares of AdamW in its course."""
    four = ([normal(size, seed=seed + 10 * k + i) for i, size in enumerate(sizes)]
            for k in range(4))  # fmt: skip
    parameters, gradients, means, roots = four
    squares = [0.01 * r.square().to(state_dtype) for r in roots]
    return [[p.to(dtype) for p in parameters], [g.to(dtype) for g in gradients],
            [(0.1 * m).to(state_dtype) for m in means], squares]  # fmt: skip


def stepped(step_function, lists, **numbers):
    """The step as a function of copies: parameters, means and squares after it."""
    copies = [[t.clone() for t in tensors] for tensors in lists]
    step_function(*copies, **(NUMBERS | {"step": 3} | numbers))
    return [copies[0], copies[2], copies[3]]


def flat_step(step_function, count):
    """`stepped` on tensors one after another, for `check`."""

    def run(*tensors):
        lists = [list(tensors[k * count : (k + 1) * count]) for k in range(4)]
        return stepped(step_function, lists)  # fmt: skip

    return run


@given(sizes=sizes, dtype=dtypes, seed=seeds, small=st.booleans(), same=st.booleans())
def test_adamw_meets_the_contract(sizes, dtype, seed, small, same):
    lists = state(sizes, dtype, seed, dtype if same else torch.float32)
    with use("adamw_step", CHUNK if small else None):
        check(flat_step(op.adamw_step, len(sizes)), flat_step(op.adamw_reference, len(sizes)),
              [t for tensors in lists for t in tensors], gradients=False)  # fmt: skip


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_that_of_torch(weight_decay):
    """Five steps against torch.optim.AdamW; its error against float64 is the measure."""
    tensors = {}
    for kind, dtype in (("ours", torch.float32), ("torch", torch.float32), ("exact", torch.double)):
        p = [normal(size, seed=size).to(dtype) for size in (5, 4097, 30_000)]
        m, v = ([torch.zeros_like(t) for t in p] for _ in range(2))
        optimizer = torch.optim.AdamW([torch.nn.Parameter(t) for t in p], lr=1e-2,
                                      betas=(0.9, 0.95), weight_decay=weight_decay)  # fmt: skip
        for step in range(1, 6):
            g = [normal(len(t), seed=step + len(t)).to(dtype) for t in p]
            if kind == "ours":
                op.adamw_step(p, g, m, v, step=step, lr=1e-2, betas=(0.9, 0.95),
                              weight_decay=weight_decay)  # fmt: skip
                continue
            for leaf, grad in zip(optimizer.param_groups[0]["params"], g, strict=True):
                leaf.grad = grad
            optimizer.step()
        tensors[kind] = p
    for ours, naive, exact in zip(*tensors.values(), strict=True):
        assert_close(ours, (naive - exact).abs(), exact, None)


def test_first_step_is_the_sign_of_the_gradient():
    """Without decay and eps the first step moves every element by lr."""
    p, g = [torch.zeros(1000)], [normal(1000)]
    op.adamw_step(p, g, [torch.zeros(1000)], [torch.zeros(1000)], step=1, lr=0.5, eps=0.0)
    torch.testing.assert_close(p[0], -0.5 * g[0].sign())


@given(sizes=sizes, dtype=dtypes, seed=seeds)
def test_cutting_and_grouping_change_no_bit(sizes, dtype, seed):
    """Chunks, unaligned addresses, company of other dtypes: an element's step is its own."""
    lists = state(sizes, dtype, seed)
    together = stepped(op.adamw_step, lists)
    with use("adamw_step", CHUNK):
        assert same_bits(stepped(op.adamw_step, lists), together)
    alone = [stepped(op.adamw_step, [[tensors[i]] for tensors in lists])
             for i in range(len(sizes))]  # fmt: skip
    assert same_bits([[a[k][0] for a in alone] for k in range(3)], together)
    mixed = [a + b for a, b in zip(lists, state(sizes, torch.float16, seed + 99), strict=True)]
    assert same_bits([t[: len(sizes)] for t in stepped(op.adamw_step, mixed)], together)
    shifted = [[torch.cat([t[:1], t])[1:] for t in tensors] for tensors in lists]
    op.adamw_step(*shifted, **NUMBERS, step=3)
    assert same_bits([shifted[0], shifted[2], shifted[3]], together)


def test_any_strides():
    """A gradient may lie anyhow; a parameter that is not contiguous runs the reference."""
    lists = state([300 * 7], torch.float32, 0)
    lists = [[t.view(300, 7) for t in tensors] for tensors in lists]
    expected = stepped(op.adamw_step, lists)
    turned = [t.t().contiguous().t() for t in lists[1]]
    copies = [[t.clone() for t in tensors] for tensors in lists]
    op.adamw_step(copies[0], turned, *copies[2:], **NUMBERS, step=3)
    assert same_bits([copies[0], *copies[2:]], expected)
    turned = [[t.t().contiguous().t() for t in tensors] for tensors in lists]
    op.adamw_step(*turned, **NUMBERS, step=3)
    torch.testing.assert_close(turned[0], expected[0])
    assert not turned[0][0].is_contiguous()


@given(sizes=sizes, dtype=dtypes, seed=seeds, small=st.booleans())
def test_norm_meets_the_contract(sizes, dtype, seed, small):
    tensors = [normal(size, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes)]
    with use("gradient_norm", CHUNK if small else None):
        check(lambda *x: norms.gradient_norm(x), lambda *x: norms.gradient_norm_reference(x),
              tensors, gradients=False)  # fmt: skip


@given(sizes=sizes, dtype=dtypes, seed=seeds, small=st.booleans(),
       limit=st.sampled_from([1e-3, 0.7, 1e6]))  # fmt: skip
def test_clipping_meets_the_contract(sizes, dtype, seed, small, limit):
    def clip(function):
        def run(*tensors):
            copies = [t.clone() for t in tensors]
            return function(copies, limit=limit), copies

        return run  # fmt: skip

    tensors = [normal(size, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes)]
    config = CHUNK if small else None
    with use("gradient_norm", config), use("clip_gradients", config):
        check(clip(norms.clip_gradients), clip(norms.clip_gradients_reference), tensors,
              gradients=False)  # fmt: skip


def test_clipping_is_that_of_torch():
    leaves = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5000)]
    for leaf in leaves:
        leaf.grad = normal(len(leaf), seed=len(leaf))
    ours = [leaf.grad.clone() for leaf in leaves]
    before = torch.nn.utils.clip_grad_norm_(leaves, 1.0)
    torch.testing.assert_close(norms.clip_gradients(ours, limit=1.0), before)
    torch.testing.assert_close(ours, [leaf.grad for leaf in leaves])


def test_under_the_limit_nothing_is_written():
    tensors = [normal(1000, dtype=torch.bfloat16)]
    before = tensors[0].clone()
    norm = norms.clip_gradients(tensors, limit=1e6)
    assert same_bits(tensors, [before]) and same_bits(norm, norms.gradient_norm(tensors))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_shows(bad):
    tensors = [normal(1000), torch.ones(3)]
    tensors[0][7] = bad
    norm = norms.clip_gradients(tensors, limit=1.0)
    assert not torch.isfinite(norm)
    assert tensors[0][7].isnan() and (tensors[1].isnan() | (tensors[1] == 0)).all()


def test_norm_of_mixed_and_strided_tensors():
    tensors = [normal(40, 30, seed=i, dtype=dtype) for i, dtype in enumerate(DTYPES)]
    expected = norms.gradient_norm(tensors)
    layouts = ("row strided", "column strided")
    for combined in itertools.product(layouts, repeat=3):
        views = [laid_out(t, layout) for t, layout in zip(tensors, combined, strict=True)]
        assert same_bits(norms.gradient_norm(views), expected)
    views = [laid_out(t, "row strided") for t in tensors]
    norms.clip_gradients(views, limit=1.0)
    norms.clip_gradients(tensors, limit=1.0)
    assert same_bits(views, tensors)


def test_nothing_at_all():
    assert norms.gradient_norm([]) == 0 and norms.clip_gradients([], limit=1.0) == 0
    assert norms.gradient_norm([torch.ones(0)]) == 0
    op.adamw_step([], [], [], [], step=1, lr=0.1)


def test_twice_the_same_bits():
    lists = state([100_000, 3], torch.bfloat16, 0)
    assert same_bits(stepped(op.adamw_step, lists), stepped(op.adamw_step, lists))
    assert same_bits(norms.gradient_norm(lists[1]), norms.gradient_norm(lists[1]))


def test_elements_beyond_32_bits(monkeypatch):
    """A tensor of 2^31 + 300 elements, of which only the last two chunks are ever touched."""
    size = 2**31 + 300
    lists = [[torch.empty(size, dtype=torch.bfloat16)] for _ in range(4)]
    small = state([300 + 256], torch.bfloat16, 0, torch.bfloat16)
    for (large,), (t,) in zip(lists, small, strict=True):
        large[2**31 - 256 :] = t
    whole = tensor_list.table_of

    def tail(part, chunk):
        table = whole(part, chunk)
        return tensor_list.Table(table.rows_LA, table.chunks_C2[-2:].clone(),
                                 table.aligned)  # fmt: skip

    config = Config(block=2**15, steps=1, num_warps=4)
    with use("adamw_step", config):
        expected = stepped(op.adamw_step, small)
        # the chunk before the last starts in memory that nothing wrote: it may hold anything
        for (large,) in lists:
            large[2**31 - 2**15 : 2**31 - 256] = 0
        monkeypatch.setattr(op, "table_of", tail)
        op.adamw_step(*lists, **NUMBERS, step=3)
    found = [[x[0][2**31 - 256 :]] for x in (lists[0], lists[2], lists[3])]
    assert same_bits(found, expected)


def test_the_table_is_built_once():
    tensors = [normal(1000, seed=i) for i in range(3)]
    first = tensor_list.table_of([tensors], 256)
    assert tensor_list.table_of([tensors], 256) is first
    assert tensor_list.table_of([tensors[::-1]], 256) is not first
    assert first.chunks_C2[:, 0].bincount().tolist() == [4, 4, 4]
    assert not tensor_list.table_of([[tensors[0][1:]]], 256).aligned


def test_opcheck():
    lists, ops = state([40, 7], torch.float32, 0), torch.ops.kexaone
    torch.library.opcheck(ops.adamw_step, (*lists, 3, 1e-3, 0.9, 0.95, 1e-8, 0.1))
    torch.library.opcheck(ops.gradient_norm, (lists[1],))
    torch.library.opcheck(ops.clip_gradients, (lists[1], 0.5))


def test_writing_is_seen_by_autograd():
    """A tensor saved for backward and then stepped is an error, as with any in-place op."""
    weight = torch.ones(8, requires_grad=True)
    loss = (weight * weight).sum()
    one = [torch.ones(8)]
    op.adamw_step([weight], one, [torch.ones(8)], [torch.ones(8)], step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_in_one_graph():
    def train_step(p, g, m, v):
        norm = norms.clip_gradients([g], limit=0.5)
        op.adamw_step([p], [g], [m], [v], step=2, lr=0.1)
        return norm + norms.gradient_norm([p])

    torch._dynamo.reset()
    compiled = torch.compile(train_step, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (40, 90, 170):
        ours, expected = ([t for (t,) in state([size], torch.float32, 0)] for _ in range(2))
        assert same_bits(compiled(*ours), train_step(*expected))
        assert same_bits(ours, expected)


def test_reference_is_used_when_asked_and_for_float64():
    lists = state([300, 7], torch.float32, 0)
    with kexaone.impl("reference"):
        assert same_bits(stepped(op.adamw_step, lists), stepped(op.adamw_reference, lists))
        assert same_bits(norms.gradient_norm(lists[1]), norms.gradient_norm_reference(lists[1]))
    wide = [[t.double() for t in tensors] for tensors in lists]
    assert same_bits(stepped(op.adamw_step, wide), stepped(op.adamw_reference, wide))
    assert norms.gradient_norm(wide[1]).dtype == torch.float64


def test_wrong_arguments_are_refused():
    x, y = [torch.ones(3)], [torch.ones(4)]
    with pytest.raises(ValueError, match=r"per parameter, got \[1, 0, 1, 1\]"):
        op.adamw_step(x, [], x, x, step=1, lr=0.1)
    with pytest.raises(ValueError, match="tensors of parameter 0 differ in shape"):
        op.adamw_step(x, y, x, x, step=1, lr=0.1)
    with pytest.raises(ValueError, match="step counts from 1, got 0"):
        op.adamw_step(x, x, x, x, step=0, lr=0.1)
    with pytest.raises(ValueError, match="limit must be above zero"):
        norms.clip_gradients(x, limit=0.0)
