"""Checkpoints: round trips with transformers, every layout, float8, and damaged folders."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import random_model, transformers_model
from safetensors.torch import load_file, save_file
from transformers import ExaoneMoeForCausalLM

import kexaone
from kexaone import Config, KExaone
from kexaone.model.checkpoint import CheckpointError, load, save
from kexaone.model.fp8 import Fp8Linear, quantize

CONFIG = Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    windows=(8, 8, 8, 0),
    eos_token_ids=(1,),
    pad_token_id=None,
)
# blocks of 128 do not divide 160, so that edge blocks are met
WIDE = dataclasses.replace(CONFIG, hidden_size=160, moe_intermediate_size=128)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def assert_equal_states(a: KExaone, b: KExaone) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def saved(folder: Path, config: Config = CONFIG, **options) -> KExaone:
    model = random_model(config)
    save(model, folder, **options)
    return model


@pytest.mark.parametrize("limit", [1, 10_000, 5_000_000_000])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, limit, tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    model = saved(tmp_path / "m", config, max_shard_bytes=limit)
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) == (limit < 5_000_000_000)
    for file in files:
        sizes = [t.nbytes for t in load_file(file).values()]
        assert len(sizes) == 1 or sum(sizes) <= limit
    loaded = load(tmp_path / "m")
    assert_equal_states(model, loaded)
    assert loaded.config == model.config and not loaded.training
    shared = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert shared == tied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_survive_and_the_router_bias_stays_wide(tmp_path, dtype):
    model = random_model(CONFIG).to(dtype)
    save(model, tmp_path / "m")
    assert_equal_states(model, load(tmp_path / "m"))
    widened = load(tmp_path / "m", dtype=torch.float32)
    assert {t.dtype for t in widened.state_dict().values()} == {torch.float32}
    bias = load(tmp_path / "m", dtype=torch.bfloat16).model.layers[1].mlp.gate
    assert bias.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_what_we_save(tmp_path, sharded):
    model = saved(tmp_path / "m", max_shard_bytes=20_000 if sharded else 10**9)
    other, info = ExaoneMoeForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = transformers_model(model)(ids).logits
        assert torch.equal(other.eval()(ids).logits, expected)
        assert (model(ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_we_load_what_transformers_saves(tmp_path, shard):
    model = random_model(CONFIG)
    transformers_model(model).save_pretrained(tmp_path / "m", max_shard_size=shard)
    loaded = load(tmp_path / "m")
    # transformers drops the MTP block on saving
    assert loaded.mtp is None and loaded.config.mtp_steps == 0
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")}
    assert own.keys() == loaded.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in own.items())


def test_fused_layout_and_bias_under_the_gate(tmp_path):
    model = saved(tmp_path / "m")
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "m" / "model.safetensors")
    assert any("experts.gate_up_proj" in name for name in state)
    assert any("gate.e_score_correction_bias" in name for name in state)
    assert_equal_states(model, load(tmp_path / "m"))


def with_fp8(folder: Path, suffix: str) -> KExaone:
    """Save a model whose linear weights are float8 on disk; returns it with the widened values."""
    model = saved(folder, WIDE)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if "_proj.weight" in name and not name.startswith("mtp."):
            quantized = quantize(tensors[name])
            tensors[name], tensors[name + suffix] = quantized.values, quantized.scale
    save_file(tensors, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_float8_kept_equals_widened(tmp_path, suffix):
    original = with_fp8(tmp_path / "m", suffix)
    wide, kept = load(tmp_path / "m"), load(tmp_path / "m", fp8="keep")
    weight = wide.get_parameter(Q_PROJ)
    assert not torch.equal(weight, original.get_parameter(Q_PROJ))
    # e4m3 has 3 mantissa bits: half a step is 2^-4 of the value, or of the smallest normal
    # number 2^-6 of a block whose largest is 448
    peak = original.get_parameter(Q_PROJ).abs().max()
    error = (weight - original.get_parameter(Q_PROJ)).abs()
    assert (error <= 2**-4 * weight.abs() + peak / 448 * 2**-10).all()
    assert isinstance(kept.model.layers[0].self_attn.q_proj, Fp8Linear)
    assert kept.model.layers[1].mlp.experts.down_proj.dtype == torch.float8_e4m3fn
    ids = torch.arange(30).view(1, 30)
    with torch.no_grad(), kexaone.impl("reference"):
        assert torch.equal(wide(ids), kept(ids))
    with torch.no_grad():
        # the kernels scale sums of 128 products instead of the weights: rounding differs, no more
        torch.testing.assert_close(kept(ids), wide(ids), atol=1e-4, rtol=0)
    save(kept, tmp_path / "again", max_shard_bytes=100_000)
    again = load(tmp_path / "again", fp8="keep")
    assert_equal_states(kept, again)
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    ignored = set(written["ignore"])
    assert "lm_head" in ignored and "model.layers.1.mlp.gate" in ignored
    assert Q_PROJ.removesuffix(".weight") not in ignored


def test_loading_holds_one_copy(tmp_path):
    config = dataclasses.replace(Config.preset("mid"), num_experts=8)
    with torch.device("meta"):
        size = sum(t.nbytes for t in KExaone(config).state_dict().values())
    program = """
