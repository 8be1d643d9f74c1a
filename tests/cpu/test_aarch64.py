"""Kernels built for aarch64 by a cross compiler and run by an emulator: the same bits as here."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kexaone.cpu import target

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
RUNTIME = Path(target.__file__).parent / "runtime"


def program(source: str, arguments: list[Any], grid: int) -> str:
    """A program that reads the tensors, runs the kernel on them and writes them."""
    lines = ["#include <stdio.h>", source, "int main() {"]
    values = []
    for at, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            size = value.numel() * value.element_size()
            lines.append(f"alignas(64) static char t{at}[{size}]; fread(t{at}, 1, {size}, stdin);")
            values.append(f"(uint64_t)t{at}")
        else:
            values.append(f"(uint64_t){value}")
    lines += [
        f"const int32_t grid[3] = {{{grid}, 1, 1}};",
        f"const uint64_t arguments[] = {{{', '.join(values)}}};",
        "const char *fault = kx_entry(grid, arguments, nullptr);",
        "if (fault) { fputs(fault, stderr); return 1; }",
        *(f"fwrite({v[10:]}, 1, sizeof {v[10:]}, stdout);" for v in values if v[10] == "t"),
        "}",
    ]
    return "\n".join(lines)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def same_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a kernel here, with registers as wide as there, and there; compares every tensor."""
    if not shutil.which(COMPILER):
        pytest.skip(f"{COMPILER} is not installed")
    monkeypatch.setenv("KEXAONE_CPU_ISA", "baseline")
    assert target.host_isa().vector_bytes == 16

    def check(
        kernel: Any, grid: int, *arguments: Any, features: str = "", **constants: Any
    ) -> None:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        given = b"".join(map(bytes_of, tensors))
        compiled = kernel[(grid,)](*arguments, **constants)
        isa = target.choose_isa("aarch64", frozenset(features.split()))
        file, built = tmp_path / "kernel.cpp", tmp_path / "kernel"
        file.write_text(program(compiled.asm["cpp"], list(arguments), grid))
        flags = [flag for flag in target._FLAGS if flag != "-shared"]
        subprocess.run(
            [COMPILER, *flags, *isa.flags, f"-DKX_VECTOR_BYTES={isa.vector_bytes}",
             f"-I{RUNTIME}", str(file), "-o", str(built), "-static", "-lm"], check=True,
        )  # fmt: skip
        if not shutil.which(EMULATOR):
            pytest.skip(f"built, but not run: {EMULATOR} is not installed")
        got = subprocess.run([EMULATOR, str(built)], input=given, capture_output=True, check=True)
        assert got.stdout == b"".join(map(bytes_of, tensors))

    return check


@triton.jit
def mixed_kernel(x, n, ints, halves, bytes_, floats, sums, N: tl.constexpr):
    """Casts, integers, masks, a reduction, a scan, a sort and control flow."""
    pid = tl.program_id(0)
    at = tl.arange(0, N)
    v = tl.load(x + pid * n + at, mask=at < n, other=-1.5)
    tl.store(bytes_ + pid * n + at, v.to(tl.float8e4nv), mask=at < n)
    low = v.to(tl.bfloat16) * 3.25
    tl.store(halves + pid * n + at, (low.to(tl.float32) + v.to(tl.float16)).to(tl.float16),
             mask=at < n)  # fmt: skip
    k = (v * 100).to(tl.int32)
    k = k // (at - 20) + (k % 7 << 3) ^ (k >> (at % 40))
    tl.store(ints + pid * n + at, tl.sort(k), mask=at < n)
    highest = tl.minimum(tl.max(v, 0), 1e6)
    steps = 0
    while highest > 1:
        highest *= 0.5
        if steps % 3 == 1:
            highest -= 0.125
        steps += 1
    tl.store(floats + pid * n + at, tl.cumsum(v, 0) + steps, mask=at < n)
    tl.atomic_add(sums + tl.where(v > 0, 0, 2), steps)
    tl.atomic_max(sums + 1, tl.max(k, 0))


@pytest.mark.parametrize("features", ["", "atomics bf16 i8mm asimdhp"])
def test_mixed_kernel(same_there, features):
    n = 45
    x = torch.randn(3, n, generator=torch.manual_seed(0)) * 20
    x[1, :6] = torch.tensor([float("inf"), -1e-40, 1e-5, 448.1, -0.0, 70000.0])
    same_there(
        mixed_kernel, 3, x, n, torch.zeros(3, n, dtype=torch.int32), torch.zeros(3, n).half(),
        torch.zeros(3, n, dtype=torch.float8_e4m3fn), torch.zeros(3, n),
        torch.zeros(3, dtype=torch.int32), N=64, features=features,
    )  # fmt: skip


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, RIGHT: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    if RIGHT:
        y = tl.trans(tl.load(b + n[:, None] * K + k[None, :]))
    else:
        y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y.to(x.dtype), input_precision="ieee"))


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(
    ("left_type", "right_type", "rows"),
    [
        (torch.bfloat16, torch.bfloat16, 32),
        (torch.bfloat16, torch.float8_e4m3fn, 4),
        (torch.float32, torch.float32, 16),
        (torch.float16, torch.float16, 8),
        (torch.int8, torch.int8, 16),
    ],
)
def test_products(same_there, left_type, right_type, rows, right):
    torch.manual_seed(0)
    a, b = (torch.randn(rows, 64) * 3).to(left_type), (torch.randn(64, 32) * 3).to(right_type)
    c = torch.zeros(rows, 32, dtype=torch.int32 if left_type == torch.int8 else torch.float32)
    same_there(dot_kernel, 1, a, b, c, M=rows, N=32, K=64, RIGHT=right)
