"""What goes wrong around a compilation: killed processes, damaged files, full disks."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kexaone.cpu.store import is_whole

KERNEL = """
import sys
import torch, triton, triton.language as tl
@triton.jit
def addition(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))
x, y, out = torch.arange(64.0), torch.full((64,), 2.0), torch.empty(64)
addition[(1,)](x, y, out, BLOCK=64)
print(bool((out == x + 2).all()))
"""


class Work:
    """A folder with a kernel, its own cache and the processes that run it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        (folder / "work.py").write_text(KERNEL)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        given = {"KEXAONE_CPU": "1", "TRITON_CACHE_DIR": str(self.cache), **variables}
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", str(self.folder / "work.py")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **given},
        )  # fmt: skip

    def runs(self, **variables: str) -> None:
        process = self.start(**variables)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, "True"), err

    def fails(self, **variables: str) -> str:
        """The last line of the error."""
        process = self.start(**variables)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1, (process.returncode, err)
        return err.strip().splitlines()[-1]

    def built(self) -> list[Path]:
        return sorted(self.cache.glob("*/*.so"))

    def compiler(self, body: str) -> str:
        """A shell script that stands for the compiler."""
        path = self.folder / "compiler"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_a_process_killed_while_it_compiles_leaves_nothing_that_is_used(work):
    slow = work.folder / "slow"
    slow.touch()
    compiler = work.compiler(
        f'case "$*" in *--version*) ;; *) if [ -e {slow} ]; then touch {slow}.started; '
        'sleep 60; fi;; esac\nexec g++ "$@"'
    )
    process = work.start(CXX=compiler)
    while not Path(f"{slow}.started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not work.built()
    slow.unlink()
    work.runs(CXX=compiler)


def test_two_processes_compile_one_kernel_at_once(work):
    processes = [work.start() for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, "True"), err
    assert not list(work.cache.glob("*/tmp.*"))


@pytest.mark.parametrize("damage", ["empty", "cut short", "zeros", "garbage"])
def test_damaged_shared_objects_are_built_again(work, damage):
    """Two copies of the kernel (Triton's, and that of equal C++) and the launcher."""
    work.runs()
    files = work.built()
    assert {f.name for f in files} == {"addition.so", "kernel.so", "kexaone_cpu_launcher.so"}
    for file in files:
        content = file.read_bytes()
        size = len(content)
        file.write_bytes({"empty": b"", "cut short": content[: size // 2], "zeros": bytes(size),
                          "garbage": content[:200] + os.urandom(size - 200)}[damage])  # fmt: skip
    work.runs()
    assert all(is_whole(f.read_bytes()) for f in files if f.name != "kernel.so")


def test_a_kernel_that_cannot_be_built_again_is_named(work):
    work.runs()
    for file in work.cache.glob("*/addition.*"):
        if file.suffix in (".so", ".cpp"):
            file.write_text("nothing")
    message = work.fails()
    assert "addition" in message and str(work.cache) in message and "damaged" in message


def test_a_cache_folder_that_is_a_file(work):
    work.cache.write_text("")
    message = work.fails()
    assert message.startswith("RuntimeError: ") and f"folder {work.cache} cannot be" in message


def test_a_full_disk(work):
    """A limit on the size of a file stands for it: the first large write fails."""
    (work.folder / "work.py").write_text(
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n" + KERNEL
    )
    assert f"folder {work.cache} cannot be used: File too large" in work.fails()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """An empty file system of a number of KiB, which can be made another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if os.geteuid() or not shutil.which("mount") or not mount("size=4k"):
        pytest.skip("file systems are mounted by root only")

    def resize(size: int) -> Path:
        assert mount(f"remount,size={size}k")
        return folder

    yield resize
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_folder_for_temporary_files(work, small_disk):
    """Full when the compiler writes its own files, the linker, and the build of the launcher; then,
    with a warm cache, at loading."""
    asked = {"TMPDIR": str(small_disk(4)), "TRITON_CACHE_DIR": str(work.cache)}
    refused = f"RuntimeError: the folder for temporary files {asked['TMPDIR']} cannot be used: "
    for size in (4, 16, 48):
        assert work.fails(**asked) == f"{refused}No space left on device", size
        assert not list(small_disk(size + 8).iterdir())
        assert all(is_whole(file.read_bytes()) for file in work.built())
        assert not list(work.cache.rglob("tmp*"))
    small_disk(1024)
    work.runs(**asked)
    small_disk(8)
    assert work.fails(**asked) == f"{refused}No space left on device"
    assert not list(small_disk(1024).iterdir())
    work.runs(**asked)


def test_a_full_cache_folder(work, small_disk):
    work.cache = small_disk(64)
    message = work.fails()
    assert f"cache folder {work.cache} cannot be used: No space left on device" in message
    assert not [file for file in work.cache.rglob("*") if file.is_file()]
    small_disk(1024)
    work.runs()
    assert work.built() and not list(work.cache.rglob("tmp*"))


def test_a_compiler_that_does_not_exist(work):
    message = work.fails(CXX="/opt/none/bin/c++")
    assert message == (
        "RuntimeError: the C++ compiler that CXX asks for is not installed: /opt/none/bin/c++"
    )


def test_no_compiler_at_all(work):
    message = work.fails(PATH=str(work.folder), CXX="")
    assert message.endswith("install g++ or clang++")


def test_a_compiler_that_fails_says_why(work):
    script = 'case "$*" in *--version*) echo "made up 1.0";; *) echo {} >&2; exit 1;; esac'
    compiler = work.compiler(script.format("kernel.cpp:3: error: no such thing"))
    message = work.fails(CXX=compiler)
    assert f"the C++ compiler {compiler} failed: kernel.cpp:3: error: no such thing" in message
    compiler = work.compiler("exit 77")
    assert f"the C++ compiler {compiler} failed: exit status 77" in work.fails(CXX=compiler)


def test_a_compiler_with_arguments(work):
    work.runs(CXX="g++ -DUNUSED='a b'")
    assert work.built()
