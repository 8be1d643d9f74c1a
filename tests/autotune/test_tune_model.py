"""The cost model: what must hold without any measurement, and what it says of published ones."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexaone.autotune import calibrate
from kexaone.autotune.cases import CASES
from kexaone.autotune.model import (
    Work,
    imbalance,
    machine_for,
    machines,
    parse,
    predict,
    to_json,
)
from kexaone.autotune.static import StaticTuner
from kexaone.autotune.traffic import sample_of
from kexaone.autotune.workloads import (
    TILES,
    Product,
    best_product,
    fits,
    product_work,
    routed,
    rows,
)
from kexaone.bench import published, ranking
from kexaone.kernels import table_files, tables
from kexaone.kernels.arch import ARCHS

H100 = machines()["h100-sxm"]
SHARED = ARCHS["sm_90"].shared_bytes


def test_every_architecture_has_a_machine():
    for name, arch in ARCHS.items():
        machine = machine_for(name)
        assert machine.processors == arch.processors and machine.devices, name
    assert machine_for("cpu").processors >= 1
    assert {m.arch for m in machines().values()} == {*ARCHS, "cpu"}


@pytest.mark.parametrize("name, teraflops", [
    ("a100-sxm", 312), ("h100-sxm", 989), ("h800", 989), ("h200", 989), ("h100-pcie", 756),
    ("l40s", 362), ("rtx4090", 165), ("b200", 2250), ("rtx-pro-6000", 503), ("mi300x", 1307),
    ("mi355x", 2517),
])  # fmt: skip
def test_described_rates_are_those_of_the_data_sheets(name, teraflops):
    m = machines()[name]
    described = m.processors * m.clock_ghz * m.matrix_flops_per_clock["bf16"] / 1e3
    assert described == pytest.approx(teraflops, rel=0.02)


def test_a_bad_description_is_named():
    good = to_json(H100)
    assert parse(json.dumps(good)) == H100
    with pytest.raises(ValueError, match="no description"):
        parse(json.dumps({k: v for k, v in good.items() if k != "clock_ghz"}))
    for wrong in ({"memory_gbps": -1}, {"efficiency": {**good["efficiency"], "memory": 1.2}}):
        with pytest.raises(ValueError, match="H100 SXM"):
            parse(json.dumps({**good, **wrong}))
    with pytest.raises(ValueError, match="no machine"):
        machine_for("sm_10")


def test_waves_are_quantised():
    assert imbalance(132, 132) == 1 and imbalance(133, 132) == pytest.approx(264 / 133)
    assert imbalance(1, 132) == 132 and imbalance(0, 132) == 1


amounts = st.floats(0, 1e12)
works = st.builds(
    Work, programs=st.integers(1, 10**6), read=amounts, written=amounts, requested=amounts,
    matrix=amounts, vector=amounts, special=amounts, instructions=amounts,
    resident=st.integers(1, 32), in_flight=st.floats(16, 1e6), overlap=st.floats(0, 1),
)  # fmt: skip


@given(works, st.sampled_from(["read", "written", "requested", "matrix", "vector", "special",
                               "instructions"]))  # fmt: skip
def test_more_work_never_takes_less_time(work, name):
    more = replace(work, **{name: getattr(work, name) * 2 + 1})
    assert predict(more, H100).us >= predict(work, H100).us > H100.launch_us


@given(works)
def test_a_faster_machine_is_never_slower(work):
    for faster in (H100.calibrated(memory=1.0), H100.calibrated(matrix=1.0), machines()["h200"]):
        assert predict(work, faster).us <= predict(work, H100).us * (1 + 1e-12)


def test_no_time_is_shorter_than_the_hardware_allows():
    """Bytes at the peak rate, flops at the peak rate: nothing is predicted to beat them."""
    for m, n, k in ((8192, 8192, 8192), (16, 6144, 2048), (4096, 512, 16384)):
        product = Product((float(m),), n, k)
        us = best_product(product, H100, SHARED)[0].us
        assert us > product.flops / 989e6
        assert us > 2 * (m * k + n * k + m * n) / 3350e3
    assert predict(rows(8192, 12288.0, 12288.0), H100).us > 8192 * 24576 / 3350e3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64))
def test_a_larger_product_never_takes_less_time(m, n, k):
    small = best_product(Product((float(m),), 64 * n, 64 * k), H100, SHARED)[0].us
    for larger in ((2.0 * m, 64 * n, 64 * k), (float(m), 128 * n, 64 * k),
                   (float(m), 64 * n, 128 * k)):  # fmt: skip
        assert best_product(Product((larger[0],), *larger[1:]), H100, SHARED)[0].us >= small


def test_operands_are_read_at_least_once():
    product = Product((300.0, 0.0, 20.0), 4096, 2048)
    for tile in TILES:
        if fits(tile, 2, H100, SHARED):
            work = product_work(product, tile, H100, SHARED)
            # an expert without rows costs nothing
            assert work.read >= 2 * (320 * 2048 + 2 * 4096 * 2048)
            assert work.matrix >= product.flops and work.requested >= work.read


@given(st.integers(1, 5000), st.sampled_from([8, 64, 128]), st.sampled_from([1, 2, 8]),
       st.sampled_from([0.0, 0.5, 1.2]))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_routed_rows(tokens, experts, top_k, skew):
    found = routed(tokens, experts, top_k, skew=skew)
    assert len(found) == experts and list(found) == sorted(found, reverse=True)
    assert found[-1] >= 0 and found[0] <= tokens
    if skew == 0:
        # rounding to whole rows
        assert sum(found) == pytest.approx(tokens * top_k, abs=experts)


def test_skew_makes_the_busiest_expert_busier():
    assert routed(4096, 128, 8, skew=1.0)[0] > 2 * routed(4096, 128, 8)[0]


@given(st.integers(1, 100_000), st.integers(9, 40))
def test_sampled_programs_are_spread_over_the_grid(total, programs):
    found = sample_of(total, programs)
    assert found == sorted(set(found)) and found[0] == 0 and found[-1] == total - 1
    assert len(found) <= programs
    if total <= programs:
        assert found == list(range(total))
    elif total >= 10 * programs:
        assert len(found) == programs
        assert max(b - a for a, b in itertools.pairwise(found)) <= 2 * total / programs + 1


def test_sampled_programs_hit_no_period():
    """A grid whose every fifth row of tiles is idle, as that of 128 experts with 4 tiles each."""
    for period in (2, 3, 5, 8, 16):
        found = sample_of(10_240, 33)
        for rest in range(period):
            share = sum(p // 16 % period == rest for p in found) / len(found)
            # four standard deviations of a binomial with that many draws
            assert abs(share - 1 / period) < 4 * (1 / period / len(found)) ** 0.5


HEAD = "source,kernel,gpu,dtype,shape,metric,value,notes\n"


def test_published_rows_are_read(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text(HEAD + (
        "x,RMSNorm fwd [mine],H100-SXM,bf16,M=32768;N=8192,gbps,2800,tier=A; quiet\n"
        "x,RMSNorm fwd [mine],H100-SXM,bf16,M=32768;N=8192,speedup,2,tier=A\n"
        "x,RMSNorm fwd [mine],Abacus,bf16,M=32768;N=8192,us,2,tier=A\n"
        "x,fp16 matmul,H800,fp16,M=N=K=8192,tflops,700,tier=B\n"
        "x,matmul,H100,fp16,2048x2048x2048,tflops,500,\n"
        "x,weather,H100,fp16,rain=1,us,1,tier=A\n"
    ))  # fmt: skip
    results, left = published.evaluate(published.read(path))
    assert [r.family for r in results] == ["RMSNorm", *["dense products, 16 bits"] * 2]
    assert left == 3
    norm, product, small = results
    assert norm.published == pytest.approx(2 * 2 * 32768 * 8192 / 2800e3)
    assert product.published == pytest.approx(2 * 8192**3 / 700e6)
    assert small.row.tier == "C" and small.row.sizes == {"M": 2048, "N": 2048, "K": 2048}
    # within what a GPU of this kind can do and a half of what one does
    assert norm.published / 2 < norm.prior < norm.published * 2
    assert product.published / 2 < product.prior < product.published * 2
    found = published.summaries(results)
    assert [(s.family, s.tier, s.rows) for s in found] == [
        ("RMSNorm", "A", 1), ("dense products, 16 bits", "BC", 2),
    ]  # fmt: skip


def test_calibration_rows_are_met_and_left_out(tmp_path):
    path = tmp_path / "numbers.csv"
    kernel, metric, sizes, factor = published.CALIBRATION[0]
    shape = ";".join(f"{n}={v}" for n, v in sizes.items())
    line = f"x,{kernel},H100-SXM,bf16,{shape},{metric},2000,tier=A\n"
    path.write_text(HEAD + line + line.replace(shape, "M=32768;N=16384").replace("2000", "1990"))
    results, _ = published.evaluate(published.read(path))
    assert results[0].calibrates == factor == "memory" and not results[1].calibrates
    assert results[0].calibrated == pytest.approx(results[0].published, rel=1e-3)
    assert results[0].prior < 0.8 * results[0].published
    assert sum(s.rows for s in published.summaries(results)) == 1


@pytest.mark.parametrize("text, what", [
    ("a,b\n1,2\n", "no column 'source'"),
    (HEAD + "x,y,H100,bf16,M=1,us,many,tier=A\n", "'many' is no number"),
])  # fmt: skip
def test_what_is_no_such_file_is_refused(tmp_path, text, what):
    path = tmp_path / "numbers.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=what):
        published.read(path)


def test_ranking_of_published_tiles(tmp_path):
    keys = dict(zip(ranking._KEYS, (128, 128, 64, 16, 8, 4), strict=True))
    awful = {**keys, "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "num_stages": 2}
    for name, config in (("good.json", keys), ("awful.json", awful)):
        (tmp_path / name).write_text(json.dumps({"4096": config, "triton_version": "3.5.1"}))
    head = "file,gpu,dtype,E,N,block_shape,hidden_size_if_known,top_k_if_known,gemm\n"
    lines = [
        "good.json,NVIDIA_H100_80GB_HBM3,bf16,8,14336,,4096,2,both",
        "awful.json,NVIDIA_H100_80GB_HBM3,bf16,8,14336,,4096,2,both",
        "good.json,Abacus,bf16,8,1,,1,1,both",
        "good.json,NVIDIA_H100,bf16,8,1,,,,both",
    ]
    (tmp_path / "index.csv").write_text(head + "\n".join(lines) + "\n")
    problems = ranking.layers(tmp_path)
    assert len(problems) == 2
    good, bad = (ranking.judge(*problem) for problem in problems)
    assert good.ratio < 1.3 and bad.ratio > 2 and bad.place > good.place
    assert good.default >= 1 and 0 < good.equal <= 1
    (summary,) = ranking.rankings([good, bad])
    assert (summary.gpu, summary.problems) == ("h100-sxm", 2)
    with pytest.raises(ValueError, match=r"no index\.csv"):
        ranking.layers(tmp_path / "nowhere")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KEXAONE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(table_files, "_remembered", {})
    monkeypatch.setattr(table_files, "shipped_file", lambda arch: tmp_path / "shipped.json")
    tables.reload()
    machines.cache_clear()
    yield tmp_path
    tables.reload()
    machines.cache_clear()


def test_calibration_fits_each_factor(cache):
    readings = [
        calibrate.Reading("launch", 0.0, 5.0),
        calibrate.Reading("memory", H100.memory_gbps * 1e3 * 0.7, 1.0),
        calibrate.Reading("cache", H100.cache_gbps * 1e3 * 2, 1.0),
        calibrate.Reading("bf16", 600e6, 1.0),
        calibrate.Reading("fp16", 300e6, 1.0),
    ]
    machine = calibrate.fitted(H100, readings)
    assert machine.launch_us == 5.0
    assert machine.memory_rate == pytest.approx(H100.memory_gbps * 1e3 * 0.7)
    # a rate that the description has too low is raised
    assert machine.efficiency["cache"] == 1 and machine.cache_gbps == 2 * H100.cache_gbps
    for kind, rate in (("bf16", 600e6), ("fp16", 300e6)):
        assert machine.rate(machine.matrix_flops_per_clock[kind], "matrix") == pytest.approx(rate)
    assert parse(json.dumps(to_json(machine))) == machine


def test_calibration_of_this_cpu_is_kept_and_used(cache):
    before = machine_for("cpu")
    machine, path = calibrate.calibrate("cpu", torch.device("cpu"), seconds=0.01)
    assert machine_for("cpu") == machine != before and path.parent == cache / "machines"
    assert len(calibrate.probes(torch.device("cpu"), machine)) <= 10
    with pytest.raises(ValueError, match="no machine 'abacus'"):
        calibrate.calibrate("abacus", torch.device("cpu"))


def test_static_tuning_compiles_and_chooses_what_the_audit_passes(cache):
    case = next(c for c in CASES if c.op == "dequantize_fp8")
    tuner = StaticTuner(machine_for("sm_90"), ARCHS["sm_90"], seconds=600, top=3, workers=1)
    choices = tuner.tune(case)
    (choice,) = [c for c in choices if c.entry]
    assert len(choice.estimates) == 3 and not choice.estimates[0].fault
    entry = choice.entry
    assert entry.provenance == "static" and entry.arch == "sm_90" and entry.kernels
    assert entry.machine == "NVIDIA H100 80GB HBM3"
    # never predicted slower than the default, never faster than memory allows
    assert entry.figures["chosen_us"] <= entry.figures["default_us"]
    assert entry.figures["chosen_us"] > 8192 * 6144 * 3 / 3350e3
    # once is enough, for this process and the next
    from kexaone.autotune.store import save

    assert save("sm_90", [entry]) == ""
    fresh = StaticTuner(machine_for("sm_90"), ARCHS["sm_90"], seconds=600, top=3)
    assert [c.note for c in fresh.tune(case) if c.op == choice.op] == ["known"]
    assert tuner.tune(case) == []


def test_static_tuning_stops_in_time_and_skips_types_that_do_not_exist(cache):
    case = next(c for c in CASES if c.op == "dequantize_fp8")
    late = StaticTuner(machine_for("sm_90"), ARCHS["sm_90"], seconds=0)
    assert {c.note for c in late.tune(case)} <= {"out of time", "one candidate"}
    assert StaticTuner(machine_for("sm_80"), ARCHS["sm_80"], seconds=9).tune(case) == []
