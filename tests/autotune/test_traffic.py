"""What kernels ask of memory, against sums done by hand."""

from __future__ import annotations

import kernels_to_audit as kernels
import numpy as np
import pytest
import torch

from kexaone.autotune.audit import Subject, judge
from kexaone.autotune.capture import bind, storage_of
from kexaone.autotune.compile import compile_job, specialise
from kexaone.kernels.arch import ARCHS

ARCH = ARCHS["sm_90"]


def floats(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def report(kernel, grid, *args, contents=None, **named):
    launch = bind(kernel, grid, args, {"num_warps": 4, **named})
    subject = Subject("own", "", launch, ARCH, contents or {})
    return judge(subject, compile_job(specialise(launch, ARCH)))


def test_copy_moves_each_byte_once():
    n = 100_000
    found = report(kernels.copy, (98,), floats(n), floats(n), n, BLOCK=1024)
    assert found.exact and found.problems == ()
    assert found.useful_bytes == pytest.approx(8 * n, rel=0.2)  # the last program is one of 9
    assert found.moved_per_useful == pytest.approx(1, abs=0.01)


def test_second_pass_is_counted():
    rows, n = 64, 8192
    found = report(kernels.twice, (rows,), floats(rows, n), floats(rows, n), n, BLOCK=1024)
    assert found.exact and found.useful_bytes == 8 * rows * n
    assert found.moved_per_useful == pytest.approx(1.5)
    assert {w.argument for w in found.widths if w.kind == "load"} == {"x"}
    # two loops of 8 turns: more than what the code has, less than 8 times that
    warps = found.instructions_per_kib * found.useful_bytes / 1024 / rows / 4
    assert 2 * found.code.instructions < warps < 8 * found.code.instructions


def test_columns_waste_most_of_a_sector():
    found = report(kernels.columns, (512,), floats(256, 512), floats(512, 256), 512, BLOCK=256)
    # a 4-byte element costs a sector of 32: (32 + 4) / 8
    assert found.moved_per_useful == pytest.approx(4.5)
    assert not any(w.possible for w in found.widths if w.argument == "x")


def test_data_that_steers_is_used_where_it_is_known():
    n, rows = 512, torch.tensor([3, 3, 3, 3], dtype=torch.int32)
    x, steer, y = floats(8, n), rows.to("meta"), floats(4, n)
    blind = report(kernels.gather, (4,), x, steer, y, n, BLOCK=512)
    assert not blind.exact
    seen = report(kernels.gather, (4,), x, steer, y, n, BLOCK=512,
                  contents={storage_of(steer): rows.numpy()})  # fmt: skip
    assert seen.exact
    # four times the same row is asked for, of the eight that are there
    assert seen.useful_bytes == 4 * (2 * 4 * n + 4)


def test_loops_that_data_ends_are_followed():
    n, starts = 512, torch.tensor([0, 1, 3, 6], dtype=torch.int32)
    x, steer, y = floats(4, n), starts.to("meta"), floats(8, n)
    seen = report(kernels.search, (8,), x, steer, y, 4, n, BLOCK=512,
                  contents={storage_of(steer): starts.numpy()})  # fmt: skip
    assert seen.exact
    # every row of x is found by some program; two starts are looked at by each of them
    assert seen.useful_bytes == 4 * (4 * n + 8 * n + 4)
    # x, y and one sector of starts, twice
    assert seen.moved_per_useful == pytest.approx((8 * n * 8 + 8 * 2 * 32) / seen.useful_bytes)
    blind = report(kernels.search, (8,), x, steer, y, 4, n, BLOCK=512)
    assert not blind.exact


def test_products_are_counted():
    depth = 4096
    half = {"dtype": torch.bfloat16}
    found = report(kernels.product, (1,), floats(64, depth, **half), floats(128, depth, **half),
                   floats(64, 128), depth, M=64, N=128, BLOCK=64)  # fmt: skip
    assert found.flops == 2 * 64 * 128 * depth
    assert found.code.mma and found.exact and found.moved_per_useful == pytest.approx(1)
    assert {w.bytes for w in found.widths if w.kind == "load"} == {16}
    # four warps do 64 x 128 x 16 at a time
    assert found.mma_work == 1 and found.mma_per_megaflop == pytest.approx(1e6 * 4 / 2**18)


def test_work_that_warps_repeat_is_counted():
    """A tile of 16 x 16 for eight warps: each does all of it."""
    half = {"dtype": torch.bfloat16}
    found = report(kernels.product, (1,), floats(16, 512, **half), floats(16, 512, **half),
                   floats(16, 16), 512, M=16, N=16, BLOCK=64, num_warps=8)  # fmt: skip
    assert found.mma_work > 2


def test_alignment_decides_the_width():
    n = 1 << 20
    aligned = report(kernels.copy, (1024,), floats(n), floats(n), n, BLOCK=1024)
    shifted = report(kernels.copy, (1024,), floats(n + 1)[1:], floats(n), n, BLOCK=1024)
    assert {w.bytes for w in aligned.widths} == {16}
    assert min(w.bytes for w in shifted.widths if w.argument == "x") == 4
    # what starts off a 16-byte boundary cannot be read in whole pieces: no fault of the kernel
    assert not shifted.problems


def test_narrow_accesses_are_found_beside_wide_ones():
    n = 1 << 20
    found = report(kernels.clamped, (512,), floats(n), floats(n), n, BLOCK=2048)
    assert found.code.widths("load") == {4: 16, 16: 4}
    assert len(found.problems) == 1 and "load" in found.problems[0]


def test_integers_are_folded_like_the_hardware_does():
    from kexaone.autotune.integers import _BINARY

    a, b = np.array([7, -7, 7, -7]), np.array([2, 2, -2, -2])
    assert _BINARY["divsi"](a, b).tolist() == [3, -3, -3, 3]
    assert _BINARY["remsi"](a, b).tolist() == [1, -1, 1, -1]
