"""The plug-in: light and silent until asked, harmless when broken, scoped when active."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import kexaone

ROOT = Path(__file__).parents[2]


def run(code: str, **variables: str) -> str:
    """Run Python in a fresh process and return what it prints."""
    keep = {k: v for k, v in os.environ.items() if k not in ("KEXAONE_CPU", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                          text=True, env={**keep, **variables})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_triton_loads_nothing_heavy_through_the_plugin():
    out = run(
        "import triton, sys;"
        "assert 'cpu' in triton.backends.backends;"
        "print([m for m in sys.modules if m.startswith('kexaone')"
        " and m.rsplit('.', 1)[-1] in ('emitter', 'launch', 'stages', 'target', 'parser')],"
        " 'torch' in sys.modules)"
    )
    assert out == "[] False"


def test_installed_but_inactive_changes_nothing():
    out = run(
        "import triton, torch\n"
        "print(triton.backends.backends['cpu'].driver.is_active())\n"
        "try:\n triton.runtime.driver.active\n print('active')\n"
        "except RuntimeError as error:\n print(str(error)[:16])\n"
        "import kexaone\n"
        "print(triton.runtime.driver._active)\n"
        "f = torch.compile(lambda x: (x * 2).sum())\n"
        "print(f(torch.ones(8)).item())"
    )
    expected = "False\n0 active drivers\nNone\n16.0"
    assert torch.cuda.is_available() or out == expected


@pytest.mark.parametrize("variables", [{"KEXAONE_CPU": "1"}, {"TRITON_DEFAULT_BACKEND": "cpu"}])
def test_environment_variables_activate(variables):
    out = run("import triton; print(type(triton.runtime.driver.active).__name__)", **variables)
    assert torch.cuda.is_available() or out == "CpuDriver"


def test_the_modules_that_triton_imports_do_no_work():
    """Only imports, definitions and constants at module level: nothing there can fail."""
    import ast

    for name in ("compiler.py", "driver.py"):
        tree = ast.parse((ROOT / "cpu" / name).read_text())
        for node in tree.body:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef,
                                     ast.Assign, ast.Expr)), ast.dump(node)  # fmt: skip
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] in (*sys.stdlib_module_names, "triton"), module
            if isinstance(node, (ast.Assign, ast.Expr)):
                calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
                assert not calls, f"{name}:{node.lineno} calls something"


def test_a_missing_compiler_is_found_only_at_the_first_kernel(tmp_path):
    out = run("import triton; print('imported')", PATH=str(tmp_path), KEXAONE_CPU="1")
    assert out == "imported"


@triton.jit
def double_kernel(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def test_scopes_nest_and_restore():
    driver = triton.runtime.driver
    outside = driver._active  # the proxy of the fixture's scope
    with kexaone.cpu.active(), kexaone.cpu.active():
        assert driver.active.get_current_target().backend == "cpu"
        assert driver._active is outside
    assert driver._active is outside


def test_leaving_the_last_scope_gives_the_former_driver_back():
    out = run(
        "import kexaone, triton\n"
        "with kexaone.cpu.active(): print(triton.runtime.driver.active.get_current_device())\n"
        "try: triton.runtime.driver.active.get_current_device()\n"
        "except RuntimeError as error: print(error)"
    )
    assert out.startswith("-1\n0 active drivers")


def test_a_kernel_collected_outside_every_scope_reaches_no_other_driver(tmp_path):
    """Triton unloads a kernel through whatever driver is active when it is collected."""
    (tmp_path / "kernels.py").write_text(
        "import triton, triton.language as tl\n@triton.jit\ndef one(x): tl.store(x, 1.0)\n"
    )
    code = (
        "import kexaone, torch, kernels\n"
        "x = torch.zeros(1)\n"
        "with kexaone.cpu.active(): kernels.one[(1,)](x)\n"
        "del kernels.one; import gc; gc.collect(); print(int(x))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("1", "")


def test_threads_outside_the_scope_do_not_see_it():
    found = []

    def look() -> None:
        try:
            found.append(triton.runtime.driver.active.get_current_target().backend)
        except RuntimeError as error:
            found.append(str(error)[:16])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found[0] in ("0 active drivers", "cuda", "hip")


def test_threads_inside_launch_together():
    def work(x: torch.Tensor) -> None:
        with kexaone.cpu.active():
            double_kernel[(8,)](x, 1000, BLOCK=128)

    tensors = [torch.full((1000,), float(k)) for k in range(6)]
    threads = [threading.Thread(target=work, args=(t,)) for t in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((t == 2.0 * k).all() for k, t in enumerate(tensors))


def test_tensors_of_another_device_are_refused():
    with pytest.raises(ValueError, match="argument 0 is not in host memory"):
        double_kernel[(1,)](torch.empty(8, device="meta"), 8, BLOCK=8)


def test_empty_grids_and_empty_tensors():
    x = torch.ones(4)
    double_kernel[(0,)](x, 4, BLOCK=4)
    assert (x == 1).all()
    double_kernel[(1,)](torch.empty(0), 0, BLOCK=4)


def test_autotune_heuristics_warmup_and_benchmark():
    @triton.autotune([triton.Config({"BLOCK": b}) for b in (64, 256)], key=["n"],
                     restore_value=["x"])  # fmt: skip
    @triton.heuristics({"EXTRA": lambda args: args["n"] % 2})
    @triton.jit
    def kernel(x, n, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(x + at, mask=at < n) + 1 + EXTRA, mask=at < n)

    x = torch.zeros(777)
    kernel[lambda meta: (triton.cdiv(777, meta["BLOCK"]),)](x, 777)
    assert (x == 2).all() and kernel.best_config.kwargs["BLOCK"] in (64, 256)
    compiled = double_kernel.warmup(torch.float32, 64, BLOCK=64, grid=(1,))
    assert {"ttir", "cpp", "so"} <= set(compiled.asm)
    time = triton.testing.do_bench(lambda: double_kernel[(1,)](x, 64, BLOCK=64), warmup=1, rep=2)
    assert time > 0


def test_the_key_covers_sources_compiler_and_instruction_set(monkeypatch):
    from kexaone.cpu import target

    first = target.build_key()
    monkeypatch.setattr(target, "host_isa", lambda: target.Isa("another", 16, ()))
    assert target.build_key() != first
    assert target.host_compiler().version in first and target.plugin_digest() in first


@pytest.mark.parametrize(
    ("machine", "features", "name", "size"),
    [
        ("x86_64", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}, "avx512", 64),
        ("x86_64", {"avx2", "fma", "f16c"}, "avx2", 32),
        ("x86_64", {"avx2"}, "baseline", 16),
        ("x86_64", set(), "baseline", 16),
        ("aarch64", {"asimd"}, "neon", 16),
        ("aarch64", {"asimd", "atomics", "bf16"}, "neon", 16),
    ],
)
def test_instruction_sets(machine, features, name, size):
    from kexaone.cpu.target import choose_isa

    isa = choose_isa(machine, frozenset(features))
    assert (isa.name, isa.vector_bytes) == (name, size)


def run_tests(*names: str, **variables: str) -> None:
    """Test files of this folder in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         *(str(ROOT / "tests" / "cpu" / f"test_{name}.py") for name in names)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets_compute_the_same(isa):
    run_tests("tutorials", KEXAONE_CPU_ISA=isa)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [{"KEXAONE_CPU_ISA": "avx2"}, {"KEXAONE_CPU_ISA": "baseline"}, {"CXX": "clang++"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["casts", "control", "dot", "elementwise", "memory", "tiles"])
def test_values_on_every_instruction_set_and_compiler(name, setting):
    if shutil.which(setting.get("CXX", "g++")) is None:
        pytest.skip("clang++ is not installed")
    run_tests(name, **setting)


_SUMS = """
import torch, triton, triton.language as tl
@triton.jit
def sums(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * n + at, mask=at < n, other=0.0)
    tl.store(out + 2 * tl.program_id(0), tl.sum(value, 0))
    tl.store(out + 2 * tl.program_id(0) + 1, tl.sum(value.to(tl.float64), 0).to(tl.float32))
"""


def test_sums_have_the_same_bits_on_every_instruction_set_and_when_checked(tmp_path):
    """Rows that differ in their last bits when added in another order."""
    (tmp_path / "sums_kernel.py").write_text(_SUMS)
    code = (
        "from sums_kernel import *\n"
        "x, out = torch.randn(50, 700, generator=torch.Generator().manual_seed(0)), "
        "torch.empty(50, 2)\n"
        "for block in (1024, 8): sums[(50,)](x, out, min(block, 700), BLOCK=block); "
        "print(out.flatten().view(torch.int32).tolist())"
    )
    settings: list[dict[str, str]] = [{}, {"KEXAONE_CPU_ISA": "avx2"},
                                      {"KEXAONE_CPU_ISA": "baseline"},
                                      {"KEXAONE_CPU_CHECKED": "1"}]  # fmt: skip
    found = {run(code, KEXAONE_CPU="1", PYTHONPATH=str(tmp_path), **s) for s in settings}
    assert len(found) == 1
