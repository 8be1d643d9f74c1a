"""`kexaone bench`: what it prints and writes, whole or interrupted, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from kexaone.bench import registry
from kexaone.bench.registry import Job

from ..command_line import run_command

QUICK = ("--shapes", "mini", "--tokens", "4", "--seconds", "0.1")


def _once(x):
    if x.requires_grad:
        raise NotImplementedError("no gradient")
    return x * 2


@pytest.fixture
def jobs(monkeypatch):
    """Three small jobs in place of the real ones, and how often each was set up."""
    count = {"one": 0, "two": 0, "three": 0}

    def job(name, ours):
        def setup(cfg, tokens):
            count[name] += 1
            x = torch.arange(1.0, 1 + tokens)
            peers = {"eager": lambda x: x * 2, "slow": lambda x: sum([x] * 2), "once": _once}
            return Job(ours, peers, [x], 8 * tokens, 12 * tokens if name == "two" else 0,
                       forward_only=frozenset({"once"}))  # fmt: skip

        return setup

    made = {name: job(name, lambda x: x + x) for name in count}
    monkeypatch.setattr("kexaone.bench.commands.JOBS", made)
    monkeypatch.setattr(registry, "JOBS", {})
    monkeypatch.setattr("kexaone.bench.commands.matmul_rate", lambda *_: 1e12)
    return made, count


def test_rows_are_printed_and_written(jobs, monkeypatch, capsys, tmp_path):
    path = tmp_path / "report.json"
    code, out, err = run_command(monkeypatch, capsys, "bench", *QUICK, "--json", str(path))
    assert code == 0, err
    report = json.loads(path.read_text())
    assert report["complete"]
    directions = [(row["op"], row["direction"]) for row in report["rows"]]
    assert directions == [("one", "forward"), ("two", "forward"), ("two", "backward"),
                          ("three", "forward")]  # fmt: skip
    for row in report["rows"]:
        assert ("once" in row["peers"]) == (row["direction"] == "forward")
        ours, best = row["ours"]["median"], row["peers"][row["best_peer"]]["median"]
        assert row["best_peer"] == min(row["peers"], key=lambda k: row["peers"][k]["median"])
        assert row["ratio"] == pytest.approx(best / ours)
        size = 48 if row["direction"] == "backward" else 32
        assert row["gigabytes_per_second"] == pytest.approx(size / ours / 1e6)
        name = row["op"] + (" bwd" if row["direction"] == "backward" else "")
        line = next(x for x in out.splitlines() if x.startswith(name.ljust(23)))
        assert line.split()[-5:-3] == [row["best_peer"], f"{best:.4g}"] and f"{ours:.4g}" in line
    assert out.splitlines()[0].split()[-4:] == ["ratio", "GB/s", "copy", "matmul"]


def test_an_interrupted_run_goes_on(jobs, monkeypatch, capsys, tmp_path):
    made, count = jobs
    path = tmp_path / "report.json"
    whole = made["two"]

    def interrupt(cfg, tokens):
        raise KeyboardInterrupt

    made["two"] = interrupt
    arguments = ("bench", *QUICK, "--json", str(path))
    code, out, err = run_command(monkeypatch, capsys, *arguments)
    assert code == 130 and err.strip() == "interrupted"
    report = json.loads(path.read_text())
    assert not report["complete"] and [row["op"] for row in report["rows"]] == ["one"]
    made["two"] = whole
    code, out, err = run_command(monkeypatch, capsys, *arguments, "--resume")
    assert code == 0, err
    found = json.loads(path.read_text())
    assert found["complete"] and found["rows"][0] == report["rows"][0]
    assert count == {"one": 1, "two": 1, "three": 1}
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("o", "t"))] == [
        "op", "one", "two", "two", "three"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no report of this benchmark"),
        ("[1", "is no report of this benchmark"),
        ('{"conditions": {"torch": "0.1"}, "rows": []}', "was measured with torch 0.1"),
        ('{"conditions": {}, "rows": [{"op": 1}]}', "is no report of this benchmark"),
    ],
)
def test_another_file_is_not_gone_on_with(jobs, monkeypatch, capsys, tmp_path, content, message):
    path = tmp_path / "report.json"
    path.write_text(content)
    code, _, err = run_command(
        monkeypatch, capsys, "bench", *QUICK, "--json", str(path), "--resume"
    )
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert path.read_text() == content
    code, _, err = run_command(monkeypatch, capsys, "bench", *QUICK, "--resume")
    assert code == 2 and "--json" in err


def test_a_wrong_result_is_not_timed(jobs, monkeypatch, capsys):
    made, _ = jobs
    right = made["one"]

    def setup(cfg, tokens):
        job = right(cfg, tokens)
        return Job(lambda x: x * 2.2, job.peers, job.inputs, job.bytes_forward)

    made["one"] = setup
    code, out, err = run_command(monkeypatch, capsys, "bench", *QUICK)
    assert code == 2 and "one differs from" in err
    assert "\none" not in out
    code, _, err = run_command(monkeypatch, capsys, "bench", "--op", "four")
    assert code == 2 and "unknown op four; there are: one, two, three" in err
