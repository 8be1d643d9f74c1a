"""Linear layer and cross-entropy against the float64 reference and torch's own two ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kexaone.kernels import cross_entropy as op
from kexaone.kernels.tables import use

from .contract import (
    check,
    check_compiled,
    differentiate,
    generator,
    laid_out,
    layouts,
    normal,
    same_bits,
    seeds,
)

# Gradients are judged over whole tensors (`by=None`): they are differences of probabilities
# rounded at 1, so the row of a confident token or a rare word is small but no more exact than the
# others. All rows have one scale, so a wrong row shows in the whole.
IGNORED = -100
# Gradients of float16 logits are subnormal for most of a vocabulary, in the naive computation as
# well: their last place says nothing. Its values are tested below.
dtypes = st.sampled_from([torch.bfloat16, torch.float32])
counts = st.sampled_from([1, 2, 17, 50])
vocabularies = st.sampled_from([2, 33, 128, 200])


def inputs(tokens, hidden, vocabulary, dtype, seed, ignored=0.3, layout="contiguous"):
    x = laid_out(normal(tokens, hidden, seed=seed, dtype=dtype), layout)
    weight = normal(vocabulary, hidden, seed=seed + 1, dtype=dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator(seed))
    targets[torch.rand(tokens, generator=generator(seed + 2)) < ignored] = IGNORED
    return [x, weight, targets]


def mean_reference(z_loss=0.0):
    def mean(x, weight, targets):
        tokens = op.linear_cross_entropy_reference(
            x, weight, targets, ignore_index=IGNORED, z_loss=z_loss
        )
        return tokens.sum() / max(1, int((targets != IGNORED).sum()))

    return mean


@given(tokens=counts, vocabulary=vocabularies, dtype=dtypes, layout=layouts, seed=seeds,
       z_loss=st.sampled_from([0.0, 1e-2]), chunk=st.sampled_from([1, 1 << 20]))  # fmt: skip
def test_mean_meets_the_contract(tokens, vocabulary, dtype, layout, seed, z_loss, chunk):
    """Also in chunks of 16 tokens, with columns in several steps, and with nothing to predict."""
    data = inputs(tokens, 24, vocabulary, dtype, seed, layout=layout)
    with pytest.MonkeyPatch.context() as patch, use("linear_cross_entropy", op.Config(64, 4)):
        patch.setattr(op, "CHUNK_BYTES", chunk)
        check(
            lambda *x: op.linear_cross_entropy(*x, z_loss=z_loss).loss,
            mean_reference(z_loss),
            data,
            by=None,
        )


@given(tokens=counts, vocabulary=vocabularies, dtype=dtypes, seed=seeds)
def test_tokens_meet_the_contract(tokens, vocabulary, dtype, seed):
    """Output gradients differ from token to token."""
    data = inputs(tokens, 24, vocabulary, dtype, seed)
    check(op.linear_cross_entropy_tokens,
          lambda *x: op.linear_cross_entropy_reference(*x, ignore_index=IGNORED, z_loss=0.0),
          data, by=None)  # fmt: skip


@given(tokens=counts, vocabulary=vocabularies, seed=seeds)
def test_float16_losses_meet_the_contract(tokens, vocabulary, seed):
    data = inputs(tokens, 24, vocabulary, torch.float16, seed)
    check(lambda *x: op.linear_cross_entropy(*x).loss, mean_reference(), data, gradients=False)


def test_equals_torch():
    x, weight, targets = inputs(40, 24, 100, torch.float32, 0)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    want = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED)
    ours = op.linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(ours.loss, want)
    torch.testing.assert_close(torch.autograd.grad(ours.loss, leaves),
                               torch.autograd.grad(want, leaves))  # fmt: skip
    tokens = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(ours.tokens, tokens.detach())
    assert not ours.tokens.requires_grad


def test_weighted_tokens_are_two_heads_in_one_call():
    x, weight, targets = inputs(30, 24, 50, torch.float32, 3, ignored=0.0)
    share = torch.where(torch.arange(30) < 20, 1.0, 0.25)
    ours = op.linear_cross_entropy(x.requires_grad_(), weight, targets, token_weights=share)
    tokens = F.cross_entropy(x @ weight.T, targets, reduction="none")
    torch.testing.assert_close(ours.loss, (tokens * share).sum() / share.sum())


def test_nothing_to_predict_is_zero_not_nan():
    x, weight, targets = inputs(5, 24, 50, torch.bfloat16, 0, ignored=2.0)
    out = op.linear_cross_entropy(x.requires_grad_(), weight, targets)
    (grad,) = torch.autograd.grad(out.loss, x)
    assert out.loss == 0 and (grad == 0).all() and (out.tokens == 0).all()
    empty = op.linear_cross_entropy(x[:0], weight, targets[:0])
    assert empty.loss == 0 and empty.tokens.shape == (0,)


def test_an_ignored_token_passes_no_infinity_on():
    x, weight, targets = inputs(4, 24, 50, torch.float32, 0, ignored=0.0)
    x[1], targets[1] = float("inf"), IGNORED
    (grad,) = torch.autograd.grad(
        op.linear_cross_entropy(x.requires_grad_(), weight, targets).loss, x
    )
    assert torch.isfinite(grad).all()


def test_a_target_outside_the_vocabulary_is_nan():
    x, weight, targets = inputs(4, 24, 50, torch.float32, 0, ignored=0.0)
    targets[2] = 50
    tokens = op.linear_cross_entropy(x, weight, targets).tokens
    assert tokens.isnan().tolist() == [False, False, True, False]


def test_memory_stays_at_one_chunk(monkeypatch):
    """No more logits than CHUNK_BYTES at a time: the largest product has 16 rows here."""
    monkeypatch.setattr(op, "CHUNK_BYTES", 1)
    seen = []
    losses = op._losses
    monkeypatch.setattr(op, "_losses", lambda x, *a, **k: (seen.append(len(x)), losses(x, *a, **k)))
    x, weight, targets = inputs(50, 24, 100, torch.float32, 0)
    op.linear_cross_entropy(x.requires_grad_(), weight, targets)
    assert seen == [16, 16, 16, 2]


def test_twice_the_same_bits():
    data = inputs(100, 24, 300, torch.bfloat16, 1)
    runs = [differentiate(lambda *x: op.linear_cross_entropy(*x).loss, data, 0) for _ in "ab"]
    assert same_bits(*runs)


def test_opcheck():
    x, weight, targets = inputs(6, 24, 40, torch.float32, 0)
    scales = torch.rand(6)
    ops = torch.ops.kexaone
    leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_(), targets)
    torch.library.opcheck(ops.linear_cross_entropy, (*leaves, scales, IGNORED, 0.1))
    torch.library.opcheck(ops.linear_cross_entropy_tokens, (*leaves, IGNORED, 0.1))
    torch.library.opcheck(
        ops.linear_cross_entropy_gradients, (x, weight, targets, scales, IGNORED, 0.1)
    )


def test_compiled_with_dynamic_shapes():
    check_compiled(lambda *x: op.linear_cross_entropy(*x).loss,
                   lambda n: inputs(n, 24, 40, torch.float32, n), sizes=(4, 9, 17))  # fmt: skip
    check_compiled(op.linear_cross_entropy_tokens,
                   lambda n: inputs(n, 24, 40, torch.float32, n), sizes=(4, 9, 17))  # fmt: skip


def test_wrong_shapes_are_refused():
    x, weight, targets = inputs(4, 24, 50, torch.float32, 0)
    with pytest.raises(ValueError, match="must have one dtype"):
        op.linear_cross_entropy(x, weight[:, :8], targets)
    with pytest.raises(ValueError, match=r"targets must be int64 \[4\]"):
        op.linear_cross_entropy(x, weight, targets.int())
