"""Fresh memory that can be told from written memory: `torch.empty` fills it with a pattern."""

from __future__ import annotations

from typing import Any

from torch import Tensor, int16, uint8
from torch.utils._python_dispatch import TorchDispatchMode

# bytes f5 7f: a NaN in bf16, fp16 and fp32 that no arithmetic produces (runtime/kx_check.h)
_PATTERN = 0x7FF5
_FRESH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "empty_permuted",
}


class PoisonedEmpty(TorchDispatchMode):
    """In this scope, CPU tensors that PyTorch leaves unwritten hold the pattern."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[-1].split(".")[0]
        if name in _FRESH and isinstance(out, Tensor) and out.device.type == "cpu":
            _fill(out)
        return out


def _fill(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    if tensor.element_size() < 2 or storage.nbytes() == 0:
        return
    whole = tensor.new_empty(0, dtype=uint8).set_(storage)  # pyright: ignore[reportArgumentType]
    even = storage.nbytes() // 2 * 2
    whole[:even].view(int16).fill_(_PATTERN)
