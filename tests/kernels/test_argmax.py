"""The largest of a row, exactly: lowest index first, rows that are not finite told apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kexaone
from kexaone.kernels.argmax import argmax

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 2048, 5000]))


def by_definition(x: Tensor) -> list[int]:
    found = []
    for row in x.double().reshape(-1, x.shape[-1]).tolist():
        finite = all(abs(v) < float("inf") for v in row)
        found.append(row.index(max(row)) if finite else -1)
    return found


@given(DTYPES, st.integers(0, 5), WIDTHS, st.integers(0, 2**31), st.integers(0, 3))
def test_the_definition(dtype: torch.dtype, rows: int, width: int, seed: int, wrong: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # few values, so that ties are the rule
    x = torch.randint(-3, 3, (rows, width), generator=generator).to(dtype)
    if wrong and rows:
        value = [float("nan"), float("inf"), -float("inf")][wrong - 1]
        x[seed % rows, seed % width] = value
    expected = by_definition(x)
    for name in ("triton", "reference"):
        with kexaone.impl(name):
            found = argmax(x)
            assert found.dtype == torch.int64 and found.tolist() == expected
            assert argmax(x.view(1, rows, width)).tolist() == [expected]
            assert argmax(torch.cat((x, x), 1)[:, :width]).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_compiled_and_refused(dtype: torch.dtype) -> None:
    least = torch.full((2, 7), torch.finfo(dtype).min, dtype=dtype)
    assert argmax(least).tolist() == [0, 0]
    x = torch.randn(3, 100, dtype=dtype)
    compiled = torch.compile(argmax, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x.argmax(-1))
    torch.library.opcheck(torch.ops.kexaone.argmax.default, (x.float(),))
    for name in ("triton", "reference"):
        with kexaone.impl(name), pytest.raises(ValueError, match="V > 0"):
            argmax(x[:, :0])
