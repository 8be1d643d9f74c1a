"""Files and folders: what killed writers leave is removed, what living ones write is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import largest_file

from kexaone.files import atomic_directory, atomic_write, check_writable, write_json

WRITER = """
import sys
from kexaone.files import atomic_directory
with atomic_directory(sys.argv[1]) as new:
    (new / "part").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def writer(target: Path, program: str = WRITER) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_leftovers_of_the_killed_are_removed_and_of_the_living_are_not(tmp_path: Path) -> None:
    target = tmp_path / "model[1]"  # a name that a pattern would take apart
    killed = writer(target)
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 1 and not target.exists()
    living = writer(target)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_directory(target) as new:
        (new / "whole").write_text("first")
    assert len(list(tmp_path.iterdir())) == 2
    assert living.communicate("")[0] == "" and living.returncode == 0
    assert list(tmp_path.iterdir()) == [target]
    assert {p.name: p.read_text() for p in target.iterdir()} == {"part": "half", "whole": "first"}


def test_failed_block_leaves_the_old(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as new:
        (new / "whole").write_text("first")
    with pytest.raises(KeyError), atomic_directory(target) as new:
        (new / "whole").write_text("second")
        raise KeyError
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "whole").read_text() == "first"


def test_refused_write_leaves_the_old_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write(path, "old")
    with largest_file(100), pytest.raises(OSError, match=r"File too large: .*x\.json"):
        atomic_write(path, "new" * 100)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


FILE_WRITER = """
import os, sys
from kexaone.files import atomic_write
replace = os.replace
def wait(*paths):
    print("writing", flush=True)
    sys.stdin.read()
    replace(*paths)
os.replace = wait
atomic_write(sys.argv[1], "late")
"""


def test_files_of_the_killed_are_removed_and_of_the_living_are_not(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    killed = writer(path, FILE_WRITER)
    killed.kill()
    killed.communicate()
    living = writer(path, FILE_WRITER)
    assert len(list(tmp_path.iterdir())) == 1
    atomic_write(path, "first")
    assert path.read_text() == "first" and len(list(tmp_path.iterdir())) == 2
    living.communicate("")
    assert living.returncode == 0
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "late"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    write_json(pipe, {"a": 1})
    assert reader.communicate()[0] == b'{\n  "a": 1\n}\n' and pipe.is_fifo()
