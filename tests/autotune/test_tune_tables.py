"""Tuning tables: what is looked up, what survives, and what nobody may lose."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexaone.autotune.store import merge, save
from kexaone.kernels import sources, table_files, tables
from kexaone.kernels.arch import arch_of
from kexaone.kernels.table_files import (
    Entry,
    Foreign,
    distance,
    machine_of,
    parse,
    plain,
    render,
    shipped_file,
    user_file,
    within,
)
from kexaone.kernels.tables import pick, recording, use

CPU = torch.device("cpu")
ARCH = arch_of(CPU)


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int


def candidates(columns, arch):
    return [Config(1024, 4), Config(256, 4), Config(64, 8)]


def entry(**changed):
    base = Entry(
        "op", "cpu", machine_of(ARCH, CPU), "bfloat16", {"0": 4096}, {}, ("3.9", "3.9"),
        {"block": 256, "num_warps": 4}, "measured", {"chosen_us": 10.0, "default_us": 20.0},
    )  # fmt: skip
    return replace(base, **changed)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache directory, and nothing known of any table."""
    monkeypatch.setenv("KEXAONE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(table_files, "_remembered", {})
    monkeypatch.setattr(tables, "triton_release", lambda: "3.9")
    tables.reload()
    yield tmp_path
    tables.reload()


def found(columns=4096, dtype=torch.bfloat16):
    with recording() as decisions:
        pick("op", candidates, columns, torch.empty(1, dtype=dtype))
    return decisions[0]


def test_nothing_tuned_takes_the_first_candidate():
    assert found().config == Config(1024, 4) and "nothing" in found().reason


def test_a_tuned_problem_and_its_neighbours():
    assert save("cpu", [entry()]) == ""
    assert found().config == Config(256, 4)
    assert "2.00 times as fast" in found().reason and found().entry is not None
    # a factor of four away is the limit; the type has to be the same
    assert found(8192).config == found(16380).config == found(1030).config == Config(256, 4)
    assert "2.0 times away" in found(8192).reason
    assert found(32768).config == found(900).config == Config(1024, 4)
    assert found(dtype=torch.float32).config == Config(1024, 4)


def test_the_nearest_wins_then_this_release_then_trust_then_the_name():
    far = entry(problem={"0": 8192}, config={"block": 64, "num_warps": 8})
    assert save("cpu", [far, entry()]) == ""
    assert found(4096).config == Config(256, 4) and found(7000).config == Config(64, 8)
    old = replace(far, problem={"0": 4096}, triton=("3.6", "3.8"), machine=far.machine)
    static = replace(far, problem={"0": 4096}, provenance="static")
    assert save("cpu", [old, static]) == ""
    assert found(4096).config == Config(256, 4)


def test_an_entry_of_another_release_is_still_used_and_says_so():
    save("cpu", [entry(triton=("3.7", "3.7"))])
    assert found().config == Config(256, 4) and "tuned under Triton 3.7" in found().reason


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": "avx2, 96 cores"},
        {"config": {"block": 512, "num_warps": 4}},
        {"config": {"block": 256}},
        {"kernels": {"kexaone.kernels.rmsnorm:_forward_kernel": "0" * 16}},
        {"kernels": {"kexaone.kernels.rmsnorm:_was_here": "0" * 16}},
        {"problem": {"0": "4096"}},
        {"problem": {"0": 4096, "1": 1}},
        {"op": "other"},
    ],
)
def test_what_does_not_fit_is_not_used(changed):
    """Another machine, a configuration that is no candidate, a kernel that has changed, ..."""
    save("cpu", [entry(**changed)])
    assert found().config == Config(1024, 4)


def test_a_gpu_entry_serves_other_machines_of_its_architecture():
    arch = replace(ARCH, name="sm_90", backend="cuda")
    save("sm_90", [entry(arch="sm_90", machine="NVIDIA H100 80GB HBM3", provenance="static")])
    decision = tables.decide("op", candidates, 4096, "bfloat16", arch, "NVIDIA H200")
    assert decision.config == Config(256, 4)


def test_use_overrides_a_table():
    save("cpu", [entry()])
    with use("op", Config(64, 8)):
        assert pick("op", candidates, 4096, torch.empty(1, dtype=torch.bfloat16)) == Config(64, 8)
        assert found().reason == "forced here"
    assert found().config == Config(256, 4)


