"""Checkpoints of a run: exact resume, errors that name the cause, saves under kill -9."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from training_cases import (
    TINY,
    assert_same,
    largest_file,
    new_trainer,
    single_threaded,
    state_of,
    variants,
    windows,
)

from kexaone import Config, KExaone
from kexaone.model.data import DataError, Windows
from kexaone.model.stopping import stop_on_signals
from kexaone.model.trainer import StepReport, Trainer, TrainingError, latest
from kexaone.model.training_run import Options, run_training

STEPS = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


@settings(max_examples=12, deadline=None)
@given(
    config=variants(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    saved_at=st.integers(0, STEPS - 1),
    accumulation=st.integers(1, 3),
    batch_size=st.integers(1, 4),
)
def test_resume_is_bit_exact(
    config: Config, dtype: torch.dtype, saved_at: int, accumulation: int, batch_size: int
) -> None:
    options = {"accumulation": accumulation, "batch_size": batch_size}
    whole = new_trainer(config, dtype=dtype, **options)
    reports, draws = [], []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(STEPS):
            if step == saved_at:
                whole.save(folder)
            draws.append(torch.rand(2))
            reports.append(whole.step())
        expected = state_of(whole)
        torch.manual_seed(999)
        data = windows()
        resumed = Trainer.resume(folder, data)
    assert resumed.model.config == config and resumed.settings == whole.settings
    for step in range(saved_at, STEPS):
        assert torch.equal(torch.rand(2), draws[step])
        assert resumed.step() == reports[step]
    assert_same(state_of(resumed), expected)
    assert data.asked == list(range(saved_at * accumulation, STEPS * accumulation))


def test_run_saves_on_time_and_keeps_two(tmp_path: Path) -> None:
    seen: list[StepReport] = []
    trainer = new_trainer(save_every=2)
    trainer.run(tmp_path, seen.append)
    assert [r.step for r in seen] == [1, 2, 3, 4, 5]
    assert [r.lr for r in seen] == [trainer.settings.rate(i) for i in range(STEPS)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    assert latest(tmp_path) == tmp_path / "step-00000005"
    older = Trainer.resume(tmp_path / "step-00000004", windows())
    older.step()
    assert_same(state_of(older), state_of(Trainer.resume(tmp_path, windows())))


def test_saving_one_step_twice(tmp_path: Path) -> None:
    trainer = new_trainer()
    trainer.step()
    expected = state_of(trainer)
    assert trainer.save(tmp_path) == trainer.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert_same(state_of(Trainer.resume(tmp_path, windows())), expected)


def test_folder_of_another_run_is_refused_before_training(tmp_path: Path) -> None:
    new_trainer(steps=3).run(tmp_path, lambda _: None)
    other = new_trainer()
    with pytest.raises(TrainingError, match="step-00000003, later than step 0"):
        other.run(tmp_path, lambda _: None)
    assert other.steps_done == 0
    with pytest.raises(TrainingError, match="later than step 0"):
        other.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_resume_with_other_data(tmp_path: Path) -> None:
    trainer = new_trainer()
    trainer.save(tmp_path)
    changed = windows().tokens.clone()
    changed[-1] ^= 1
    for data in (Windows(changed, 8), windows(seed=1), windows(length=7)):
        torch.rand(1)
        before = torch.get_rng_state()
        with pytest.raises(DataError, match="trained on other data"):
            Trainer.resume(tmp_path, data)
        assert torch.equal(torch.get_rng_state(), before)


def rewrite(**changes: Any) -> Any:
    def damage(folder: Path) -> None:
        record = json.loads((folder / "trainer.json").read_text())
        for key, value in changes.items():
            record[key] = record[key] | value if isinstance(value, dict) else value
        (folder / "trainer.json").write_text(json.dumps(record))

    return damage


def truncate(name: str, keep: int) -> Any:
    return lambda folder: os.truncate(folder / name, keep)


def wider_model(folder: Path) -> None:
    KExaone(dataclasses.replace(TINY, moe_intermediate_size=12)).save_pretrained(folder / "model")


def deeper_model(folder: Path) -> None:
    KExaone(dataclasses.replace(TINY, windows=(4, 0, 4, 4))).save_pretrained(folder / "model")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (wider_model, "gate_up_proj.momentum must be"),
        (deeper_model, "does not fit the model: model.layers.3"),
        (rewrite(settings={"steps": -1}), "steps must be positive, got -1"),
        (rewrite(settings={"optimizer": "sgd"}), "optimizer"),
        (rewrite(step=None), "int"),
        (rewrite(rng="AAAA"), "random state"),
        (rewrite(rng=""), "random state"),
        (truncate("trainer.json", 40), "cannot resume"),
        (truncate("optimizer.safetensors", 5000), "cannot resume"),
        (truncate("model/model.safetensors", 5000), "truncated"),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors"),
        (lambda folder: (folder / "trainer.json").unlink(), "no checkpoint to resume from"),
        (lambda folder: shutil.rmtree(folder / "model"), "no such folder"),
    ],
)
def test_resume_from_a_damaged_or_mixed_checkpoint(
    tmp_path: Path, damage: Any, message: str
) -> None:
    folder = new_trainer().save(tmp_path)
    damage(folder)
    before = torch.get_rng_state()
    with pytest.raises(TrainingError, match=message) as caught:
        Trainer.resume(tmp_path, windows())
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)


def test_resume_without_a_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "step-00000001"):
        with pytest.raises(TrainingError, match="no checkpoint to resume from"):
            Trainer.resume(folder, windows())


def test_command_resumes_with_the_same_options_only(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"all work and no play makes jack a dull boy. " * 8)
    base = {"steps": 1, "batch_size": 1, "sequence_length": 8}
    terminal = Console(quiet=True)

    def train(*, resume: bool, **changes: Any) -> dict[str, Any]:
        chosen = Options(out=tmp_path / "out", data=(text,), resume=resume, settings=base | changes)
        return run_training(chosen, terminal)

    train(resume=False)
    with pytest.raises(DataError, match="options differ"):
        train(resume=True, steps=2, learning_rate=0.5)
    with pytest.raises(DataError, match="already has 1 steps"):
        train(resume=True)
    with pytest.raises(TrainingError, match="later than step 0"):
        train(resume=False)
    result = train(resume=True, steps=2)
    assert (result["resumed_from"], result["steps"]) == (1, 2)
    text.write_bytes(b"other")
    with pytest.raises(DataError):
        train(resume=True, steps=3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step(tmp_path: Path, number: int) -> None:
    whole = new_trainer()
    expected = [whole.step() for _ in range(STEPS)]
    before = signal.getsignal(number)
    seen: list[StepReport] = []

    def report(done: StepReport) -> None:
        seen.append(done)
        if done.step == 2:
            os.kill(os.getpid(), number)

    with stop_on_signals() as stop:
        new_trainer().run(tmp_path, report, stop=stop)
        assert stop() and signal.getsignal(number) == before
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"] and seen == expected[:2]
    resumed = Trainer.resume(tmp_path, windows())
    assert [resumed.step() for _ in range(2, STEPS)] == expected[2:]
    assert signal.getsignal(number) == before


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "ctypes.dlsym"}


def killed_save(trainer: Trainer, run: Path, operation: int) -> bool:
    """Save in a child that kills itself before its n-th file operation; False if it got through."""
    child = os.fork()
    if child == 0:
        left = itertools.count(operation, -1)

        def kill(event: str, _: tuple[Any, ...]) -> None:
            if event in CHANGES and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        with contextlib.suppress(BaseException):
            sys.addaudithook(kill)
            trainer.save(run)
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, f"the save itself failed with status {status}"
    return False


def kill_every_save(root: Path) -> None:
    """One run folder per file operation that a save may be killed before, steps 1 and 2 in each."""
    trainer = new_trainer()
    for _ in range(2):
        trainer.step()
        trainer.save(root / "start")
    for kind in ("same-step", "next-step"):
        for operation in itertools.count():
            run = root / f"{kind}-{operation}"
            shutil.copytree(root / "start", run)
            if not killed_save(trainer, run, operation):
                break
        trainer.step()


def contents(step: Path) -> dict[str, bytes]:
    return {str(p.relative_to(step)): p.read_bytes() for p in step.rglob("*") if p.is_file()}


def test_kill_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """What each killed save left behind is whole, and goes on to the bytes of an unharmed run.

    The saves are killed in a process of their own, which forks; the run they are compared with is
    this process's, so the bits may depend on nothing that a process did before.
    """
    runs = tmp_path / "runs"
    done = subprocess.run([sys.executable, __file__, runs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected, trainer = {}, new_trainer()
    for _ in range(4):
        trainer.step()
        saved = trainer.save(tmp_path / "whole")
        expected[saved.name] = contents(saved)
    outcomes = set()
    for run in sorted(runs.iterdir()):
        visible = [p for p in run.iterdir() if not p.name.startswith(".")]
        for step in visible:
            same = contents(step) == expected[step.name]
            assert same, step
        resumed = Trainer.resume(run, windows())
        outcomes.add((run.name[:4], resumed.steps_done, len(visible) < len(list(run.iterdir()))))
        resumed.step()
        newest = resumed.save(run)
        same = contents(newest) == expected[newest.name]
        assert same, run
        assert sorted(run.iterdir()) == sorted({*visible, newest})[-2:]
    # killed before and after the rename that counts, with and without leftovers
    wanted = {("next", 2, True), ("next", 2, False), ("next", 3, True), ("next", 3, False)}
    assert wanted <= outcomes
    # where two folders cannot be exchanged in one step, step 1 may be the newest for a moment
    assert {step for kind, step, _ in outcomes if kind == "same"} <= {1, 2}


def test_save_that_the_system_refuses(tmp_path: Path) -> None:
    trainer = new_trainer()
    saved = trainer.save(tmp_path)
    expected = state_of(trainer)
    sizes = {p.name: p.stat().st_size for p in saved.rglob("*") if p.is_file()}
    assert sizes["model.safetensors"] < sizes["optimizer.safetensors"]
    trainer.step()
    for size in (100, sizes["model.safetensors"] - 1, sizes["optimizer.safetensors"] - 1):
        with largest_file(size), pytest.raises(OSError, match="File too large"):
            trainer.save(tmp_path)
        assert list(tmp_path.iterdir()) == [saved]
    assert_same(state_of(Trainer.resume(tmp_path, windows())), expected)


if __name__ == "__main__":
    with single_threaded():
        kill_every_save(Path(sys.argv[1]))
