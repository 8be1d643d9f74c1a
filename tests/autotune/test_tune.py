"""The tuner end to end on the CPU, and the contest in which candidates are compared."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kexaone
from kexaone.autotune import session
from kexaone.autotune.accuracy import Oracle, outputs
from kexaone.autotune.compete import clock_of, compete, interval, seconds_of
from kexaone.autotune.store import locked
from kexaone.autotune.tasks import DECODING, SHAPES, TRAINING, Setting
from kexaone.autotune.tune_commands import parse_seconds
from kexaone.autotune.tuner import knobs_of, settled
from kexaone.kernels import table_files, tables
from kexaone.kernels.dispatch import choose, explain
from kexaone.kernels.table_files import user_file
from kexaone.model.config import Config

from ..command_line import run_command

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KEXAONE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(table_files, "_remembered", {})
    tables.reload()
    yield tmp_path
    tables.reload()


def mini(name, table=TRAINING, tokens=32, dtype=torch.bfloat16):
    return [(maker, Setting(SHAPES["mini"], tokens, CPU, dtype)) for maker in table[name]]


class Noisy:
    """A clock for runs that carry their true duration, with noise of its own."""

    def __init__(self, seed, spread=0.05):
        self.random, self.spread = random.Random(seed), spread

    def __call__(self, run):
        run()
        return run.seconds * self.random.lognormvariate(0, self.spread)


def timed(*seconds):
    def run(value):
        def call():
            return None

        call.seconds = value
        return call

    return [run(value) for value in seconds]


@pytest.mark.parametrize("seed", range(20))
def test_the_fastest_wins_whatever_the_noise(seed):
    verdict = compete(timed(1.0, 0.8, 0.7, 2.0), seconds=9, clock=Noisy(seed))
    assert verdict.winner == 2 and verdict.certain and verdict.rounds < 100


@pytest.mark.parametrize("seed", range(20))
def test_between_equals_the_first_wins(seed):
    assert compete(timed(1.0, 1.0, 1.0), seconds=9, clock=Noisy(seed, 0.02)).winner == 0


def test_a_contest_ends_in_time_and_says_that_it_is_not_certain():
    verdict = compete(timed(1.0, 0.99), seconds=0, clock=Noisy(1, 0.5))
    assert verdict.rounds == 6 and not verdict.certain


def test_a_gpu_is_timed_by_its_events(monkeypatch):
    """The events are waited for, and their milliseconds are the seconds of the call."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert clock_of(torch.device("cuda"))(lambda: log.append("run")) == pytest.approx(0.0025)
    assert log == ["record", "run", "record", "wait"]
    assert clock_of(CPU) is seconds_of


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60))
def test_an_interval_holds_the_median(values):
    low, high = interval(values)
    ordered = sorted(values)
    assert low <= ordered[len(values) // 2] <= high
    assert (len(values) < 6) == (low == float("-inf"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_an_interval_misses_a_twentieth_of_the_time_at_most(seed):
    generator = random.Random(seed)
    missed = 0
    for _ in range(200):
        low, high = interval([generator.gauss(0, 1) for _ in range(15)])
        missed += not low <= 0 <= high
    # 5 % of 200 and four standard deviations of the binomial
    assert missed <= 10 + 4 * (200 * 0.05 * 0.95) ** 0.5


def test_shapes_are_those_of_the_presets():
    for name, shapes in SHAPES.items():
        config = Config.preset(name)
        assert shapes.hidden == config.hidden_size and shapes.dense == config.intermediate_size
        assert shapes.width == config.moe_intermediate_size
        assert shapes.experts == config.num_experts and shapes.top_k == config.num_experts_per_tok
        assert shapes.heads == config.num_attention_heads
        assert shapes.kv_heads == config.num_key_value_heads
        assert shapes.head_dim == config.head_dim and shapes.vocabulary == config.vocab_size
        assert shapes.window == min(w for w in config.windows if w)


@pytest.mark.parametrize("table, name", [
    *((TRAINING, name) for name in TRAINING), *((DECODING, name) for name in DECODING),
])  # fmt: skip
def test_every_task_runs_and_keeps_the_contract(table, name):
    for maker, setting in mini(name, table, tokens=8):
        task = maker(setting)
        with kexaone.impl("triton"):
            result = outputs(task.function, task.inputs, trains=task.trains)
        assert Oracle(task).accepts(result)


def test_a_wrong_result_is_refused():
    (maker, setting), = mini("rms_norm", dtype=torch.float32)  # fmt: skip
    task = maker(setting)
    oracle = Oracle(task)
    result = outputs(task.function, task.inputs, trains=True)
    assert oracle.accepts(result)
    for index in range(len(result)):
        wrong = [t.clone() for t in result]
        wrong[index].view(-1)[3] += wrong[index].abs().max() * 1e-4
        assert not oracle.accepts(wrong), index
    wrong = [t.clone() for t in result]
    wrong[0][5] = float("nan")
    assert not oracle.accepts(wrong)


def test_tuned_once_and_used_ever_after():
    outcomes, trouble = session.tune_all(mini("qk_norm_rope"), seconds=30, top=3)
    assert not trouble
    tuned = [o for o in outcomes if o.entry]
    assert tuned and all(o.tried == 4 or o.tried == 3 for o in tuned)
    entry = tuned[0].entry
    assert entry.provenance == "measured" and entry.kernels and entry.figures["chosen_us"] > 0
    # ops run with it
    (maker, setting), = mini("qk_norm_rope")  # fmt: skip
    task = maker(setting)
    knob = next(k for k in knobs_of(lambda: outputs(task.function, task.inputs, trains=True))
                if k.decision.op == "qk_norm_rope")  # fmt: skip
    assert knob.decision.entry == entry and settled(knob)
    assert table_files.plain(knob.decision.config) == dict(entry.config)
    # and the second run measures nothing
    before = user_file("cpu").read_bytes()
    again, _ = session.tune_all(mini("qk_norm_rope"), seconds=30, clock=refuse)
    assert {o.note for o in again} <= {"known", "one candidate"}
    assert user_file("cpu").read_bytes() == before


def refuse(run):
    raise AssertionError("measured again")


def test_out_of_time_is_said():
    outcomes, _ = session.tune_all(mini("qk_norm_rope"), seconds=1e-9)
    assert {o.note for o in outcomes} <= {"out of time", "one candidate"}


def test_a_cache_that_cannot_be_written(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("KEXAONE_CACHE_DIR", str(cache / "file"))
    outcomes, trouble = session.tune_all(mini("qk_norm_rope"), seconds=20, top=2)
    assert any(o.entry for o in outcomes) and any("this process only" in t for t in trouble)


def test_why_prints_what_is_used_and_the_reason(capsys):
    x, weight = torch.randn(4, 256), torch.randn(256)
    lines = kexaone.why(kexaone.ops.rms_norm, x, weight)
    assert capsys.readouterr().out.splitlines() == lines
    assert lines[0].startswith("rms_norm implementation (1024, float32): name=triton")
    assert lines[1].startswith("rms_norm (256, float32): block=256")
    assert all("first candidate" in line for line in lines)
    with kexaone.impl("reference"):
        assert kexaone.why(kexaone.ops.rms_norm, x, weight) == ["no kernel of kexaone was launched"]


def test_the_implementation_is_chosen_like_any_other_configuration():
    (maker, setting), = mini("linear_skinny", DECODING, tokens=4)  # fmt: skip
    clock = Noisy(0, 0.0)
    clock_of = {"triton": 2.0, "reference": 1.0}
    from kexaone.autotune import tuner

    whole = tuner._whole

    def priced(op, candidate, call):
        run = whole(op, candidate, call)
        run.seconds = clock_of[candidate.name]
        return run

    def priced_kernels(launches):
        def run():
            pass

        run.seconds = 1.0
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "_whole", priced)
        patch.setattr(tuner, "_together", priced_kernels)
        outcomes, _ = session.tune_all([(maker, setting)], seconds=30, clock=clock)
    chosen = {o.op: o.entry for o in outcomes if o.entry}
    assert chosen["linear_skinny implementation"].config == {"name": "reference"}
    task = maker(setting)
    assert choose(task.inputs[0], op="linear_skinny") == "reference"
    reason = explain(task.inputs[0], op="linear_skinny").reason
    assert "measured" in reason and "2.00 times as fast" in reason
    # asked for is asked for, and a compiled graph keeps the kernels
    with kexaone.impl("triton"):
        assert choose(task.inputs[0], op="linear_skinny") == "triton"
    assert choose(task.inputs[0]) == "triton"


def command(monkeypatch, capsys, *arguments):
    return run_command(monkeypatch, capsys, "tune", *arguments)


def test_the_command(monkeypatch, capsys, tmp_path):
    path = tmp_path / "out.json"
    options = ("--preset", "mini", "--tokens", "16", "--op", "qk_norm_rope", "--budget", "30s")
    code, out, _ = command(monkeypatch, capsys, *options, "--json", str(path))
    assert code == 0 and "qk_norm_rope" in out
    outcomes = json.loads(path.read_text())["outcomes"]
    assert [o for o in outcomes if o["entry"]]
    code, out, _ = command(monkeypatch, capsys, *options)
    assert code == 0 and "known" in out and "certain" not in out


@pytest.mark.parametrize("options, what", [
    (("--op", "nothing"), "no op 'nothing'"), (("--preset", "tiny"), "no preset 'tiny'"),
    (("--budget", "soon"), "60s, 5m or 1h"), (("--budget", "0"), "60s, 5m or 1h"),
    (("--device", "tpu"), "cpu"), (("--dtype", "int8"), "dtype must be"),
    (("--json", "/nowhere/x.json"), "cannot write"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, options, what):
    code, _, err = command(monkeypatch, capsys, *options)
    assert code == 2 and what in err and len(err.splitlines()) == 1


def test_times():
    assert [parse_seconds(t) for t in ("60", "60s", "1.5m", "1h")] == [60, 60, 90, 3600]


USER = """
import random, sys, torch, triton, triton.language as tl, kexaone

@triton.jit
def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(y_ptr + at, x * (3 if WRONG else 2), mask=at < n)

noise = random.Random(SEED)
measured = []
def clock(run):
    measured.append(run)
    run()
    return noise.lognormvariate(0, 0.3)

configs = [{"BLOCK": b, "WRONG": w} for b in (64, 256, 1024) for w in (0, 1)]
fast = kexaone.tune(double, configs=configs, key=["n", "x_ptr"], seconds=0.5, clock=clock)
x, y = torch.arange(1000.0), torch.zeros(1000)
with kexaone.cpu.active():
    fast[lambda c: (triton.cdiv(1000, c["BLOCK"]),)](x, y, 1000)
assert torch.equal(y, 2 * x)
print(fast.why(x, y, 1000).split(" (")[0])
print(len(measured))
"""


def test_two_processes_with_different_noise_choose_alike(cache, tmp_path):
    """Each alone would take what its noise favours; through the table they agree."""
    both = []
    for seed in (1, 2):
        script = tmp_path / "user_kernel.py"
        if seed == 1:
            script.write_text(USER.replace("SEED", "int(sys.argv[1])"))
        both.append(subprocess.Popen(
            [sys.executable, str(script), str(seed)], stdout=subprocess.PIPE, text=True,
            stderr=subprocess.PIPE, env={**os.environ, "KEXAONE_CACHE_DIR": str(cache)},
        ))  # fmt: skip
    answers = []
    for process in both:
        out, errors = process.communicate(timeout=110)
        assert process.returncode == 0, errors
        answers.append(out.splitlines())
    assert answers[0][0] == answers[1][0] and "WRONG=0" in answers[0][0]
    # one of them measured, the other one waited and read
    assert sorted(int(a[1]) > 0 for a in answers) == [False, True]


def test_user_kernels_are_checked_at_the_door():
    kernel = knob_kernel()
    for named, what in (
        ({"configs": []}, "at least one"),
        ({"configs": [{"NOTHING": 1}]}, "no argument 'NOTHING'"),
        ({"configs": [{"BLOCK": 1}, {"num_warps": 4}]}, "same arguments"),
        ({"configs": [{"BLOCK": 1}], "key": ["m"]}, "'m'"),
    ):
        with pytest.raises(ValueError, match=what):
            kexaone.tune(kernel, **named)


def knob_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(x_ptr + at, tl.load(x_ptr + at) + 1, mask=at < n)

    return kernel


def test_a_kernel_that_writes_in_place_runs_once():
    tuned = kexaone.tune(knob_kernel(), configs=[{"BLOCK": b} for b in (16, 32)], key=["n"],
                         seconds=0.1)  # fmt: skip
    x = torch.zeros(16)
    with kexaone.cpu.active():
        tuned[(1,)](x, 16)
        assert torch.equal(x, torch.ones(16))
        tuned[(1,)](x, 16)
    assert torch.equal(x, 2 * torch.ones(16)) and "measured" in tuned.why(x, 16)


def test_waiting_for_another_process_is_said():
    said = []
    with locked(user_file("cpu"), suffix=session._LOCK), pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_WAIT_SECONDS", 0.2)
        # it gives up at last, and tunes all the same
        _, trouble = session.tune_all(mini("qk_norm_rope"), seconds=1e-9, say=said.append)
    assert said[0] == "waiting for another process that tunes" and len(said) == 2
    assert "without a lock" in trouble[0]
