"""The CPU backend against Inductor, oneDNN, flex_attention and the Triton interpreter.

    python -m kexaone.bench.cpu_backend [--rounds 9] [--threads 2] [--json PATH] [name ...]

Both sides of a row run alternately in one process; figures are medians, so that what else runs on
the machine meets both. A ratio above 1 means that the backend is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from ..cpu.activation import active
from ..files import write_json
from . import cpu_kernels as kernels

Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """Medians in milliseconds of the backend and of its peer; `error` is their difference."""

    name: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    goal: float
    error: float


@dataclass(frozen=True)
class Case:
    """Two ways to compute one thing, and the ratio we aim at."""

    peer: str
    goal: float
    ours: Work
    theirs: Work


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def softmax() -> Case:
    x = normal(4096, 4096)
    out = torch.empty_like(x)
    launch: Any = kernels.softmax_kernel[(4096,)]
    compiled = torch.compile(lambda x: x.softmax(1))
    return Case("inductor", 1.0, lambda: (launch(x, out, 4096, BLOCK=4096), out)[1],
                lambda: compiled(x))  # fmt: skip


def rms_norm() -> Case:
    x, w = normal(2048, 6144, dtype=torch.bfloat16), normal(6144, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    launch: Any = kernels.rms_norm_kernel[(2048,)]
    compiled = torch.compile(
        lambda x, w: F.rms_norm(x.float(), (6144,), w.float(), 1e-5).bfloat16()
    )
    return Case("inductor", 1.0, lambda: (launch(x, w, out, 6144, 1e-5, BLOCK=8192), out)[1],
                lambda: compiled(x, w))  # fmt: skip


def qk_norm_rope() -> Case:
    tokens, heads, dim = 2048, 72, 128
    x, w = normal(tokens, heads, dim, dtype=torch.bfloat16), normal(dim, dtype=torch.bfloat16)
    angle = torch.outer(torch.arange(tokens), 1e6 ** -(torch.arange(dim // 2) / (dim // 2)))
    cos, sin = angle.cos(), angle.sin()
    out = torch.empty_like(x)

    @torch.compile
    def compiled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x.float(), (dim,), w.float(), 1e-5)
        a, b = y.chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], -1).bfloat16()

    launch: Any = kernels.qk_norm_rope_kernel[(tokens, heads)]
    return Case("inductor", 1.0,
                lambda: (launch(x, w, cos, sin, out, heads, 1e-5, DIM=dim), out)[1],
                lambda: compiled(x, w))  # fmt: skip


def matmul(dtype: torch.dtype) -> Case:
    n = 2048
    a, b = normal(n, n, dtype=dtype), normal(n, n, dtype=dtype)
    out, other = torch.empty(n, n, dtype=dtype), torch.empty(n, n, dtype=dtype)
    tile = {"BM": 128, "BN": 128, "BK": 64}
    launch: Any = kernels.matmul_kernel[((n // 128) ** 2,)]
    return Case("onednn", 0.7, lambda: (launch(a, b, out, n, n, n, **tile), out)[1],
                lambda: torch.mm(a, b, out=other))  # fmt: skip


def window_attention() -> Case:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, heads, groups, dim, window = 4096, 16, 2, 128, 128
    q = normal(tokens, heads, dim, dtype=torch.bfloat16)
    k, v = (normal(tokens, groups, dim, dtype=torch.bfloat16) for _ in "kv")
    out = torch.empty_like(q)
    launch: Any = kernels.window_attention_kernel[(tokens // 64, heads)]
    scale = dim**-0.5 * 1.4426950408889634

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (i - j < window)

    mask = create_block_mask(seen, None, None, tokens, tokens, device="cpu")
    flex = torch.compile(flex_attention)
    views = [t.transpose(0, 1)[None] for t in (q, k, v)]
    return Case(
        "flex_attention", 4.0,
        lambda: (launch(q, k, v, out, tokens, scale, window, HEADS=heads, GROUPS=groups, DIM=dim,
                        BM=64, BN=64), out)[1],
        lambda: flex(*views, block_mask=mask, enable_gqa=True)[0].transpose(0, 1),  # pyright: ignore
    )  # fmt: skip


_INTERPRET = """
import sys, time, torch
from kexaone.bench.cpu_kernels import softmax_kernel
x = torch.load(sys.argv[1])
out = torch.empty_like(x)
begin = time.perf_counter()
softmax_kernel[(x.shape[0],)](x, out, x.shape[1], BLOCK=x.shape[1])
print((time.perf_counter() - begin) * 1e3)
torch.save(out, sys.argv[1])
"""


def interpreter(name: str, rounds: int) -> Row:
    """The interpreter is chosen when Triton is imported, so it runs in a process of its own."""
    x = normal(256, 4096)
    out = torch.empty_like(x)
    with tempfile.TemporaryDirectory() as folder, active():
        file = Path(folder, "x.pt")
        torch.save(x, file)
        command = [sys.executable, "-W", "ignore", "-c", _INTERPRET, str(file)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        slow = float(
            subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        )
        times = []
        launch: Any = kernels.softmax_kernel[(256,)]
        for _ in range(rounds + 1):  # the first one compiles
            begin = time.perf_counter()
            launch(x, out, 4096, BLOCK=4096)
            times.append((time.perf_counter() - begin) * 1e3)
        error = (out - torch.load(file)).abs().max().item()
    fast = statistics.median(times[1:])
    return Row(name, "interpreter", fast, slow, slow / fast, 100.0, error)


CASES: dict[str, Callable[[], Case]] = {
    "rms-norm-bf16-2048x6144": rms_norm,
    "softmax-fp32-4096x4096": softmax,
    "qk-norm-rope-bf16-2048x72x128": qk_norm_rope,
    "matmul-bf16-2048": lambda: matmul(torch.bfloat16),
    "matmul-fp32-2048": lambda: matmul(torch.float32),
    "window-attention-bf16-4096": window_attention,
}
INTERPRETER = "interpreter-softmax-256x4096"


def measure(name: str, rounds: int) -> Row:
    """Run both sides of a case alternately."""
    if name == INTERPRETER:
        return interpreter(name, rounds)
    case = CASES[name]()
    with active():
        ours, theirs = case.ours(), case.theirs()
        error = (ours.double() - theirs.double()).abs().max().item()
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for work, spent in zip((case.ours, case.theirs), times, strict=True):
                begin = time.perf_counter()
                work()
                spent.append((time.perf_counter() - begin) * 1e3)
    fast, slow = (statistics.median(t) for t in times)
    return Row(name, case.peer, fast, slow, slow / fast, case.goal, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join([*CASES, INTERPRETER]))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = set(options.names) - {*CASES, INTERPRETER}
    if unknown:
        parser.error(f"unknown names: {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    print(f"triton {triton.__version__}, torch {torch.__version__}, {options.threads} threads")
    rows = []
    for name in options.names or [*CASES, INTERPRETER]:
        row = measure(name, options.rounds)
        rows.append(row)
        print(f"{row.name:32} {row.ours_ms:9.2f} ms  {row.peer:14} {row.peer_ms:9.2f} ms  "
              f"ratio {row.ratio:7.2f} (goal {row.goal:g})  difference {row.error:.2g}",
              flush=True)  # fmt: skip
    write_json(options.json, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
