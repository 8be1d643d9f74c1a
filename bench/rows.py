"""Measuring one job: correctness first, then forward and backward against every peer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .measure import Run, Timing, alternate, copy_run
from .registry import Function, Job

# how far apart two bfloat16 computations of one thing may be, relative to the result's size
TOLERANCE = 0.05


@dataclass(frozen=True)
class Row:
    """One line of the report; times in milliseconds, `ratio` above 1 where ours is faster.

    `bandwidth` is the part of a plain copy's rate that the bytes this task needs move at, `compute`
    the part of the library's matrix product rate.
    """

    op: str
    direction: str
    ours: Timing
    peers: dict[str, Timing]
    best_peer: str
    ratio: float
    gigabytes_per_second: float
    bandwidth: float
    compute: float
    error: float


def measure(name: str, job: Job, *, seconds: float, matmul_flops: float) -> Iterator[Row]:
    """The rows of a job: forward, and backward where it has one.

    Raises:
        ValueError: our result differs from a peer's by more than rounding.
    """
    directions = ["forward", *(["backward"] if job.bytes_backward else [])]
    for direction in directions:
        backward = direction == "backward"
        left_out = job.forward_only if backward else frozenset()
        peers = {k: f for k, f in job.peers.items() if k not in left_out}
        runs = {"ours": job.ours, **peers}
        prepared = {k: _prepare(f, job.inputs, backward) for k, f in runs.items()}
        error = _disagreement(name, {k: run() for k, run in prepared.items()})
        size = job.bytes_backward if backward else job.bytes_forward
        prepared["copy"] = copy_run(size, job.inputs[0].device)
        times = alternate(prepared, seconds=seconds)
        ours, copy = times.pop("ours"), times.pop("copy")
        best = min(times, key=lambda k: times[k].median)
        flops = job.flops * (2 if backward else 1)
        yield Row(
            name, direction, ours, times, best, times[best].median / ours.median,
            size / ours.median / 1e6, copy.median / ours.median,
            flops / ours.median * 1e3 / matmul_flops, error,
        )  # fmt: skip


def _prepare(function: Function, inputs: Any, backward: bool) -> Run:
    """A call without arguments that does only what is to be timed."""
    if not backward:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return tensors(function(*inputs))

        return forward
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = [t for t in tensors(function(*leaves)) if t.requires_grad]
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    wanted = [x for x in leaves if x.requires_grad]
    return lambda: list(torch.autograd.grad(outputs, wanted, grads, retain_graph=True))


def tensors(result: Any) -> list[Tensor]:
    """The floating-point tensors of a result: a tensor, a tuple or a dataclass, nested."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if dataclasses.is_dataclass(result):
        return tensors([getattr(result, f.name) for f in dataclasses.fields(result)])
    return [t for part in result for t in tensors(part)]


def _disagreement(name: str, results: dict[str, list[Tensor]]) -> float:
    """The largest relative distance between our result and a peer's."""
    ours, worst = results.pop("ours"), 0.0
    for peer, theirs in results.items():
        for a, b in zip(ours, theirs, strict=False):
            a, b = a.double(), b.double()
            distance = float((a - b).norm() / b.norm().clamp(min=1e-30))
            if not distance <= TOLERANCE:
                raise ValueError(f"{name} differs from {peer} by {distance:.3g} of its size")
            worst = max(worst, distance)
    return worst
