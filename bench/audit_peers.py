"""Our kernels and public ones for the same job, compiled and judged side by side.

    python -m kexaone.bench.audit_peers [sm_90 ...]

Public are Liger Kernel, flash-linear-attention and torchao, from their installed packages, launched
as their own functions do, at the shapes of the 236B model in bfloat16 and float8. No GPU is needed.
What multiplies matrices is in `peer_products.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import ops
from ..autotune.audit import Report, Subject, audit
from ..autotune.capture import capture
from ..autotune.cases import WIDTH, Builder, H, T, train
from ..kernels.arch import ARCHS, Arch
from . import peer_products as products

Call = Callable[[Arch, Builder], Any]


def floats(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _liger_forward(_: Arch, __: Builder) -> None:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    rms_norm_forward(floats(T, H), floats(H), 1e-5, 0.0, "llama", None)


def _liger_add_forward(_: Arch, __: Builder) -> None:
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    fused_add_rms_norm_forward(floats(T, H), floats(T, H), floats(H), 1e-5, 0.0, "llama")


def _liger_backward(arch: Arch, _: Builder) -> None:
    """Liger asks the device for its processors, which meta tensors have not: its launch again."""
    from liger_kernel.ops import rms_norm
    from liger_kernel.ops.utils import calculate_settings

    block, warps = calculate_settings(H)
    rows, out, x, weight = floats(T, H), floats(T, H), floats(T, H), floats(H)
    rstd, partial = (floats(*s, dtype=torch.float32) for s in ((T,), (arch.processors, H)))
    kernel: Any = rms_norm._rms_norm_backward_kernel
    kernel[(arch.processors,)](
        rows, H, out, H, x, H, rms_norm.torch_to_triton_dtype[x.dtype], weight, 1, rstd, 1,
        partial, H, T, H, 0.0, math.ceil(T / arch.processors), rms_norm._CASTING_MODE_LLAMA.value,
        elementwise_affine=True, BLOCK_SIZE=block, COMPUTE_DW=True, num_warps=warps,
    )  # fmt: skip


def _fla_forward(_: Arch, __: Builder) -> None:
    from fla.modules.norm.layernorm_gated import layer_norm_fwd

    bias: Any = None
    layer_norm_fwd(floats(T, H), floats(H), bias, 1e-5, is_rms_norm=True)


def _fla_backward(arch: Arch, _: Builder) -> None:
    from fla.modules.norm import layernorm_gated

    rstd = floats(T, dtype=torch.float32)
    absent: Any = None
    with mock.patch.object(layernorm_gated, "get_multiprocessor_count", lambda _: arch.processors):
        layernorm_gated.layer_norm_bwd(
            floats(T, H), floats(T, H), floats(H), absent, 1e-5, absent, rstd, is_rms_norm=True
        )


def _liger_swiglu(_: Arch, __: Builder) -> None:
    from liger_kernel.ops.swiglu import swiglu_forward

    swiglu_forward(floats(T, WIDTH), floats(T, WIDTH))


def _liger_swiglu_backward(_: Arch, __: Builder) -> None:
    from liger_kernel.ops.swiglu import swiglu_backward

    swiglu_backward(floats(T, WIDTH), floats(T, WIDTH), floats(T, WIDTH))


def _norm(_: Arch, __: Builder) -> None:
    train(ops.rms_norm(floats(T, H, grad=True), floats(H, grad=True)))


def _add_norm(_: Arch, __: Builder) -> None:
    ops.add_rms_norm(floats(T, H), floats(T, H), floats(H))


def _swiglu(_: Arch, __: Builder) -> None:
    train(ops.swiglu(floats(T, WIDTH, grad=True), floats(T, WIDTH, grad=True)))


@dataclass(frozen=True)
class Job:
    """`launch` is which of our launches does it, `other` which of each of the others'.

    `fp8`: only where the type exists.
    """

    name: str
    ours: Call
    launch: int
    others: dict[str, Call]
    other: int = 0
    fp8: bool = False


JOBS = (
    Job("rms_norm forward", _norm, 0, {"liger": _liger_forward, "fla": _fla_forward}),
    Job("rms_norm backward", _norm, 1, {"liger": _liger_backward, "fla": _fla_backward}),
    Job("add_rms_norm forward", _add_norm, 0, {"liger": _liger_add_forward}),
    Job("swiglu forward", _swiglu, 0, {"liger": _liger_swiglu}),
    Job("swiglu backward", _swiglu, 1, {"liger": _liger_swiglu_backward}),
    Job("moe_experts gate and up", products.experts, 0, {"liger": products.liger_up}),
    Job("moe_experts down", products.experts, 1, {"liger": products.liger_down}),
    Job("moe_experts weight gradient", products.experts, 6, {"liger": products.liger_weight}),
    Job("attention forward", products.attention, 0, {"fla": products.fla_forward}),
    Job("attention backward, queries", products.attention, 1, {"fla": products.fla_backward}, 1),
    Job("attention backward, keys", products.attention, 2, {"fla": products.fla_backward}, 2),
    Job("linear_fp8", products.linear_fp8, 0, {"torchao": products.torchao_linear}, fp8=True),
    Job("weight_gradient_fp8", products.weight_fp8, 0, {"torchao": products.torchao_weight},
        fp8=True),
)  # fmt: skip


def compare(arch: Arch, jobs: Sequence[Job] = JOBS) -> Iterator[tuple[str, dict[str, Report]]]:
    """For each job the reports by whose kernel it is: ours, liger, fla, torchao."""
    subjects, places = [], []
    for job in jobs:
        if job.fp8 and not arch.fp8:
            continue
        for name, call in {"ours": job.ours, **job.others}.items():
            builder = Builder()
            launches = capture(lambda call=call, b=builder: call(arch, b), arch)
            launch = launches[job.launch if name == "ours" else job.other]
            subjects.append(Subject(job.name, name, launch, arch, builder.contents))
            places.append((job.name, name))
    found: dict[str, dict[str, Report]] = {}
    for (job, name), report in zip(places, audit(subjects), strict=True):
        found.setdefault(job, {})[name] = report
    yield from found.items()


def main() -> None:
    """Print the comparison for the targets on the command line, sm_90 if none."""
    console = Console(width=170)
    for name in sys.argv[1:] or ["sm_90"]:
        columns = (
            "job",
            "whose",
            "warps",
            "regs",
            "spill",
            "smem",
            "occupancy",
            "instr/KiB",
            "instr/kflop",
            "mma/Mflop",
            "mma work",
            "moved",
        )
        table = Table(*columns, title=name, box=None)
        for job, reports in compare(ARCHS[name]):
            for whose, report in reports.items():
                code = report.code
                if code is None:
                    table.add_row(job, whose, *report.problems)
                    continue

                def text(value: float | None, digits: int) -> str:
                    return "-" if value is None else f"{value:.{digits}f}"

                table.add_row(
                    job, whose, str(code.warps), str(code.registers), str(code.spilled),
                    str(code.shared), f"{report.occupancy:.0%}",
                    text(report.instructions_per_kib, 0),
                    text(report.instructions_per_kiloflop, 2),
                    text(report.mma_per_megaflop, 1), text(report.mma_work, 2),
                    text(report.moved_per_useful, 3),
                )  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    main()