numbers = st.integers(0, 2**40)
problems = st.dictionaries(st.sampled_from("abc"), numbers | st.booleans() | st.text(max_size=2))


@given(problems, problems)
def test_distance_is_symmetric_and_zero_only_for_equal_problems(a, b):
    assert distance(a, b) == distance(b, a) >= 0
    assert distance(a, a) == 0
    same = a.keys() == b.keys() and all(type(a[k]) is type(b[k]) and a[k] == b[k] for k in a)
    assert (distance(a, b) == 0) == same


def test_distance_counts_ratios_and_nothing_else():
    assert distance({"a": 1023}, {"a": 2047}) == pytest.approx(1)
    assert distance({"a": 8, "b": True}, {"a": 8, "b": False}) == math.inf
    assert distance({"a": 8}, {"b": 8}) == math.inf
    assert distance({"a": 1}, {"a": True}) == math.inf


releases = st.tuples(st.integers(6, 11), st.integers(0, 2)).map(
    lambda p: (f"3.{p[0]}", f"3.{p[0] + p[1]}")
)
entries = st.builds(
    lambda release, block, columns: entry(
        triton=release, config={"block": block, "num_warps": 4}, problem={"0": columns}
    ),
    releases, st.sampled_from([256, 1024]), st.sampled_from([512, 1024]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(entries, max_size=6))
def test_merging_keeps_one_winner_for_each_release(found):
    merged = []
    for one in found:
        merged = merge(merged, [one])
        # what was found last decides for the release it was found under
        mine = [e for e in merged if e.key == one.key and within(one.triton[0], e.triton)]
        assert [e.config for e in mine] == [one.config]
    for a in merged:
        for b in merged:
            if a is not b and a.key == b.key:
                assert not within(a.triton[0], b.triton) and not within(b.triton[0], a.triton)
    assert parse(render("cpu", merged)) == sorted(merged, key=lambda e: (e.key, e.triton))
    assert merge(reversed(merged), []) == merge(merged, [])


def test_a_winner_found_again_under_another_release_widens_its_range():
    merged = merge([entry(triton=("3.7", "3.7"))], [entry(triton=("3.9", "3.9"))])
    assert [e.triton for e in merged] == [("3.7", "3.9")]
    other = entry(triton=("3.8", "3.8"), config={"block": 64, "num_warps": 8})
    assert sorted(e.triton for e in merge(merged, [other])) == [
        ("3.7", "3.7"), ("3.8", "3.8"), ("3.9", "3.9"),
    ]  # fmt: skip


@pytest.mark.parametrize("text, what", [
    ("{", "damaged"), ("\x00\xff", "damaged"), ("[]", "no tuning table"),
    ('{"kind": "somebody else\'s"}', "no tuning table"),
    (json.dumps({"kind": table_files.MAGIC, "format": 99, "entries": []}), "format 99"),
    (json.dumps({"kind": table_files.MAGIC, "format": 1, "entries": [{"op": "x"}]}), "damaged"),
    (json.dumps({"kind": table_files.MAGIC, "format": 1}), "damaged"),
])  # fmt: skip
def test_a_file_that_is_no_table_is_kept_and_named_once(cache, text, what):
    path = user_file("cpu")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=what) as caught:
        assert found().config == Config(1024, 4)
        found(77)
    assert len(caught) == 1 and path.read_text() == text
    # writing moves it aside, under a free name
    path.with_name("cpu.json.aside-1").write_text("older")
    with pytest.warns(UserWarning, match="aside-2"):
        assert save("cpu", [entry()]) == ""
    assert path.with_name("cpu.json.aside-1").read_text() == "older"
    assert path.with_name("cpu.json.aside-2").read_text() == text
    assert table_files.read(path) == [entry()] and found().config == Config(256, 4)


