"""Config: presets, exact parameter counts, both generations of config.json, contradictions."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexaone import Config, KExaone
from kexaone.model.config import PRESETS, ConfigError

# as the released config states the model, with none of our own defaults
RELEASED = {
    "model_type": "exaone_moe",
    "architectures": ["ExaoneMoEForCausalLM"],
    "hidden_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 18432,
    "vocab_size": 153600,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 2.5,
    "sliding_window": 128,
    "sliding_window_pattern": "LLLG",
    "rope_theta": 1000000,
    "is_moe_layer": [0] + [1] * 47,
    "bos_token_id": 1,
    "eos_token_id": 53,
    "pad_token_id": 0,
}


def test_released_counts_are_exact():
    counts = Config.preset("k-exaone-236b").parameter_counts()
    assert counts["main"] == 236_571_156_352
    assert counts["mtp"] == 528_513_280
    assert counts["total"] == 237_099_669_632


def test_second_model_counts():
    # 1,498,715,008,512 bytes of bfloat16 with float32 biases
    config = Config.preset("k-exaone-2-750b")
    biases = 76 * 256
    assert 2 * config.parameter_counts()["total"] + 2 * biases == 1_498_715_008_512


@pytest.mark.parametrize("name", PRESETS)
def test_counts_match_the_instantiated_model(name):
    config = Config.preset(name)
    with torch.device("meta"):
        model = KExaone(config)
    sizes = {k: t.numel() for k, t in model.state_dict().items()}
    counts = config.parameter_counts()
    assert sum(sizes.values()) == counts["total"]
    assert sum(n for k, n in sizes.items() if k.startswith("mtp.")) == counts["mtp"]
    assert (
        sum(n for k, n in sizes.items() if ".self_attn." in k and "mtp" not in k)
        == (counts["attention"])
    )
    assert sum(n for k, n in sizes.items() if ".experts." in k) == counts["routed_experts"]
    assert sum(n for k, n in sizes.items() if ".gate." in k) == counts["router"]


def test_first_generation_equals_preset():
    assert Config.from_hf(RELEASED) == Config.preset("k-exaone-236b")


def test_second_generation_equals_preset(tmp_path):
    config = Config.preset("k-exaone-236b")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert Config.from_hf(tmp_path) == Config.from_hf(tmp_path / "config.json") == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name):
    config = Config.preset(name)
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_transformers_reads_what_we_write():
    from transformers import ExaoneMoeConfig

    config = Config.preset("mini")
    other = ExaoneMoeConfig(**config.to_hf())
    assert Config.from_hf(other.to_dict()) == config


def test_missing_head_dim_falls_back_to_the_quotient():
    hf = RELEASED | {"head_dim": None, "hidden_size": 8192}
    assert Config.from_hf(hf).head_dim == 128
    with pytest.raises(ConfigError, match="head_dim"):
        Config.from_hf(RELEASED | {"head_dim": None, "num_attention_heads": 60})


@given(st.integers(1, 9), st.integers(2, 12))
def test_integer_and_string_patterns_agree(period, layers):
    string = "L" * (period - 1) + "G"
    base = {k: v for k, v in RELEASED.items() if k != "is_moe_layer"} | {
        "num_hidden_layers": layers
    }
    a = Config.from_hf(base | {"sliding_window_pattern": string})
    b = Config.from_hf(base | {"sliding_window_pattern": period})
    assert a == b


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["full_attention"] * 48, "sliding_windows": [128] * 48}, "contradict"),
        ({"layer_types": ["full_attention"] * 47}, "one entry per layer"),
        ({"layer_types": ["other"] * 48}, "layer_types"),
        ({"sliding_windows": [64] * 48}, "contradicts"),
        ({"mlp_layer_types": ["sparse"] * 48}, "contradict"),
        ({"is_moe_layer": [1, 0] * 24}, "before all"),
        ({"first_k_dense_replace": 2}, "contradict"),
        ({"sliding_window_pattern": "LLXG"}, "pattern"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
        ({"num_key_value_heads": 7}, "multiple"),
        ({"num_experts_per_tok": 129}, "exceed"),
        ({"hidden_size": "6144"}, "hidden_size"),
        ({"hidden_size": -1}, "positive"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"n_group": 8}, "n_group"),
        ({"model_type": "llama"}, "model_type"),
        ({"eos_token_id": 153600}, "special token"),
        ({"vocab_size": None}, "vocab_size"),
        ({"mtp_layer_types": ["full_attention"], "mtp_sliding_windows": [128]}, "contradict"),
        ({"swiglu_limits": [7.0]}, "swiglu_limits"),
    ],
)
def test_contradictions_are_one_clear_line(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Config.from_hf(RELEASED | change)
    assert "\n" not in str(caught.value)


ODD = [
    0, -1, 1, 1.5, True, "", "x", "128", [], [None], [[1]], ["a"], {}, {"a": 1},
    float("nan"), float("inf"), 1e39, 10**30, -(10**30), 2**31, 2**63, [10**30], [float("nan")],
]  # fmt: skip
KEYS = {*RELEASED, *Config.preset("k-exaone-2-750b").to_hf(), "rope_scaling", "attention_bias"}


@pytest.mark.parametrize("key", sorted(KEYS))
def test_odd_values_are_refused_or_survive(key):
    """Whatever a damaged file states, there is no other error, and no wait for huge numbers."""
    for base in (RELEASED, Config.preset("k-exaone-2-750b").to_hf()):
        for value in ODD:
            try:
                config = Config.from_hf(base | {key: value})
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) < 250
            else:
                assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("key", ["architectures", "rope_parameters", "is_moe_layer"])
def test_lists_and_objects_are_checked(key):
    for value in (5, "x" * 48, ["x"] * 48):
        with pytest.raises(ConfigError, match=key):
            Config.from_hf(RELEASED | {key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"windows": 3}, "windows must be a list"),
        ({"windows": (3, -1)}, "windows must be >= 0, got -1"),
        ({"windows": (1.0,)}, "windows: expected a finite integer"),
        ({"eos_token_ids": (True,)}, "eos_token_ids: expected"),
        ({"bos_token_id": "1"}, "bos_token_id: expected"),
        ({"swiglu_limits": (float("nan"),) * 8}, "swiglu_limits: expected a finite number"),
        ({"initializer_range": -0.1}, "initializer_range must be >= 0"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, "parameters"),
        ({"tie_word_embeddings": 1}, "true or false"),
    ],
)
def test_fields_are_checked(change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(Config.preset("mini"), **change)


def test_layers_without_a_clamp_may_be_null():
    hf = Config.preset("k-exaone-2-750b").to_hf()
    hf["swiglu_limits"] = [x or None for x in hf["swiglu_limits"]]
    hf["sliding_windows"] = [x or None for x in hf["sliding_windows"]]
    assert Config.from_hf(hf) == Config.preset("k-exaone-2-750b")


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot read"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="object"):
        Config.from_hf(tmp_path)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError, match="k-exaone-236b"):
        Config.preset("nope")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config.preset("mini").hidden_size = 1  # type: ignore[misc]
