"""Replaced folders: what a killed writer leaves is removed, what a living one writes is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import largest_file

from kexaone.model.atomic import atomic_directory, atomic_write

WRITER = """
import sys
from kexaone.model.atomic import atomic_directory
with atomic_directory(sys.argv[1]) as new:
    (new / "part").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def writer(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, target],
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