def test_a_cache_that_cannot_be_written_costs_one_line(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("KEXAONE_CACHE_DIR", str(cache / "file"))
    tables.reload()
    trouble = save("cpu", [entry()])
    assert "was not written" in trouble and "\n" not in trouble
    # in this process the choice holds
    assert found().config == Config(256, 4)


def child(cache, code, **environment):
    """A process that has saved one entry's worth of imports and runs `code`."""
    prelude = (
        "import os, sys, time, torch\n"
        "from dataclasses import replace\n"
        "from kexaone.autotune import store\n"
        "from kexaone.kernels.table_files import Entry\n"
        "def entry(n):\n"
        "    return Entry('op', 'cpu', 'm', '', {'0': n}, {}, ('3.9', '3.9'), {'block': n},\n"
        "                 'measured', {'chosen_us': 1.0, 'default_us': 1.0})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "KEXAONE_CACHE_DIR": str(cache), **environment},
    )  # fmt: skip


def test_processes_that_write_at_once_lose_nothing(cache):
    code = (
        "first = int(os.environ['FIRST'])\n"
        "for n in range(first, first + 15):\n"
        "    assert store.save('cpu', [entry(n)]) == ''\n"
    )
    both = [child(cache, code, FIRST=str(first)) for first in (0, 100)]
    for process in both:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    kept = {e.problem["0"] for e in table_files.read(user_file("cpu"))}
    assert kept == {*range(15), *range(100, 115)}


def test_killed_while_writing(cache):
    assert save("cpu", [entry()]) == ""
    before = user_file("cpu").read_bytes()
    code = (
        "def wait(*_):\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "os.replace = wait\n"
        "store.save('cpu', [entry(7)])\n"
    )
    process = child(cache, code)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert user_file("cpu").read_bytes() == before
    left = list(user_file("cpu").parent.glob(".*.tmp-*"))
    assert len(left) == 1
    # the lock died with the process, and the next one cleans up
    begin = time.monotonic()
    assert save("cpu", [entry(problem={"0": 1})]) == ""
    assert time.monotonic() - begin < 30 and not left[0].exists()
    assert len(table_files.read(user_file("cpu"))) == 2


def test_a_full_disk(cache):
    assert save("cpu", [entry()]) == ""
    before = user_file("cpu").read_bytes()
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
        "print(store.save('cpu', [entry(n) for n in range(99)]))\n"
    )
    out, errors = child(cache, code).communicate(timeout=100)
    assert "was not written: File too large" in out and len(out.splitlines()) == 1, errors
    assert user_file("cpu").read_bytes() == before
    assert not list(user_file("cpu").parent.glob(".*.tmp-*"))


def test_shipped_tables_are_tables():
    for path in shipped_file("cpu").parent.glob("*.json"):
        known = parse(path.read_text())
        assert known and {e.arch for e in known} == {path.stem}, path
        assert {e.provenance for e in known} == {"static"}
        assert render(path.stem, merge(known, [])) == path.read_text()


def test_parse_never_raises_anything_else():
    good = render("cpu", [entry()])
    for position in range(0, len(good), 7):
        for broken in (good[:position], good[:position] + "0" + good[position + 1 :]):
            try:
                parse(broken)
            except Foreign:
                continue


def test_reading_without_a_table_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found().config == Config(1024, 4)


def test_plain_values():
    assert plain(None) == {} and plain(5) == {"0": 5} and plain((1, True)) == {"0": 1, "1": True}
    assert plain(Config(1, 2)) == plain({"block": 1, "num_warps": 2})


def test_the_hash_of_a_kernel_is_about_its_meaning(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = (
        "import triton\nimport triton.language as tl\nLIMIT = tl.constexpr(4)\n{above}\n"
        "@triton.jit\ndef helper(x):\n    return x {op} LIMIT\n"
        "@triton.jit\ndef kernel(x_ptr, B: tl.constexpr):\n    {comment}\n"
        "    tl.store(x_ptr, helper(tl.load(x_ptr)))\n"
    )
    plainly = {"above": "", "op": "+", "comment": '"""Says what."""'}
    changes = [{}, {"above": "\n\n# moved\n"}, {"comment": "# why"}, {"op": "-"}]
    hashes = []
    for number, change in enumerate(changes):
        name = f"hashed_{number}"
        (tmp_path / f"{name}.py").write_text(text.format(**{**plainly, **change}))
        module = __import__(name)
        # the module's name is part of the hash: give all the same
        for kernel in (module.kernel, module.helper):
            kernel.fn.__module__ = "hashed"
        hashes.append(sources.source_hash(module.kernel))
        if not number:
            module.LIMIT.value = 5
            sources._hash.cache_clear()
            assert sources.source_hash(module.kernel) != hashes[0]
            module.LIMIT.value = 4
            sources._hash.cache_clear()
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]
