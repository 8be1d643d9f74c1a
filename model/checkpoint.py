"""Loading and saving a model as a folder of safetensors files.

A folder is checked completely - every header, name, shape and dtype - before a weight is read;
weights then go one by one from the file to where they stay. Saving replaces the folder in one step.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_directory
from . import checkpoint_names as names
from .checkpoint_files import DTYPES, FP8, INDEX, SINGLE, CheckpointError, Entry, entries_of
from .checkpoint_reader import Source, WeightReader
from .config import Config, ConfigError
from .fp8 import BLOCK, scale_shape
from .quantization import quantize_weights
from .transformer import KExaone


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    fp8: Literal["dequantize", "keep", "quantize"] = "dequantize",
) -> KExaone:
    """The model in a folder of `config.json` and safetensors files, in evaluation mode.

    Args:
        folder: holds `model.safetensors`, or an index and the shards it names.
        dtype: floating dtype of all weights but the router bias, which is always float32. None
            keeps the dtype of each tensor, and widens float8 to that of the embedding.
        device: where the weights go.
        fp8: "dequantize" widens float8 weights; "keep" keeps those of linear layers and experts
            with their scales, without gradient. An expert width that is no multiple of 128 is
            widened even so: gate and up have their own blocks, which do not stack. "quantize"
            keeps them, and makes float8 what is wider (see `quantize_weights`).

    Raises:
        CheckpointError: if the folder is missing, damaged, or does not fit its configuration, or
            if a weight is NaN or infinite. The message names the tensor and the file.
        ValueError: on an unknown `dtype` or `fp8`.
    """
    if fp8 not in ("dequantize", "keep", "quantize"):
        raise ValueError(f"fp8 must be 'dequantize', 'keep' or 'quantize', got {fp8!r}")
    if dtype is not None and dtype not in [DTYPES[x] for x in DTYPES if x != FP8]:
        raise ValueError(f"dtype must be a floating dtype of at least 16 bits, got {dtype}")
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: {folder}")
    try:
        config = Config.from_hf(folder)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    entries = entries_of(folder)
    if config.mtp_windows and not names.has_mtp(entries):
        # transformers saves an ExaoneMoe model without it, but keeps the configuration
        config = dataclasses.replace(config, mtp_windows=(), mtp_steps=0)
    with torch.device("meta"):
        model = KExaone(config)
    plan = _plan(model, entries, folder)
    loader = WeightReader(
        plan, entries, dtype=dtype, device=torch.device(device), keep=fp8 != "dequantize"
    )
    for parameter, sources in plan.items():
        loader.fill(model, parameter, sources)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
        loader.check_tied(model, entries.get(names.HEAD))
    if fp8 == "quantize":
        quantize_weights(model)
    return model.eval()


def _plan(model: KExaone, entries: dict[str, Entry], folder: Path) -> dict[str, list[Source]]:
    """Where each parameter comes from, if nothing is missing, misshapen or left over."""
    plan, used = {}, set()
    for parameter, meta in model.state_dict().items():
        if parameter == names.HEAD and model.config.tie_word_embeddings:
            if parameter in entries:
                _expect(entries[parameter], tuple(meta.shape))
                used.add(parameter)
            continue
        sources = []
        for piece in names.pieces(parameter, tuple(meta.shape), entries):
            if piece.name not in entries:
                raise CheckpointError(
                    f"{piece.name} of shape {list(piece.shape)} is missing in {folder}"
                )
            entry = entries[piece.name]
            _expect(entry, piece.shape)
            scale = _scale_entry(entry, entries) if entry.dtype == FP8 else None
            sources.append(Source(piece, entry, scale))
            used |= {entry.name} if scale is None else {entry.name, scale.name}
        plan[parameter] = sources
    for name, entry in entries.items():
        if name not in used and not names.is_ignorable(name):
            raise CheckpointError(f"{entry.file} has {name}, which is no tensor of this model")
    return plan


def _expect(entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.name} in {entry.file} has shape {list(entry.shape)}, expected {list(shape)}"
        )
    if entry.dtype not in DTYPES or (entry.dtype == FP8 and len(shape) < 2):
        raise CheckpointError(
            f"{entry.name} in {entry.file} has dtype {entry.dtype}, which it must not have"
        )


def _scale_entry(entry: Entry, entries: dict[str, Entry]) -> Entry:
    name = names.scale_name(entry.name, entries)
    if name is None:
        raise CheckpointError(
            f"{entry.name} in {entry.file} is float8, but {entry.name}_scale is missing"
        )
    _expect(entries[name], scale_shape(entry.shape))
    if entries[name].dtype == FP8:
        raise CheckpointError(f"{name} in {entries[name].file} must not be float8 itself")
    return entries[name]


def save(
    model: KExaone, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Save as `config.json` and safetensors files in the released layout, experts one by one.

    Weights keep their dtype; those kept in float8 are saved with their scales. An existing folder
    is replaced in one step once everything is on disk; its other files, such as a tokenizer, stay.
    Nothing is copied: a file is written from the memory of the weights (of one shard on the CPU,
    if they are on another device).

    Args:
        model: any KExaone whose weights are finite.
        folder: created with its parents if missing.
        max_shard_bytes: a new file starts before this size is passed; one tensor may be larger.

    Raises:
        CheckpointError: if a weight is NaN or infinite; the folder is unchanged.
        OSError: if the disk is full or refuses; the folder is unchanged.
        ValueError: if `max_shard_bytes` is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    tensors = _stored(model)
    for name, tensor in tensors.items():
        values = tensor.float() if tensor.dtype == DTYPES[FP8] else tensor
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{name} has NaN or infinite values; {folder} was not written")
    shards = _shards(tensors, max_shard_bytes)
    total = sum(t.nbytes for t in tensors.values())
    with atomic_directory(folder) as new:
        weight_map = {}
        for i, shard in enumerate(shards):
            file = (
                SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            )
            weight_map |= dict.fromkeys(shard, file)
            _write({name: tensors[name].cpu().contiguous() for name in shard}, new / file)
        if len(shards) > 1:
            _write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, new / INDEX)
        _write_json(_config_json(model, tensors), new / "config.json")


def _stored(model: KExaone) -> dict[str, Tensor]:
    """Every tensor of a checkpoint under its released name; views of the model's own memory."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state[names.HEAD]
    stored = {}
    for parameter, tensor in state.items():
        if parameter.endswith("_scale"):
            continue
        scale = state.get(f"{parameter}_scale")
        for piece in names.released(parameter, tuple(tensor.shape)):
            stored[piece.name] = tensor[piece.index]
            if scale is not None:
                stored[f"{piece.name}_scale"] = scale[piece.scale_index]
    return stored


def _shards(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names per file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _config_json(model: KExaone, tensors: dict[str, Tensor]) -> dict[str, Any]:
    hf = model.config.to_hf()
    hf["dtype"] = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    if any(tensor.dtype == DTYPES[FP8] for tensor in tensors.values()):
        hf["quantization_config"] = _quantization_config(tensors)
    return hf


def _quantization_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """compressed-tensors' description of 128 x 128 blocks; `ignore` lists matrices kept wide."""
    wide = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight")
        and name != names.EMBEDDING
        and tensor.dim() == 2
        and tensor.dtype != DTYPES[FP8]
    ]
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": number
        | {"strategy": "block", "block_structure": [BLOCK, BLOCK], "dynamic": False},
        "input_activations": number | {"strategy": "group", "group_size": BLOCK, "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": wide,
    }


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # it knows the system's error only as text
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error


def _write_json(value: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
