"""Ours against public kernels for the same job: no worse in spills, occupancy and traffic."""

from __future__ import annotations

import pytest

from kexaone.bench.audit_peers import compare
from kexaone.kernels.arch import ARCHS


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ARCHS if t != "sm_90")]
)
def test_ours_is_no_worse(target):
    pytest.importorskip("liger_kernel")
    pytest.importorskip("fla")
    for job, reports in compare(ARCHS[target]):
        ours = reports.pop("ours")
        for whose, other in reports.items():
            assert ours.code.spilled <= other.code.spilled, (job, whose)
            assert ours.moved_per_useful <= other.moved_per_useful + 0.01, (job, whose)
            # Liger's SwiGLU overwrites its inputs and holds fewer addresses
            if job != "swiglu backward":
                assert ours.occupancy >= other.occupancy, (job, whose)
