"""`kexaone audit`: the gate on the shipped defaults, exit codes, and bad input."""

from __future__ import annotations

import json

import pytest

from kexaone.autotune.audit import audit, subjects
from kexaone.autotune.cases import CASES
from kexaone.kernels.arch import ARCHS
from kexaone.kernels.rmsnorm import Config
from kexaone.kernels.tables import use

from ..command_line import run_command

OPS = sorted({case.op for case in CASES})
MODULE = "kernels_to_audit"
COPY = (f"{MODULE}:copy", "--arg", "x=*fp32:16", "--arg", "y=*fp32", "--const", "BLOCK=1024")


def gate(target, ops):
    """Every default passes, and every kernel could be followed through its source."""
    arch = ARCHS[target]
    found = [s for case in CASES if case.op in ops for s in subjects(case, arch)]
    reports = list(audit(found))
    assert reports or target == "sm_80"
    wrong = [f"{r.op} {r.problem} {r.kernel}: {p}" for r in reports for p in r.problems]
    assert not wrong, "\n".join(wrong)
    return reports


def test_norms_are_fit_to_ship():
    reports = gate("sm_90", {"rms_norm", "add_rms_norm", "rms_norm_fp8"})
    for report in reports:
        assert report.code.spilled == 0
        assert report.exact and report.instructions_per_kib
        # a row's weight comes on top, and a second pass where rows do not fit in registers
        assert report.moved_per_useful <= 2.01
        assert {w.bytes for w in report.widths if w.possible} == {16}
        assert any(w.possible for w in report.widths)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ARCHS)
def test_every_default_is_fit_to_ship(target, op):
    gate(target, {op})


def run(monkeypatch, capsys, *arguments):
    return run_command(monkeypatch, capsys, "audit", *arguments)


def test_amd_default_and_json(monkeypatch, capsys, tmp_path):
    path = tmp_path / "audit.json"
    code, out, _ = run(monkeypatch, capsys, "--target", "gfx942", "--op", "add_rms_norm",
                       "--json", str(path))  # fmt: skip
    assert code == 0 and "2 of 2 kernels pass" in out
    found = json.loads(path.read_text())
    assert found["failures"] == 0 and len(found["reports"]) == 2
    # written beside and moved: nothing is left
    assert list(tmp_path.iterdir()) == [path]
    first = found["reports"][0]
    assert first["target"] == "gfx942" and first["code"]["memory"]["load"] == {"16": 3}
    assert first["moved_per_useful"] == pytest.approx(1.25, abs=0.01)


def test_a_default_that_spills_fails(monkeypatch, capsys):
    # 256 elements of a row in each thread
    with use("rms_norm", Config(8192, 1, 108, 1)):
        code, out, _ = run(monkeypatch, capsys, "--target", "sm_80", "--op", "rms_norm")
    assert code == 1 and "spills" in out


def test_own_kernel_passes(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, *COPY, "--arg", "n=1048576", "--grid", "1024",
                       "--useful-bytes", "8388608", "--target", "sm_80")  # fmt: skip
    assert code == 0 and "1 of 1 kernels pass" in out
    assert out.splitlines()[2].split()[-1] == "1.00"


def test_own_kernel_that_lost_its_wide_accesses(monkeypatch, capsys):
    # the bound of the mask is not known to be a multiple of 16
    code, out, _ = run(monkeypatch, capsys, *COPY, "--arg", "n=i32", "--target", "sm_80")
    assert code == 1 and "x is loaded by 4 bytes" in out and "y is stored by 4 bytes" in out


def test_own_kernel_that_spills(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, f"{MODULE}:crowded", "--arg", "x=*fp32", "--arg",
                       "y=*fp32", "--const", "BLOCK=32768", "--target", "sm_90")  # fmt: skip
    assert code == 1 and "spills" in out


def test_own_kernel_that_does_not_compile(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, f"{MODULE}:broken", "--arg", "x=*fp32",
                       "--target", "sm_90")  # fmt: skip
    assert code == 1 and "does not compile: " in out and "no_such_name" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm_91"), "no target 'sm_91'; there are sm_80"),
        (("--op", "layer_norm"), "no op 'layer_norm'; there are "),
        (("no_such_module:kernel",), "cannot import no_such_module"),
        (("no_such_file.py:kernel",), "no such file: no_such_file.py"),
        ((f"{MODULE}:missing",), "no @triton.jit kernel 'missing'"),
        (("json:dumps",), "no @triton.jit kernel 'dumps'"),
        ((MODULE,), "name a kernel as module:function"),
        (COPY, "parameter n needs --arg n=..."),
        ((*COPY, "--arg", "n=i31"), "'i31' is neither a number nor a type"),
        ((*COPY, "--arg", "n"), "--arg takes NAME=VALUE, got 'n'"),
        ((*COPY, "--arg", "n=1", "--arg", "n=2"), "--arg n is given twice"),
        ((*COPY, "--arg", "n=1", "--arg", "m=2"), "has no parameter m; it has x, y, n, BLOCK"),
        ((*COPY, "--arg", "n=1", "--arg", "BLOCK=2"), "BLOCK needs --const BLOCK=..."),
        ((*COPY, "--arg", "n=1", "--grid", "0"), "--grid takes one to three positive numbers"),
        ((*COPY, "--op", "rms_norm"), "give either a kernel or --op"),
        (("--arg", "n=1"), "describe a kernel of your own"),
        (("--json", "/no/such/folder/out.json"), "cannot write /no/such/folder/out.json"),
        (("--workers", "-1"), "must not be negative"),
    ],
)
def test_bad_input_is_one_line_and_code_2(monkeypatch, capsys, arguments, message):
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
