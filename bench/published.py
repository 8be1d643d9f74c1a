"""Predicting kernels that others have measured: `kexaone bench --predict FILE`.

The file is a table with the columns source, kernel, gpu, dtype, shape, metric, value, notes, where
notes begin with a tier: A for times of a kernel alone with its exact shape and GPU. Each kernel is
put down to a family by its name, and its time predicted from its shape by the family's `Work` and
the description of the GPU. Rows that no family describes are counted and left out.

Errors are relative to the published time and reported for each family. They are given with the
descriptions' priors, and again after the few rows in `CALIBRATION` have set one factor each; those
rows do not count in the errors.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..autotune.model import Machine, machines, predict
from .published_kernels import FAMILIES, Builder, Described, Published

COLUMNS = ("source", "kernel", "gpu", "dtype", "shape", "metric", "value", "notes")
_GPUS = (
    ("h100-pcie", "h100-pcie"), ("h100", "h100-sxm"), ("h800", "h800"), ("h200", "h200"),
    ("a100", "a100-sxm"), ("b200", "b200"), ("mi300", "mi300x"), ("mi355", "mi355x"),
    ("l40s", "l40s"), ("4090", "rtx4090"), ("pro 6000", "rtx-pro-6000"),
    ("pro-6000", "rtx-pro-6000"),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One row with both predictions in microseconds; `calibrates` names the factor it set."""

    row: Published
    family: str
    bound: str
    published: float
    prior: float
    calibrated: float
    calibrates: str = ""


def read(path: Path) -> list[Published]:
    """The rows of a file. Raises ValueError where it is none of these tables."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if missing := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {missing[0]!r}")
        found = []
        for line in reader:
            tier = re.search(r"tier=(\w)", line["notes"] or "")
            try:
                value = float(line["value"])
            except (TypeError, ValueError):
                raise ValueError(f"{path}: {line['value']!r} is no number") from None
            found.append(Published(
                line["source"], line["kernel"], line["gpu"], line["dtype"], sizes_of(line["shape"]),
                line["metric"], value, tier[1] if tier else "C", line["notes"],
            ))  # fmt: skip
    return found


def sizes_of(shape: str) -> dict[str, float]:
    """Sizes by name, from `M=64;N=2112`, `M=N=K=1024` or `2048x2048x2048`."""
    found: dict[str, float] = {}
    if product := re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape.strip()):
        return dict(zip("MNK", map(float, product.groups()), strict=True))
    for part in re.split(r"[;,]", shape):
        *names, value = part.split("=")
        number = re.match(r"\s*(\d+(?:\.\d+)?)", value)
        if number:
            found.update({name.strip(): float(number[1]) for name in names})
    return found


def machine_of(gpu: str) -> str | None:
    """The described machine that a GPU's name means."""
    return next((name for part, name in _GPUS if part in gpu.lower()), None)


CALIBRATION: tuple[tuple[str, str, dict[str, float], str], ...] = (
    ("RMSNorm fwd [QuACK (CuTe-DSL)]", "gbps", {"M": 32768, "N": 4096}, "memory"),
    ("fp16 matmul [TileLang]", "tflops", {"M": 8192, "N": 8192, "K": 16384}, "matrix"),
    ("router softmax topk [Triton]", "us", {"T": 1, "E": 128, "topk": 8}, "launch_us"),
)
"""Rows that set one factor each, for every GPU with the chip that they were measured on."""
_SAME_CHIP = ("h100-sxm", "h800")
_EVENTS = r"quack|liger|pytorch/ao|tilelang|tritonbench"
"""Sources that time by events around a launch; others take a kernel's own time or a graph's."""
_EVENTS_US = 3.0
"""What events around a launch measure of an empty kernel, beyond its own duration: a prior."""


