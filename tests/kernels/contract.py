"""The numerics contract, and the inputs every op is tried on.

The oracle is the op's reference in float64. Our error may be twice that of the same maths done
naively in the working dtype (the reference again), plus one unit in the last place of the largest
value: over the whole tensor, and over every slice of the dimension whose slices could go wrong on
their own (experts, heads, rows). A slice of a few elements may be exact by luck in the naive
computation, so it is granted at least the relative error that the naive tensor has as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("contiguous", "row strided", "column strided", "expanded")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values (one row for all, if expanded) with other strides in the last dimensions."""
    if layout == "row strided":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if layout == "column strided":
        wide = x.new_full((*x.shape, 2), float("nan"))
        wide[..., 0] = x
        return wide[..., 0]
    if layout == "expanded" and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**31 - 1)
# nothing, one row, fewer than a tile, more than one tile
row_counts = st.sampled_from([0, 1, 2, 7, 33])
# odd, under, at and over a power of two and a scale block
column_counts = st.sampled_from([2, 7, 64, 100, 128, 129, 300])


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result: a tensor, a tuple or a dataclass, nested."""
    if isinstance(result, Tensor):
        return [result]
    if dataclasses.is_dataclass(result):
        return tensors([getattr(result, f.name) for f in dataclasses.fields(result)])
    return [t for part in result for t in tensors(part)]


def ulp(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at a magnitude."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(largest.clamp(min=info.tiny)))
    return torch.exp2(exponent) * info.eps


def _groups(t: Tensor, by: int | None) -> Tensor:
    """The slices of dimension `by` as rows; one row where there are no such slices."""
    return t.reshape(1, -1) if by is None or t.dim() < 2 else t.movedim(by, 0).flatten(1)


def _size(slices: Tensor) -> Tensor:
    """Root mean square of each row: of a few elements, the largest says little about the others."""
    return slices.double().square().mean(1).sqrt()


def assert_close(ours: Tensor, naive_error: Tensor, oracle: Tensor, by: int | None) -> None:
    """The contract for one tensor, over all of it and over each slice of dimension `by`."""
    assert ours.shape == oracle.shape, f"shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    if ours.numel() == 0:
        return
    assert torch.isfinite(ours).all(), "not finite"
    relative = naive_error.max() / _size(oracle.reshape(1, -1)).clamp(min=1e-300)
    for dimension in {None, by}:
        error, naive, largest = (
            _groups(t.abs(), dimension).amax(1)
            for t in (ours.double() - oracle, naive_error, oracle)
        )
        scaled = (relative * _size(_groups(oracle, dimension))).clamp(max=naive_error.max())
        allowed = 2 * torch.maximum(naive, scaled) + ulp(largest, ours.dtype)
        worst = (error - allowed).argmax()
        assert error[worst] <= allowed[worst], (
            f"slice {int(worst)} of dimension {dimension}: error {error[worst]:.3g}, allowed "
            f"{allowed[worst]:.3g}"
        )


def differentiate(
    function: Callable[..., Any], inputs: Sequence[Tensor], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the gradients of the inputs for random output gradients (same for each dtype)."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = [t for t in tensors(function(*leaves)) if t.is_floating_point()]
    carried = [t for t in outputs if t.requires_grad]
    grads = [normal(*t.shape, seed=seed + i).bfloat16().to(t.dtype) for i, t in enumerate(carried)]
    wanted = [x for x in leaves if x.requires_grad]
    found = torch.autograd.grad(carried, wanted, grads, allow_unused=True)
    pairs = zip(found, wanted, strict=True)
    return [t.detach() for t in outputs], [
        torch.zeros_like(w) if g is None else g for g, w in pairs
    ]


def neighbour(x: Tensor, seed: int) -> Tensor:
    """`x` times one factor between 1 and 1.03, every element rounded up or down."""
    if not x.is_floating_point():
        return x
    drawn = generator(seed)
    step = torch.randint(-1, 2, x.shape, generator=drawn) * torch.finfo(x.dtype).eps
    factor = 1 + torch.rand((), generator=drawn, dtype=torch.float64) / 32
    return (x.double() * (1 + step) * factor).to(x.dtype)


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    by: int | None = 0,
    gradients: bool = True,
    seed: int = 0,
) -> None:
    """Forward and gradients of an op under the contract.

    The error of the naive computation is the largest over a few inputs a little apart: a single one
    may be exact by luck, and the fewer its elements, the more likely it is.
    """

    def run(f: Callable[..., Any], x: Sequence[Tensor]) -> list[Tensor]:
        if not gradients:
            return tensors(f(*x))
        outputs, grads = differentiate(f, x, seed)
        return outputs + grads

    def wide(x: Sequence[Tensor]) -> list[Tensor]:
        return [t.double() if t.is_floating_point() else t for t in x]

    ours, oracle = run(function, inputs), run(reference, wide(inputs))
    errors = [torch.zeros_like(t) for t in oracle]
    for k in range(4 if sum(t.numel() for t in oracle) > 4096 else 16):
        near = [neighbour(x, 9 * k + i) for i, x in enumerate(inputs)] if k else list(inputs)
        naive, exact = run(reference, near), run(reference, wide(near))
        errors = [torch.maximum(e, (n.double() - x).abs())
                  for e, n, x in zip(errors, naive, exact, strict=True)]  # fmt: skip
        if k == 0:
            assert [t.dtype for t in ours] == [t.dtype for t in naive]
    for mine, error, exact in zip(ours, errors, oracle, strict=True):
        assert_close(mine, error, exact, by)


def check_compiled(
    function: Callable[..., Any],
    inputs: Callable[[int], Sequence[Tensor]],
    *,
    sizes: Sequence[int],
) -> None:
    """One dynamic graph without a break, forward and backward, for inputs of several sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for size in sizes:
        data = inputs(size)
        assert same_bits(differentiate(compiled, data, 1), differentiate(function, data, 1))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], f"compiled again: {graphs} graphs after each size"


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results have the same bits; any NaN equals any other."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(
        x.shape == y.shape and x.dtype == y.dtype
        and bool(((x.float() == y.float()) | (x.float().isnan() & y.float().isnan())).all())
        if x.is_floating_point() else torch.equal(x, y)
        for x, y in pairs
    )  # fmt: skip
