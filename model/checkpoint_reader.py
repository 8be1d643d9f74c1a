"""Reading weights one at a time from checkpoint files to where they stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import checkpoint_names as names
from .checkpoint_files import DTYPES, FP8, CheckpointError, Entry
from .fp8 import BLOCK, Fp8Linear, dequantize, scale_shape
from .moe import Experts
from .transformer import KExaone


@dataclass(frozen=True)
class Source:
    """A piece of a parameter, the tensor it comes from, and the scales if that is float8."""

    piece: names.Piece
    entry: Entry
    scale: Entry | None


class WeightReader:
    """Reads tensors one at a time and closes each file after its last one."""

    def __init__(
        self,
        plan: dict[str, list[Source]],
        entries: dict[str, Entry],
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        keep: bool,
    ) -> None:
        self.dtype, self.device, self.keep = dtype, device, keep
        embedding = DTYPES[entries[names.EMBEDDING].dtype]
        self.main = torch.bfloat16 if embedding == DTYPES[FP8] else embedding
        sources = [source for group in plan.values() for source in group]
        self.left = Counter(e.file for s in sources for e in (s.entry, s.scale) if e is not None)
        self.open: dict[Path, Any] = {}

    def fill(self, model: KExaone, parameter: str, sources: list[Source]) -> None:
        """Replace a parameter or buffer on the meta device by its values."""
        path, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(path)
        shape = getattr(module, leaf).shape
        if self.keep and self._can_keep(module, sources):
            self._fill_fp8(model, path, leaf, shape, sources)
            return
        tensor = torch.empty(shape, dtype=self._dtype_of(parameter, sources), device=self.device)
        for source in sources:
            goal = tensor[source.piece.index]
            scales = None if source.scale is None else torch.cat(list(self._parts(source.scale)))
            for i, part in enumerate(self._parts(source.entry)):
                # a fused tensor comes expert by expert, anything else in one part
                at = goal[i : i + 1] if goal.dim() == 3 else goal
                if scales is not None:
                    scale = scales[i : i + 1] if goal.dim() == 3 else scales
                    part = dequantize(part, scale, dtype=tensor.dtype)
                at.copy_(self._finite(part.to(tensor.dtype), source.entry))
        trainable = isinstance(getattr(module, leaf), nn.Parameter)
        setattr(module, leaf, nn.Parameter(tensor) if trainable else tensor)

    def _fill_fp8(
        self, model: KExaone, path: str, leaf: str, shape: torch.Size, sources: list[Source]
    ) -> None:
        values = torch.empty(shape, dtype=DTYPES[FP8], device=self.device)
        scales = torch.empty(scale_shape(shape), device=self.device)
        for source in sources:
            assert source.scale is not None
            scale = torch.cat(list(self._parts(source.scale))).float()
            scales[source.piece.scale_index] = self._finite(scale, source.scale).to(self.device)
            goal = values[source.piece.index]
            for i, part in enumerate(self._parts(source.entry)):
                self._finite(part.float(), source.entry)
                (goal[i : i + 1] if goal.dim() == 3 else goal).copy_(part)
        module = model.get_submodule(path)
        if isinstance(module, Experts):
            setattr(module, leaf, nn.Parameter(values, requires_grad=False))
            setattr(module, f"{leaf}_scale", scales)
        else:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, Fp8Linear(values, scales))

    def _can_keep(self, module: nn.Module, sources: list[Source]) -> bool:
        if not isinstance(module, nn.Linear | Experts) or any(s.scale is None for s in sources):
            return False
        # blocks of gate and up stack only if gate ends on a block
        return not isinstance(module, Experts) or module.down_proj.shape[-1] % BLOCK == 0

    def _dtype_of(self, parameter: str, sources: list[Source]) -> torch.dtype:
        if parameter.endswith(names.BIAS_IN_MEMORY):
            return torch.float32
        if self.dtype is not None:
            return self.dtype
        stored = [self.main if s.scale is not None else DTYPES[s.entry.dtype] for s in sources]
        return reduce(torch.promote_types, stored)

    def _parts(self, entry: Entry) -> Iterator[Tensor]:
        """The tensor in one part, or [1, R, C] slices of it if it has three dimensions."""
        try:
            if entry.file not in self.open:
                self.open[entry.file] = safe_open(entry.file, framework="pt", device="cpu")
            if len(entry.shape) == 3:
                stored = self.open[entry.file].get_slice(entry.name)
                for i in range(entry.shape[0]):
                    yield stored[i : i + 1]
            else:
                yield self.open[entry.file].get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {entry.name} in {entry.file}: {error}") from None
        self.left[entry.file] -= 1
        if self.left[entry.file] <= 0:
            self.open.pop(entry.file, None)

    @staticmethod
    def _finite(tensor: Tensor, entry: Entry) -> Tensor:
        if not torch.isfinite(tensor).all():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{entry.name} in {entry.file} has NaN or infinite values (read as {kind})"
            )
        return tensor

    def check_tied(self, model: KExaone, head: Entry | None) -> None:
        """Raise if a stored output head differs from the embedding it is tied to."""
        if head is None or head.dtype == FP8:
            return
        tied = model.model.embed_tokens.weight.detach()
        for part in self._parts(head):
            if not torch.equal(part.to(tied.dtype), tied.cpu()):
                raise CheckpointError(
                    f"{head.name} in {head.file} differs from {names.EMBEDDING}, but "
                    "config.json ties them"
                )
