"""Ours against public kernels for the same job: no worse in spills, occupancy, traffic and work."""

from __future__ import annotations

import pytest

from kexaone.bench.audit_peers import JOBS, compare
from kexaone.kernels.arch import ARCHS

PACKAGES = ("liger_kernel", "fla", "torchao")
# Liger's overwrites its inputs and holds fewer addresses
OCCUPANCY = {"swiglu backward"}
# rows carry their scales beside each other: a block's are a sector each, of which the next seven
# blocks use the rest from the cache
SECTORS = {"linear_fp8"}
# 128 sectors of 32 bytes beside two tiles of 128 x 128
MOST_IN_SECTORS = 1.01 + 128 * 32 / (2 * 128 * 128)
jobs = pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)


def moved(report):
    """Bytes it requests: what it was given may be larger than the job needs."""
    return report.moved_per_useful * report.useful_bytes


def check(target, job):
    for package in PACKAGES:
        pytest.importorskip(package)
    for name, reports in compare(ARCHS[target], [job]):
        ours = reports.pop("ours")
        assert ours.code is not None and not ours.problems, (name, ours.problems)
        assert ours.exact
        for whose, other in reports.items():
            assert other.code is not None, (whose, other.problems)
            assert ours.code.spilled <= other.code.spilled, (name, whose)
            most = MOST_IN_SECTORS if name in SECTORS else 1.01
            per_byte = ours.moved_per_useful <= other.moved_per_useful + 0.01
            assert per_byte or moved(ours) <= most * moved(other), (name, whose)
            if ours.code.mma:
                assert ours.mma_work is None or ours.mma_work <= 1.01 * (other.mma_work or 1), whose
                # larger instructions need more registers: no merit where they are spilled
                fewer = ours.mma_per_megaflop <= 1.01 * other.mma_per_megaflop
                assert fewer or other.code.spilled, (name, whose)
            elif name not in OCCUPANCY:
                assert ours.occupancy >= other.occupancy, (name, whose)


@jobs
def test_ours_is_no_worse(job):
    check("sm_90", job)


@pytest.mark.slow
@pytest.mark.parametrize("target", [name for name in ARCHS if name != "sm_90"])
@jobs
def test_ours_is_no_worse_elsewhere(target, job):
    check(target, job)
