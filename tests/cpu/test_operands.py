"""Operands of `tl.dot` that are read where they lie: layouts, masks, stores, float8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

ROOT = Path(__file__).parents[2]
F8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@triton.jit
def product_kernel(x, w, y, live_m, live_n, K, BM: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                   CARRIED: tl.constexpr):  # fmt: skip
    """y = x w. LEFT: x is read as its transpose, RIGHT: w; rows that are not live count as 0."""
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    xs = x + (k[:, None] * BM + m[None, :] if LEFT else m[:, None] * K + k[None, :])
    ws = w + (n[:, None] * K + k[None, :] if RIGHT else k[:, None] * BN + n[None, :])
    x_step, w_step = BM if LEFT else 1, 1 if RIGHT else BN
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        at_x, at_w = xs, ws
        if not CARRIED:
            at_x, at_w = xs + start * x_step, ws + start * w_step
        a = tl.load(at_x) if LEFT else tl.load(at_x, mask=(m < live_m)[:, None], other=0.0)
        b = tl.load(at_w, mask=(n < live_n)[:, None], other=0.0) if RIGHT else tl.load(at_w)
        a, b = tl.trans(a) if LEFT else a, tl.trans(b) if RIGHT else b
        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
        if CARRIED:
            xs += BK * x_step
            ws += BK * w_step
    tl.store(y + m[:, None] * BN + n[None, :], total)


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float8_e4m3fn)],
    ids=["fp32", "bf16", "fp8"],
)
def test_exact_products_of_every_layout(dtypes, rows, left, right, carried):
    """Small integers: every order of additions gives the exact sum. What is masked is not read."""
    generator = torch.Generator().manual_seed(rows)
    n, k = 32, 192
    x = torch.randint(-8, 9, (rows, k), generator=generator).to(dtypes[0])
    w = torch.randint(-8, 9, (k, n), generator=generator).to(dtypes[1])
    live_m, live_n = (rows if left else max(1, rows - 3)), (n - 5 if right else n)
    want = x.double() @ w.double()
    want[live_m:], want[:, live_n:] = 0, 0
    x[live_m:], w[:, live_n:] = float("nan"), float("nan")
    y = torch.empty(rows, n)
    product_kernel[(1,)](
        x.T.contiguous() if left else x, w.T.contiguous() if right else w, y, live_m, live_n, k,
        BM=rows, BN=n, BK=64, LEFT=left, RIGHT=right, CARRIED=carried,
    )  # fmt: skip
    assert torch.equal(y.double(), want)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("form", F8)
def test_every_code_of_a_float8_is_unpacked_exactly(form, rows, right):
    """Rows of the identity pick single numbers out of B, subnormal ones among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(F8[form])
    codes = torch.where(codes.float().isfinite(), codes.float(), 0.0).to(F8[form])
    w = codes.repeat(8).reshape(64, 32)[torch.randperm(64, generator=torch.manual_seed(0))]
    for first in range(0, 64, rows):
        x = torch.eye(64)[first : first + rows].bfloat16()
        y = torch.empty(rows, 32)
        product_kernel[(1,)](
            x, w.T.contiguous() if right else w, y, rows, 32, 64, BM=rows, BN=32, BK=64,
            LEFT=False, RIGHT=right, CARRIED=True,
        )  # fmt: skip
        assert torch.equal(y, w.float()[first : first + rows])


@triton.jit
def stores_kernel(x, w, y, LATER: tl.constexpr):
    m, k = tl.arange(0, 16), tl.arange(0, 64)
    a = tl.load(x + m[:, None] * 64 + k[None, :])
    w += k[:, None] * 64 + k[None, :]
    if LATER:
        b = tl.load(w)
        tl.store(w, tl.zeros((64, 64), tl.float32))
    else:
        tl.store(w, tl.full((64, 64), 2.0, tl.float32))
        b = tl.load(w)
    tl.store(y + m[:, None] * 64 + k[None, :], tl.dot(a, b, input_precision="ieee"))


@pytest.mark.parametrize("later", [True, False])
def test_a_product_reads_what_was_there_when_it_was_loaded(later):
    x = torch.randint(-8, 9, (16, 64)).float()
    w = torch.randint(-8, 9, (64, 64)).float()
    want = x @ (w if later else torch.full((64, 64), 2.0))
    y = torch.empty(16, 64)
    stores_kernel[(1,)](x, w, y, LATER=later)
    assert torch.equal(y, want)
    assert torch.equal(w, torch.full((64, 64), 0.0 if later else 2.0))


@pytest.mark.slow
def test_products_have_the_same_bits_on_every_instruction_set_and_when_checked(tmp_path):
    """Every layout, few rows and many, numbers whose sums depend on the order of additions."""
    (tmp_path / "products.py").write_text(Path(__file__).read_text())
    code = (
        "import torch, hashlib; from products import product_kernel\n"
        "g, bits = torch.Generator().manual_seed(0), hashlib.sha256()\n"
        "for kind in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):\n"
        "  for rows in (1, 2, 8, 16, 64):\n"
        "    x, w = (torch.randn(size, generator=g) for size in ((rows, 192), (192, 32)))\n"
        "    x, w = x if kind == torch.float32 else x.bfloat16(), w.to(kind)\n"
        "    for left, right in ((False, True), (False, False), (True, True)):\n"
        "      y = torch.empty(rows, 32)\n"
        "      a, b = x.T.contiguous() if left else x, w.T.contiguous() if right else w\n"
        "      product_kernel[(1,)](a, b, y, rows, 32, 192, BM=rows, BN=32, BK=64, LEFT=left,"
        " RIGHT=right, CARRIED=True)\n"
        "      bits.update(y.numpy().tobytes())\n"
        "print(bits.hexdigest())"
    )
    settings = [{}, {"KEXAONE_CPU_ISA": "avx2"}, {"KEXAONE_CPU_ISA": "baseline"},
                {"KEXAONE_CPU_CHECKED": "1"}]  # fmt: skip
    found = set()
    for setting in settings:
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "KEXAONE_CPU": "1", "PYTHONPATH": path, **setting},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.add(done.stdout)
    assert len(found) == 1
