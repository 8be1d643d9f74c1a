"""Newton-Schulz against the float64 reference, the exact polar factor, and torch's own Muon."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import newton_schulz as op

from .contract import check, normal, same_bits, seeds

shapes = st.sampled_from(
    [(1, 1, 1), (3, 5, 7), (2, 16, 40), (2, 40, 16), (1, 130, 150), (0, 4, 4), (4, 64, 64)]
)


@given(shape=shapes, seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_meets_the_contract(shape, seed, dtype):
    """By matrix: one wrong matrix of a batch cannot hide. One step, as errors grow in many."""

    def run(f):
        return lambda x: f(x, steps=1, dtype=dtype)

    check(run(op.newton_schulz), run(op.newton_schulz_reference), [normal(*shape, seed=seed)],
          gradients=False)  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 48, 96), (2, 96, 48), (1, 128, 200)])
def test_singular_values_come_near_one(shape):
    x = normal(*shape, seed=5)
    out = op.newton_schulz(x).double()
    values = torch.linalg.svdvals(out)
    assert (values > 0.65).all() and (values < 1.25).all()
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    cosine = (out * (left @ right)).sum() / (out.norm() * (left @ right).norm())
    assert cosine > 0.98


def test_agrees_with_the_step_of_torch_muon():
    parameter = torch.nn.Parameter(torch.zeros(40, 64))
    parameter.grad = normal(40, 64, seed=2)
    muon = torch.optim.Muon([parameter], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    muon.step()
    theirs = -parameter.detach()
    ours = op.newton_schulz(parameter.grad)
    scale = theirs.norm() / ours.norm()  # their update is scaled by the shape
    # both round every product to bfloat16, five times three of them
    assert (theirs / scale - ours).norm() / ours.norm() < 15 * torch.finfo(torch.bfloat16).eps


def test_twice_the_same_bits():
    x = normal(1, 150, 200, seed=1)
    assert same_bits(op.newton_schulz(x), op.newton_schulz(x))


def test_a_zero_matrix_stays_zero():
    zero = torch.zeros(2, 8, 16)
    assert same_bits(op.newton_schulz(zero), zero)


def test_only_half_of_a_symmetric_product_is_computed():
    """The tile above the diagonal is a mirror image, to the bit, of the one under it."""
    x, gram = normal(1, 130, 70, seed=3).bfloat16(), torch.empty(1, 130, 130, dtype=torch.bfloat16)
    with kexaone.cpu.active():
        op._symmetric_kernel[(3, 3, 1)](x, x, gram, 130, 70, 70, 1.0, 0.0, ADD=False, BLOCK=64,
                                        DEPTH=32)  # fmt: skip
    assert torch.equal(gram, gram.mT)
    torch.testing.assert_close(gram, x @ x.mT)


def test_strides_and_leading_dimensions():
    x = normal(2, 3, 16, 24, seed=4)
    want = op.newton_schulz(x)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert want.shape == x.shape and same_bits(op.newton_schulz(strided), want)
    assert same_bits(op.newton_schulz(x[0, 0]), want[0, 0])
    assert same_bits(op.newton_schulz(x.mT).mT, want)


def test_opcheck_and_compile():
    x = normal(2, 8, 16).bfloat16()
    torch.library.opcheck(torch.ops.kexaone.newton_schulz, (x, 2))
    compiled = torch.compile(op.newton_schulz, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x), op.newton_schulz(x))


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"must be \[..., rows, columns\]"):
        op.newton_schulz(torch.ones(4))