import resource, sys, torch, kexaone
from kexaone.model.checkpoint import load, save
config = kexaone.Config.preset("mid")
import dataclasses
config = dataclasses.replace(config, num_experts=8)
if sys.argv[2] == "save":
    save(kexaone.KExaone(config), sys.argv[1])
else:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load(sys.argv[1])
    # pages of the mapped file count too, but are the file's, so look at memory that is ours
    status = open("/proc/self/status").read()
    print([line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")][0])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to tell own memory from mapped files")

    def run(job: str) -> str:
        command = [sys.executable, "-c", program, str(tmp_path / "m"), job]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("save")
    own = int(run("load").split()[-1]) * 1024
    # torch itself takes about 200 MB
    assert size < own < 1.5 * size + 400e6


DAMAGE = {
    "truncated": "truncated",
    "missing tensor": "is missing",
    "wrong shape": "has shape",
    "NaN": "NaN",
    "left over": "no tensor of this model",
    "integer": "dtype",
    "garbage": "header",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path, kind):
    folder = tmp_path / "m"
    saved(folder, max_shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][Q_PROJ]
    tensors = load_file(file)
    named = Q_PROJ
    if kind == "truncated":
        data = file.read_bytes()
        file.write_bytes(data[:-10])
        named = None
    elif kind == "garbage":
        file.write_bytes(b"\xff" * 1000)
        named = None
    elif kind == "left over":
        named = "model.layers.0.self_attn.extra.weight"
        tensors[named] = torch.zeros(2)
        index["weight_map"][named] = file.name
    elif kind == "missing tensor":
        del tensors[Q_PROJ], index["weight_map"][Q_PROJ]
    elif kind == "wrong shape":
        tensors[Q_PROJ] = tensors[Q_PROJ].T.contiguous()
    elif kind == "NaN":
        tensors[Q_PROJ][3, 4] = float("nan")
    elif kind == "integer":
        tensors[Q_PROJ] = tensors[Q_PROJ].int()
    if kind not in ("truncated", "garbage"):
        save_file(tensors, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = str(error.value)
    assert DAMAGE[kind] in message and "\n" not in message
    assert named is None or named in message
    assert file.name in message or kind == "missing tensor"


@pytest.mark.parametrize("target", ["../m.safetensors", "/etc/passwd", "..", "", 3, "a\\b"])
def test_an_index_cannot_point_outside(tmp_path, target):
    folder = tmp_path / "m"
    saved(folder, max_shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][Q_PROJ] = target
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no file name in its folder") as error:
        load(folder)
    assert Q_PROJ in str(error.value)


def test_missing_pieces_of_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "none")
    folder = tmp_path / "m"
    saved(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_every_truncation_is_refused(tmp_path):
    """Cut a file at many places: each is an error, none a partly loaded model or a crash."""
    saved(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(tmp_path / "m")


def test_options_are_checked(tmp_path):
    saved(tmp_path / "m")
    with pytest.raises(ValueError, match="fp8 must be"):
        load(tmp_path / "m", fp8="widen")
    with pytest.raises(ValueError, match="dtype must be"):
        load(tmp_path / "m", dtype=torch.int8)
    with pytest.raises(ValueError, match="max_shard_bytes"):
        save(random_model(CONFIG), tmp_path / "m", max_shard_bytes=0)


def test_saving_replaces_weights_and_keeps_other_files(tmp_path):
    saved(tmp_path / "m", max_shard_bytes=20_000)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    model = random_model(CONFIG, seed=1)
    save(model, tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert_equal_states(model, load(tmp_path / "m"))
    assert os.listdir(tmp_path) == ["m"]


def test_a_save_that_fails_changes_nothing(tmp_path):
    model = saved(tmp_path / "m")
    broken = random_model(CONFIG)
    with torch.no_grad():
        broken.get_parameter(Q_PROJ)[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=Q_PROJ):
        save(broken, tmp_path / "m")
    # a limit on file size stands in for a full disk
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            save(random_model(CONFIG, seed=1), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_equal_states(model, load(tmp_path / "m"))
    assert os.listdir(tmp_path) == ["m"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        save(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
