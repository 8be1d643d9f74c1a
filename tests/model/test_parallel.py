"""Several processes train as one does: losses, router biases, checkpoints, and what fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_worker import SAVED_AT, STEPS, new_trainer, record, text
from training_cases import single_threaded

from kexaone import Config, KExaone
from kexaone.model.parallel.ranks import ParallelError, Ranks, connect
from kexaone.model.trainer import Trainer

WORKER = Path(__file__).parent / "parallel_worker.py"
LOSSES = ("loss", "next_token", "mtp", "balance", "grad_norm")
# Losses of both runs are float32 sums in another order. Orthogonalization amplifies a rounding of
# a gradient by at most 3.45^5 = 490 (five steps, slope 3.45 at zero), 490 x 2^-24 = 3e-5 of an
# update; updates are a hundredth of the weights, and the loss moves with them by less than itself.
RELATIVE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


def torchrun(processes: int, *arguments: object, restarts: int = 0) -> list[str]:
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def launch(folder: Path, processes: int, *cases: str) -> None:
    command = torchrun(processes, WORKER, folder, *cases)
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    with single_threaded():
        return record(new_trainer(), STEPS)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes left: everything sharded; heads and experts divided by two each."""
    folder = tmp_path_factory.mktemp("four")
    launch(folder, 4, "2x2", "raise", "skip", "full")
    return folder


def assert_alike(got: dict[str, Any], expected: dict[str, Any]) -> None:
    count = len(got["reports"])
    for mine, theirs in zip(got["reports"], expected["reports"][-count:], strict=True):
        for name in LOSSES:
            assert mine[name] == pytest.approx(theirs[name], rel=RELATIVE), (mine["step"], name)
        assert (mine["lr"], mine["tokens"]) == (theirs["lr"], theirs["tokens"])
    assert got["biases"] == expected["biases"][-count:]
    assert got["evaluated"] == pytest.approx(expected["evaluated"], rel=RELATIVE)


def test_four_ranks_train_as_one(four: Path, alone: dict[str, Any]) -> None:
    assert_alike(read(four, "4-2x2"), alone)
    assert alone["biases"][-1] != alone["biases"][0]
    assert alone["reports"][-1]["loss"] < alone["reports"][0]["loss"] - 0.3


def test_a_checkpoint_of_four_ranks_goes_on_alone(four: Path, alone: dict[str, Any]) -> None:
    trainer = Trainer.resume(four / "2x2", text())
    assert trainer.steps_done == SAVED_AT
    assert_alike(record(trainer, STEPS - SAVED_AT), alone)


def test_the_model_of_four_ranks_is_exported(four: Path, alone: dict[str, Any]) -> None:
    trainer = new_trainer()
    trainer.model.load_state_dict(KExaone.from_pretrained(four / "2x2" / "model").state_dict())
    assert trainer.evaluate(text(), 2) == pytest.approx(alone["evaluated"], rel=RELATIVE)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_gradient_that_is_not_finite_is_found_on_its_rank(four: Path, policy: str) -> None:
    found = read(four, f"4-{policy}")
    assert found["same"] == [True] * 4
    if policy == "raise":
        assert "gradient of step 1 is not finite" in found["told"]
        assert f"): gradient of {found['name']} on rank 1; a lower" in found["told"]
    else:
        assert found["told"]["skipped"] and found["told"]["step"] == 2


def test_a_disk_that_is_full_for_one_rank_leaves_the_checkpoint_before(four: Path) -> None:
    found = read(four, "4-full")
    assert found["left"] == ["step-00000001"]
    assert (
        found["told"] == ["cannot save step-00000002: rank 3: the file system refuses to write"] * 4
    )


def test_a_damaged_shared_checkpoint_is_one_line(four: Path, tmp_path: Path) -> None:
    shutil.copytree(four / "2x2", tmp_path / "run")
    (part, *_) = (tmp_path / "run").glob("step-*/state/*.distcp")
    os.truncate(part, 1000)
    with pytest.raises(ValueError, match="cannot resume from") as caught:
        Trainer.resume(tmp_path / "run", text())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_every_division_trains_as_one(tmp_path: Path, alone: dict[str, Any]) -> None:
    four = ["1x1", "1x2", "1x4", "2x1", "2x2", "2x4"]
    two = ["1x1", "1x2", "2x1"]
    launch(tmp_path, 4, *four)
    launch(tmp_path, 2, *two, "resume:2x2")
    for name in [*(f"4-{x}" for x in four), *(f"2-{x}" for x in two), "2-resume-2x2"]:
        assert_alike(read(tmp_path, name), alone)


@pytest.mark.slow
def test_mini_trains_in_four_ranks_as_in_one(tmp_path: Path) -> None:
    cases = ["mini:1x1", "mini:1x4", "mini:2x1", "mini:2x2"]
    launch(tmp_path, 4, *cases)
    expected = record(new_trainer(config=Config.preset("mini")), STEPS)
    for case in cases:
        assert_alike(read(tmp_path, f"4-{case.replace(':', '-')}"), expected)


@pytest.mark.slow
def test_a_killed_rank_ends_with_the_same_losses(tmp_path: Path) -> None:
    corpus = tmp_path / "text"
    corpus.write_bytes(b"all work and no play makes jack a dull boy. " * 200)
    base = ["-m", "kexaone", "train", "--data", corpus, "--steps", 8, "--save-every", 2]
    base += ["--batch-size", 2, "--sequence-length", 32, "--ep", 2]

    def run(out: Path, *, kill: bool) -> dict[str, Any]:
        command = torchrun(2, *base, "--out", out, "--json", out.with_suffix(".json"), restarts=1)
        job = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if kill:
            while not list(out.glob("step-00000004")) and job.poll() is None:
                time.sleep(0.02)
            workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            os.kill(int(workers[-1]), signal.SIGKILL)
        _, error = job.communicate()
        assert job.returncode == 0, error[-4000:]
        return json.loads(out.with_suffix(".json").read_text())

    whole, killed = run(tmp_path / "whole", kill=False), run(tmp_path / "killed", kill=True)
    assert whole["resumed_from"] is None and killed["resumed_from"] >= 4
    # the same ranks, the same sums: the same bits
    assert killed["losses"] == whole["losses"][killed["resumed_from"] :]
    assert killed["validation_loss"] == whole["validation_loss"]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (Ranks(0, 8), r"batch_size \(4\) must be a multiple of the 8 groups"),
        (Ranks(0, 4, tp=4), r"num_key_value_heads \(2\) must be a multiple of tp \(4\)"),
        (Ranks(0, 4, ep=3), r"num_experts \(8\) must be a multiple of ep \(3\)"),
    ],
)
def test_divisions_that_do_not_fit(ranks: Ranks, message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        new_trainer(ranks)


def test_alone_nothing_is_divided() -> None:
    assert connect() == Ranks()
    with pytest.raises(ParallelError, match="tp must divide the 1 processes, got 2"):
        connect(tp=2)
    ranks = Ranks(rank=5, world=8, tp=2)
    ids = torch.arange(4 * 6).view(4, 6)
    assert (ranks.dp, ranks.dp_rank, ranks.tp_rank) == (4, 2, 1)
    assert ranks.piece(ranks.sequences(ids)).tolist() == [[15, 16, 17]]
