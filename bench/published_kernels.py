"""What published kernels are taken to be: for each family, the `Work` that its name and shape mean.

Nothing here knows a published time. Where kernels of one family differ in a way that their sources
document (an instruction, a second pass, a fixed tile), that is said where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..autotune.model import Machine, Work
from ..autotune.workloads import (
    HIDDEN,
    Attention,
    Product,
    Tile,
    attention_work,
    best_product,
    decode_work,
    product_work,
    routed,
    rows,
)
from ..kernels.arch import ARCHS

_MMA_SYNC = 0.62
"""Of the rate of wgmma, what Hopper gives the older instruction (arXiv 2402.13499, table 8)."""


@dataclass(frozen=True)
class Published:
    """A row of the file with its sizes read."""

    source: str
    kernel: str
    gpu: str
    dtype: str
    sizes: dict[str, float]
    metric: str
    value: float
    tier: str
    notes: str

    def size(self, *names: str, default: float | None = None) -> float:
        """The first of these sizes that the row has. Raises KeyError."""
        for name in names:
            if name in self.sizes:
                return self.sizes[name]
        if default is None:
            raise KeyError(names[0])
        return default

    @property
    def item(self) -> int:
        return 4 if "32" in self.dtype else 2

    @property
    def kind(self) -> str:
        return "fp8" if self.dtype.startswith("fp8") else "bf16"


@dataclass(frozen=True)
class Described:
    """What the model takes a row to be: kernels one after the other, flops and bytes as counted."""

    works: tuple[Work, ...]
    flops: float = 0.0
    bytes: float = 0.0


def _shared(machine: Machine) -> int:
    return ARCHS[machine.arch].shared_bytes


def _norm(row: Published, machine: Machine) -> Described:
    count = row.size("M", "S", "T") * row.size("B", default=1)
    columns = row.size("H", "N") if "H" in row.sizes else row.size("N")
    added = "add" in row.kernel
    size = columns * row.item
    read, written = size * (2 if added else 1), size * (2 if added else 1)
    if "backward" in row.kernel:
        # x (or the sum), the output's gradient, and with a residual its gradient; dx
        read, written = size * (3 if added else 2), size
    read += _again(row, columns, size)
    return Described((rows(int(count), read, written),), bytes=count * 2 * size)


def _cross_entropy(row: Published, machine: Machine) -> Described:
    count = row.size("M", default=row.size("S", default=1) * row.size("B", default=1))
    size = row.size("N", "V") * row.item
    liger = "iger" in row.kernel
    # Liger writes the gradient in the forward pass, after a first pass over the logits
    read, written = (2 * size, size) if liger else (size, 8.0)
    if "backward" in row.kernel:
        read, written = size, size
    read += _again(row, size / row.item, size)
    return Described((rows(int(count), read, written),), bytes=count * size)


def _again(row: Published, columns: float, size: float) -> float:
    """What of a row is read a second time.

    Inductor reduces rows of more than 1024 elements in a loop and then goes over them again. A row
    over 128 KiB fits no program, and is held by several of them (a cluster) only in QuACK.
    """
    looped = "torch" in row.kernel and columns > 1024
    return size if looped or (size > 128 * 1024 and "QuACK" not in row.kernel) else 0.0


def _softmax(row: Published, machine: Machine) -> Described:
    size = row.size("N") * row.item
    return Described((rows(int(row.size("M")), size, size),), bytes=2 * row.size("M") * size)


def _swiglu(row: Published, machine: Machine) -> Described:
    count, size = row.size("S") * row.size("B", default=1), row.size("ffn_local") * row.item
    read, written = (3 * size, 2 * size) if "backward" in row.kernel else (2 * size, size)
    return Described((rows(int(count), read, written),), bytes=count * 3 * size)


def _cast(row: Published, machine: Machine) -> Described:
    count, columns = row.size("M"), row.size("N")
    if "weight_quant" in row.kernel and "K" in row.sizes:
        count, columns = row.size("E") * row.size("N"), row.size("K")
    scale = 4 / 128 / (128 if "weight" in row.kernel else 1)
    total = count * columns * (3 + scale)
    work = rows(int(count), columns * 2, columns * (1 + scale))
    return Described((work,), bytes=total)


def _router(row: Published, machine: Machine) -> Described:
    tokens, experts, top_k = row.size("T"), row.size("E"), row.size("topk")
    # a warp per token: each round compares what a lane holds and then five times across lanes
    lane = max(1.0, experts / 32)
    instructions = tokens * (top_k * (3 * lane + 5 * 5) + 8 * lane)
    size = 4 if "fp32" in row.dtype else 2
    work = Work(tokens / 4, tokens * experts * size, tokens * top_k * 8,
                tokens * experts * size, instructions=instructions)  # fmt: skip
    return Described((work,))


def _dense(row: Published, machine: Machine) -> Described:
    wgrad = "wgrad" in row.kernel
    scaled = row.kind == "fp8" and "matmul" not in row.kernel
    product = Product((row.size("M"),), int(row.size("N")), int(row.size("K")), row.kind,
                      out_size=4 if wgrad else 2, scaled=scaled)  # fmt: skip
    _, tile = best_product(product, machine, _shared(machine))
    size = 1 if row.kind == "fp8" else 2
    moved = size * (product.rows + product.n) * product.k
    moved += product.rows * product.n * product.out_size
    return Described((product_work(product, tile, machine, _shared(machine)),), product.flops,
                     moved)  # fmt: skip


def _grouped(row: Published, machine: Machine) -> Described:
    if "avg_k" in row.sizes or "K-grouped" in row.kernel:
        return _grouped_gradient(row, machine)
    if "groups" in row.sizes:
        groups = (row.size("m_per_group"),) * int(row.size("groups"))
    else:
        groups = (row.size("M") / row.size("E"),) * int(row.size("E"))
    n, k = int(row.size("N")), int(row.size("K"))
    n, k = (k, n) if "dgrad" in row.kernel else (n, k)
    product = Product(groups, n, k, "fp8", scaled=True)
    _, tile = best_product(product, machine, _shared(machine))
    moved = product.rows * k + len(groups) * n * k + product.rows * n * 2
    return Described((product_work(product, tile, machine, _shared(machine)),), product.flops,
                     moved)  # fmt: skip


def _grouped_gradient(row: Published, machine: Machine) -> Described:
    count = int(row.size("groups", "E"))
    depth = row.size("avg_k") if "avg_k" in row.sizes else row.size("M") / count
    m, n = (row.size("M"), row.size("N")) if "avg_k" in row.sizes else (
        row.size("N"), row.size("K"))  # fmt: skip
    product = Product((m,) * count, int(n), int(depth), "fp8", out_size=4, scaled=True)
    _, tile = best_product(product, machine, _shared(machine))
    moved = count * ((m + n) * depth + m * n * 4)
    return Described((product_work(product, tile, machine, _shared(machine)),), product.flops,
                     moved)  # fmt: skip


def _layer(row: Published, machine: Machine) -> Described:
    """Both products of an expert layer, the activation between them and the sum behind."""
    tokens = row.size("T")
    top_k, experts = row.size("K" if "d" in row.sizes or "intermediate_dim" in row.sizes else
                              "topk", "topk", "K"), int(row.size("E"))  # fmt: skip
    hidden = int(row.size("H", "d", default=row.sizes.get("K", 0)))
    width = row.sizes.get("N_gateup", 0) / 2 or row.size("I", "n", "intermediate_dim")
    groups = routed(int(tokens), experts, int(top_k))
    up = Product(groups, 2 * int(width), hidden, row.kind, gathered=tokens)
    down = Product(groups, hidden, int(width), row.kind)
    size, chosen = 2, tokens * top_k
    between = [rows(int(chosen), 2 * width * size, width * size),
               rows(int(tokens), top_k * hidden * size, hidden * size)]  # fmt: skip
    products = [up] if "up-proj" in row.kernel else [down] if "down-proj" in row.kernel else [
        up, down]  # fmt: skip
    specialised = "Sonic" in row.kernel or "_grouped_mm" in row.kernel or "DeepGEMM" in row.kernel
    tiles = _TRITON_TILES if not specialised else None
    if "liger" in row.kernel.lower():
        # its tiles are 64 rows high, whatever the problem
        tiles = tuple(t for t in _TRITON_TILES if t.m == 64)
    works = [_best(p, machine, tiles) for p in products]
    flops = 6 * chosen * hidden * width
    if "bwd" in row.kernel or "backward" in row.kernel:
        # each product has two gradients; what was between is read and written once more
        works, between = works * 2, between * 2
        flops *= 2
    if len(products) == 2:
        works += between
    return Described(tuple(works), flops)


_TRITON_TILES = tuple(
    Tile(m, n, k, warps=8 if m * n >= 128 * 128 else 4, stages=3, overlap=0.0, pointers=True)
    for m in (16, 32, 64, 128)
    for n in (64, 128, 256)
    for k in (64, 128)
)
"""What a kernel without specialised warps chooses from."""


def _best(product: Product, machine: Machine, tiles: Sequence[Tile] | None) -> Work:
    kwargs: dict[str, Any] = {} if tiles is None else {"tiles": tiles}
    _, tile = best_product(product, machine, _shared(machine), **kwargs)
    return product_work(product, tile, machine, _shared(machine))


def _symmetric(row: Published, machine: Machine) -> Described:
    n = row.size("dim")
    product = Product((n / 2,), int(n), int(n), "bf16")
    return Described((_best(product, machine, _TRITON_TILES),), 2 * n**3)


def _linear_loss(row: Published, machine: Machine) -> Described:
    """The backward pass: the scores again, then both gradients."""
    m, h, v = row.size("M"), int(row.size("H")), int(row.size("V"))
    tiles = _TRITON_TILES if "Triton" in row.kernel else None
    products = (Product((m,), v, h), Product((m,), h, v), Product((float(v),), h, int(m)))
    return Described(tuple(_best(p, machine, tiles) for p in products), 3 * 2 * m * h * v)


def _attention(row: Published, machine: Machine) -> Described:
    keys = int(row.size("S"))
    heads = int(row.size("Hq", "H"))
    backward = "bwd" in row.kernel
    a = Attention(int(row.size("B")), keys, keys, heads, int(row.size("Hkv", default=heads)),
                  int(row.size("D")), causal=bool(row.size("causal", default=0)),
                  backward=backward and "fwd+bwd" not in row.kernel)  # fmt: skip
    specialised = re.search(r"FA3|FA4|cuDNN|TLX|TileLang", row.kernel) is not None
    rate = _MMA_SYNC if "FA2" in row.kernel and machine.arch == "sm_90" else 1.0
    forward = attention_work(a, machine, overlap=HIDDEN if specialised else 0.0, rate=rate)
    if "fwd+bwd" in row.kernel:
        b = Attention(a.batch, a.rows, a.keys, a.queries, a.groups, a.dim, a.causal, True)
        both = forward, attention_work(b, machine, overlap=0.0, rate=rate)
        return Described(both, a.flops + b.flops)
    return Described((forward,), a.flops)


def _decode(row: Published, machine: Machine) -> Described:
    heads = int(row.size("Hq"))
    a = Attention(int(row.size("B")), int(row.size("Sq", default=1)), int(row.size("Sk")), heads,
                  int(row.size("Hkv")), int(row.size("D")))  # fmt: skip
    return Described((decode_work(a, pieces=int(row.size("splits", default=1))),))


Builder = Callable[[Published, Machine], Described]
FAMILIES: tuple[tuple[str, str, str, Builder], ...] = (
    ("RMSNorm", "memory", r"rms_?norm", _norm),
    ("cross-entropy of logits", "memory", r"^(megatron_cross|cross-entropy)", _cross_entropy),
    ("softmax", "memory", r"^softmax fwd", _softmax),
    ("SwiGLU", "memory", r"swiglu", _swiglu),
    ("float8 casts", "memory", r"blockwise cast|^weight_quant", _cast),
    ("routing", "memory", r"^router", _router),
    ("decode attention", "memory", r"paged decode|split-KV decode", _decode),
    ("float8 grouped products", "tensor", r"grouped.*(fp8|wgrad)|^DeepGEMM grouped", _grouped),
    ("symmetric product", "tensor", r"symmetric", _symmetric),
    ("linear + cross-entropy", "tensor", r"fused linear.*CE", _linear_loss),
    ("expert layer", "tensor", r"fused.?moe|fused MoE|MoE layer", _layer),
    ("attention forward", "tensor", r"attention fwd(?!\+bwd)", _attention),
    ("attention backward", "tensor", r"attention (bwd|fwd\+bwd)", _attention),
    ("dense products, float8", "tensor", r"fp8.*(gemm|matmul)|gemm.*fp8|GEMM.*fp8", _dense),
    ("dense products, 16 bits", "tensor", r"matmul|dense GEMM", _dense),
)  # fmt: skip
"""Name, what bounds it, the kernels' names, and what they are taken to be."""
