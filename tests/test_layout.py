"""The repository root is the package: what keeps that working."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "cpu", "autotune", "graph", "model", "bench")
# a part may import the parts listed for it, and itself
MAY_IMPORT = {
    "cpu": set(),
    "kernels": {"cpu"},
    "autotune": {"kernels", "cpu"},
    "graph": {"kernels", "cpu"},
    "model": {"graph", "kernels", "cpu"},
    "bench": set(PARTS),
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folders_with_code() -> set[str]:
    found = {"kexaone"}
    for part in PARTS:
        for file in (ROOT / part).rglob("*.py"):
            found.add(".".join(("kexaone", *file.parent.relative_to(ROOT).parts)))
    return found


def test_packages_list_equals_the_tree():
    assert set(SETUPTOOLS["packages"]) == folders_with_code()


def test_data_files_are_packaged():
    patterns = SETUPTOOLS["package-data"]
    assert (ROOT / "py.typed").exists() and "py.typed" in patterns["kexaone"]
    for part in PARTS:
        for file in (ROOT / part).rglob("*"):
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                package = f"kexaone.{part}"
                inside = file.relative_to(ROOT / part)
                assert any(inside.match(p) for p in patterns.get(package, [])), file


def test_parts_have_no_init():
    assert not [part for part in PARTS if (ROOT / part / "__init__.py").exists()]


def imported_parts(file: Path) -> set[str]:
    """Parts of the package that a file imports, at any depth of relative import."""
    package = ("kexaone", *file.parent.relative_to(ROOT).parts)
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split("."))
            names |= {".".join((*(p for p in module if p), alias.name)) for alias in node.names}
    split = [name.split(".") for name in names]
    return {s[1] for s in split if len(s) > 1 and s[0] == "kexaone" and s[1] in PARTS}


def test_imports_point_one_way():
    for part, allowed in MAY_IMPORT.items():
        for file in (ROOT / part).rglob("*.py"):
            assert imported_parts(file) <= allowed | {part}, file


def test_imports_inside_the_package_are_relative():
    for part in PARTS:
        for file in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and not node.level:
                    assert (node.module or "").split(".")[0] != "kexaone", file


def test_import_does_no_work():
    code = (
        "import sys, kexaone; dir(kexaone);"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules), 'imported too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_loading_the_public_names_changes_no_state_of_torch_or_triton():
    code = (
        "import sys, torch, kexaone;"
        "state = lambda: (torch.get_num_threads(), torch.get_default_dtype(),"
        " torch.get_rng_state().sum().item(), torch.are_deterministic_algorithms_enabled(),"
        " torch.get_float32_matmul_precision());"
        "before = state(); [getattr(kexaone, n) for n in kexaone.__all__];"
        "[getattr(kexaone.ops, n) for n in kexaone.ops.__all__];"
        "assert state() == before;"
        "import triton; assert triton.runtime.driver._active is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
