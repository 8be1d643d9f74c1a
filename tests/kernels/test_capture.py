"""Recorded functions: a replay does what a call does, and what it could not do is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import kexaone
from kexaone.kernels import plain
from kexaone.kernels.capture import CaptureError, Graph


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Takes the place of the fixture that fills fresh memory: PyTorch would do it, unrecorded."""


CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(
    dtype=DTYPES,
    shape=st.tuples(st.integers(0, 5), st.integers(1, 1500)),
    wide=st.integers(0, 9),
)
def test_small_operators_are_pytorchs(
    dtype: torch.dtype, shape: tuple[int, int], wide: int
) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    x, y = (torch.randn(rows, columns + wide, dtype=dtype) for _ in range(2))
    view = x[:, :columns]
    assert torch.equal(plain.add(x, y), x + y)
    assert torch.equal(plain.concatenate((view, y), -1), torch.cat((view, y), -1))
    ids = torch.randint(0, max(rows, 1), (2, 3))
    if rows:
        assert torch.equal(plain.take(view, ids), F.embedding(ids, view))


@given(dtype=DTYPES, tokens=st.integers(1, 20))
def test_replay_does_what_a_call_does(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    table, weight = torch.randn(50, 64, dtype=dtype), torch.rand(64, dtype=dtype)
    gate_up, down = torch.randn(64, 64, dtype=dtype) / 8, torch.randn(64, 32, dtype=dtype) / 8
    ids = torch.randint(0, 50, (tokens,))

    def block() -> torch.Tensor:
        x = F.embedding(ids, table)
        gate, up = F.linear(kexaone.ops.rms_norm(x, weight), gate_up).chunk(2, -1)
        return torch.cat((x, x + F.linear(kexaone.ops.swiglu(gate, up), down)), -1)

    graph = Graph(block, device=CPU)
    first = graph.output.clone()
    ids.copy_(torch.randint(0, 50, (tokens,)))
    again = graph.replay().clone()
    assert torch.equal(again, Graph(block, device=CPU).output)
    with torch.no_grad(), kexaone.impl("triton"):
        expected = block()
    scale = expected.float().abs().max()
    error = (again.float() - expected.float()).abs().max()
    # two products of at most 64 terms, rounded once each
    assert error <= 8 * torch.finfo(dtype).eps * scale and not torch.equal(first, again)


X, ONES = torch.randn(4, 64), torch.ones(64)
REFUSED = {
    "arithmetic": lambda: X * 2,
    "a sum that broadcasts": lambda: X + X[0],
    "a scaled sum": lambda: torch.add(X, X, alpha=2),
    "a copy": lambda: X.t().contiguous(),
    "writing": lambda: X.detach().zero_(),
    "filled memory": lambda: torch.zeros(4),
    "drawing": lambda: torch.rand(4),
    "a copy inside one of our ops": lambda: kexaone.ops.rms_norm(X.t(), ONES[:4]),
    "a sum over parts": lambda: X.sum(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_recorded_is_refused(name: str) -> None:
    before = X.clone()
    with pytest.raises(CaptureError):
        Graph(REFUSED[name], device=CPU)
    assert torch.equal(X, before)
    Graph(lambda: kexaone.ops.rms_norm(X, ONES), device=CPU).replay()


def test_views_pass_and_devices_without_kernels_do_not() -> None:
    graph = Graph(lambda: X.view(2, 2, 64)[1:].transpose(0, 1).unsqueeze(0).detach(), device=CPU)
    assert graph.replay().shape == (1, 2, 1, 64)
    with pytest.raises(ValueError, match="meta"):
        Graph(lambda: X, device=torch.device("meta"))