def published_us(row: Published, described: Described) -> float | None:
    """The published time; None for a metric that is no time, rate or throughput."""
    if row.metric in ("us", "ms"):
        return row.value * (1e3 if row.metric == "ms" else 1.0)
    if row.metric == "tflops" and described.flops:
        return described.flops / row.value * 1e-6
    if row.metric == "gbps" and described.bytes:
        return described.bytes / row.value * 1e-3
    return None


def family_of(kernel: str) -> tuple[str, str, Builder] | None:
    for name, bound, pattern, builder in FAMILIES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name, bound, builder
    return None


def predicted_us(row: Published, builder: Builder, machine: Machine) -> float:
    """The model's time of a row, by the way in which its source takes times."""
    timer = _EVENTS_US if re.search(_EVENTS, row.source, re.IGNORECASE) else 0.0
    return timer + sum(predict(w, machine).us for w in builder(row, machine).works)


def calibrate(found: Sequence[Published], machine: Machine) -> tuple[Machine, dict[int, str]]:
    """A machine with the factors of the calibration rows, and those rows by position."""
    used: dict[int, str] = {}
    for kernel, metric, sizes, factor in CALIBRATION:
        for index, row in enumerate(found):
            named = machine_of(row.gpu) in _SAME_CHIP
            if (row.kernel, row.metric, row.sizes) == (kernel, metric, sizes) and named:
                machine = _solved(row, machine, factor)
                used[index] = factor
    return machine, used


def _solved(row: Published, machine: Machine, factor: str) -> Machine:
    """The machine whose prediction of a row is its published time, by halving an interval."""
    family = family_of(row.kernel)
    assert family is not None
    goal = published_us(row, family[2](row, machine))
    assert goal is not None
    slower, faster = (0.3, 1.0) if factor in machine.efficiency else (20.0, 0.1)
    for _ in range(40):
        middle = (slower + faster) / 2
        us = predicted_us(row, family[2], machine.calibrated(**{factor: middle}))
        slower, faster = (middle, faster) if us > goal else (slower, middle)
    return machine.calibrated(**{factor: (slower + faster) / 2})


def evaluate(found: Sequence[Published]) -> tuple[list[Result], int]:
    """Predictions of all rows that a family describes, and how many there are besides."""
    known = machines()
    set_up, used = calibrate(found, known["h100-sxm"])
    factors = {**set_up.efficiency, "launch_us": set_up.launch_us}
    results, left = [], 0
    for index, row in enumerate(found):
        name, family = machine_of(row.gpu), family_of(row.kernel)
        try:
            if name is None or family is None:
                raise KeyError
            machine = known[name]
            described = family[2](row, machine)
            published = published_us(row, described)
            if published is None:
                raise KeyError
        except (KeyError, ValueError):
            left += 1
            continue
        fitted = machine.calibrated(**factors) if name in _SAME_CHIP else machine
        results.append(Result(
            row, family[0], family[1], published, predicted_us(row, family[2], machine),
            predicted_us(row, family[2], fitted), used.get(index, ""),
        ))  # fmt: skip
    return results, left


@dataclass(frozen=True)
class Summary:
    """Median absolute relative errors of a family's rows of one tier, and their number."""

    family: str
    bound: str
    tier: str
    rows: int
    prior: float
    calibrated: float
    worst: float


def summaries(results: Sequence[Result]) -> list[Summary]:
    """One per family and tier (A, or B and C together), without the rows used to calibrate."""
    found = []
    for family, bound, _, _ in FAMILIES:
        for tier in ("A", "BC"):
            mine = [r for r in results
                    if r.family == family and r.row.tier in tier and not r.calibrates]  # fmt: skip
            if mine:
                errors = [
                    [abs(r.prior / r.published - 1) for r in mine],
                    [abs(r.calibrated / r.published - 1) for r in mine],
                ]
                found.append(Summary(family, bound, tier, len(mine), statistics.median(errors[0]),
                                     statistics.median(errors[1]), max(errors[1])))  # fmt: skip
    return found
