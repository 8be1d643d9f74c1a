"""Reading and writing Hugging Face `config.json`, in both generations of its fields.

The first uploads describe layers by redundant lists (`is_moe_layer`, string patterns such as
"LLLG"), later ones by `layer_types` and `mlp_layer_types`; K-EXAONE-2 adds `sliding_windows`,
`swiglu_limits` and `mtp_num_speculative_steps`. Whatever a file states twice must agree.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .config import FULL, MAX_INTEGER, SLIDING, Config, ConfigError

ARCHITECTURES = ("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM")
PLAIN = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
]
OPTIONAL = [
    "num_experts_per_tok",
    "num_shared_experts",
    "routed_scaling_factor",
    "norm_topk_prob",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "pad_token_id",
]
MAX_LAYERS = 10_000
# the only value this architecture has for each; another one means another model
FIXED = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "n_group": (1,),
    "topk_group": (1,),
    "attention_dropout": (0, 0.0),
    "attention_bias": (False,),
}


def from_hf(source: dict[str, Any] | str | os.PathLike[str]) -> Config:
    """The Config that a `config.json` (dict, file or folder) describes. Raises ConfigError."""
    hf = source if isinstance(source, dict) else _read(Path(source))
    _check_identity(hf)
    missing = [name for name in (*PLAIN, "num_hidden_layers") if hf.get(name) is None]
    if missing:
        raise ConfigError(f"config lacks {', '.join(missing)}")
    layers = _integer(hf, "num_hidden_layers", 1, MAX_LAYERS)
    fields = {name: hf[name] for name in PLAIN}
    fields |= {name: hf[name] for name in OPTIONAL if hf.get(name) is not None}
    fields |= {
        name: None for name in ("bos_token_id", "pad_token_id") if name in hf and hf[name] is None
    }
    eos = hf.get("eos_token_id")
    return Config(
        **fields,
        head_dim=_head_dim(hf),
        windows=_windows(hf, layers),
        first_k_dense_replace=_dense_layers(hf, layers),
        swiglu_limits=tuple(x or 0.0 for x in _listed(hf, "swiglu_limits", layers) or ()),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        rope_theta=_rope_theta(hf),
        **_mtp(hf),
    )


def to_hf(config: Config) -> dict[str, Any]:
    """The dict to write as `config.json`; read by transformers and by `from_hf`."""
    windowed = sorted({w for w in config.windows if w})
    sliding = [w > 0 for w in config.windows]
    dense = config.first_k_dense_replace
    eos = list(config.eos_token_ids)
    hf: dict[str, Any] = {name: getattr(config, name) for name in (*PLAIN, *OPTIONAL)}
    hf |= {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "exaone_moe",
        "num_hidden_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": dense,
        "layer_types": [SLIDING if s else FULL for s in sliding],
        "mlp_layer_types": [
            "dense" if i < dense else "sparse" for i in range(config.num_hidden_layers)
        ],
        "sliding_windows": list(config.windows),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "num_nextn_predict_layers": len(config.mtp_windows),
        "mtp_layer_types": [SLIDING if w else FULL for w in config.mtp_windows],
        "mtp_sliding_windows": list(config.mtp_windows),
        "mtp_num_speculative_steps": config.mtp_steps,
    }
    # transformers turns RoPE on everywhere exactly when sliding_window is null
    hf["sliding_window"] = (
        windowed[0] if len(windowed) == 1 else None if not windowed else min(windowed)
    )
    if len(windowed) > 1:
        # one number cannot state several windows: the list alone does
        del hf["sliding_window"]
    if any(config.swiglu_limits):
        hf["swiglu_limits"] = list(config.swiglu_limits)
    return hf


def _read(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _check_identity(hf: dict[str, Any]) -> None:
    model_type = hf.get("model_type", "exaone_moe")
    if model_type != "exaone_moe":
        raise ConfigError(f"model_type must be 'exaone_moe', got {model_type!r}")
    architectures = hf.get("architectures") or []
    if not isinstance(architectures, list) or any(x not in ARCHITECTURES for x in architectures):
        raise ConfigError(f"architectures must be [{ARCHITECTURES[0]!r}], got {architectures!r}")
    for name, allowed in FIXED.items():
        if hf.get(name) is not None and hf[name] not in allowed:
            raise ConfigError(f"{name} must be {allowed[0]!r}, got {hf[name]!r}")


def _integer(hf: dict[str, Any], name: str, least: int, most: int) -> int:
    value = hf.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name} must be an integer in {least}..{most}, got {value!r}")
    return value


def _head_dim(hf: dict[str, Any]) -> Any:
    if hf.get("head_dim") is not None:
        return hf["head_dim"]
    size, heads = (
        _integer(hf, name, 1, MAX_INTEGER) for name in ("hidden_size", "num_attention_heads")
    )
    if size % heads:
        raise ConfigError("config lacks head_dim, and hidden_size is no multiple of the heads")
    return size // heads


def _agree(name: str, stated: dict[str, list[Any]]) -> list[Any] | None:
    """The one value that all sources state; None if no source does."""
    values = list(stated.items())
    for source, value in values[1:]:
        if value != values[0][1]:
            raise ConfigError(f"{values[0][0]} and {source} contradict each other about {name}")
    return values[0][1] if values else None


def _listed(hf: dict[str, Any], name: str, layers: int) -> list[Any] | None:
    value = hf.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != layers:
        size = len(value) if isinstance(value, list) else repr(value)
        raise ConfigError(f"{name} must list one entry per layer ({layers}), got {size}")
    return value


def _types_to_flags(name: str, types: list[Any]) -> list[bool]:
    for entry in types:
        if entry not in (SLIDING, FULL):
            raise ConfigError(f"{name} entries must be {SLIDING!r} or {FULL!r}, got {entry!r}")
    return [entry == SLIDING for entry in types]


def _listed_windows(hf: dict[str, Any], name: str, layers: int) -> list[int] | None:
    listed = _listed(hf, name, layers)
    if listed is None:
        return None
    windows = [0 if w is None else w for w in listed]
    for window in windows:
        if type(window) is not int or window < 0:
            raise ConfigError(f"{name} must hold integers >= 0, got {window!r}")
    return windows


def _windows(hf: dict[str, Any], layers: int) -> tuple[int, ...]:
    stated: dict[str, list[bool]] = {}
    types = _listed(hf, "layer_types", layers)
    if types is not None:
        stated["layer_types"] = _types_to_flags("layer_types", types)
    listed = _listed_windows(hf, "sliding_windows", layers)
    if listed is not None:
        stated["sliding_windows"] = [w > 0 for w in listed]
    if not stated:
        stated["sliding_window_pattern"] = _pattern(hf, layers)
    sliding = _agree("which layers are windowed", stated)
    assert sliding is not None
    window = hf.get("sliding_window")
    if listed is not None:
        distinct = sorted({w for w in listed if w})
        # one scalar cannot contradict a list of several windows, only a uniform one
        if window is not None and len(distinct) == 1 and distinct != [window]:
            raise ConfigError(f"sliding_window {window!r} contradicts sliding_windows {distinct}")
        return tuple(listed)
    if not any(sliding):
        return (0,) * layers
    if type(window) is not int or window < 1:
        raise ConfigError(f"windowed layers need sliding_window >= 1, got {window!r}")
    return tuple(window if s else 0 for s in sliding)


def _pattern(hf: dict[str, Any], layers: int) -> list[bool]:
    """Which layers are windowed by `sliding_window_pattern`: an int period or a string of L, G."""
    pattern = hf.get("sliding_window_pattern", 4)
    if hf.get("sliding_window") is None or pattern is None or pattern == 0:
        return [False] * layers
    if type(pattern) is int and pattern > 0:
        return [(i + 1) % pattern != 0 for i in range(layers)]
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        return [pattern[i % len(pattern)] == "L" for i in range(layers)]
    raise ConfigError(
        f"sliding_window_pattern must be a period or a string of L and G, got {pattern!r}"
    )


def _dense_layers(hf: dict[str, Any], layers: int) -> int:
    stated: dict[str, list[bool]] = {}
    types = _listed(hf, "mlp_layer_types", layers)
    if types is not None:
        for entry in types:
            if entry not in ("dense", "sparse"):
                raise ConfigError(
                    f"mlp_layer_types entries must be 'dense' or 'sparse', got {entry!r}"
                )
        stated["mlp_layer_types"] = [t == "sparse" for t in types]
    flags = _listed(hf, "is_moe_layer", layers)
    if flags is not None:
        for flag in flags:
            if flag not in (0, 1):
                raise ConfigError(f"is_moe_layer entries must be true or false, got {flag!r}")
        stated["is_moe_layer"] = [bool(f) for f in flags]
    if hf.get("first_k_dense_replace") is not None:
        first = _integer(hf, "first_k_dense_replace", 0, layers)
        stated["first_k_dense_replace"] = [i >= first for i in range(layers)]
    sparse = _agree("which layers are sparse", stated)
    if sparse is None:
        return min(1, layers)
    if sparse != sorted(sparse):
        raise ConfigError("dense layers must come before all mixture-of-experts layers")
    return sparse.count(False)


def _rope_theta(hf: dict[str, Any]) -> Any:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rope_type must be 'default' (no scaling), got {kind!r}")
    stated = [t for t in (rope.get("rope_theta"), hf.get("rope_theta")) if t is not None]
    if any(theta != stated[0] for theta in stated):
        raise ConfigError(f"rope_theta and rope_parameters contradict each other: {stated}")
    return stated[0] if stated else 1_000_000.0


def _mtp(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of the MTP block. The first upload does not mention it; its weights are there."""
    count = {"num_nextn_predict_layers": hf.get("num_nextn_predict_layers", 1) or 0}
    layers = _integer(count, "num_nextn_predict_layers", 0, MAX_LAYERS)
    stated: dict[str, list[bool]] = {}
    types = _listed(hf, "mtp_layer_types", layers)
    if types is not None:
        stated["mtp_layer_types"] = _types_to_flags("mtp_layer_types", types)
    windows = _listed_windows(hf, "mtp_sliding_windows", layers)
    if windows is not None:
        stated["mtp_sliding_windows"] = [w > 0 for w in windows]
    sliding = _agree("which MTP layers are windowed", stated)
    if windows is None:
        window = hf.get("sliding_window") or 0
        windows = [window if s else 0 for s in sliding] if sliding else [0] * layers
    steps = hf.get("mtp_num_speculative_steps")
    return {"mtp_windows": tuple(windows), "mtp_steps": (steps or 1) if layers else 0}
