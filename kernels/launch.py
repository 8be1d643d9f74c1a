"""Running a Triton kernel where its tensors are, and registering it as a PyTorch op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..cpu.activation import active
from .arch import targeted

_library = torch.library.Library("kexaone", "FRAGMENT")
_kernels: dict[str, Callable[..., Any]] = {}
_allocate = torch.empty


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size` elements."""
    return (size + block - 1) // block


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Unwritten contiguous memory for a kernel's output, on the device of `like`."""
    return _allocate(shape, dtype=dtype or like.dtype, device=like.device)


def on(x: Tensor) -> AbstractContextManager[Any]:
    """The scope in which Triton kernels run on the device of `x`."""
    if x.device.type == "meta":
        return nullcontext()
    return active() if x.device.type == "cpu" else torch.cuda.device(x.device)


def rows(x: Tensor) -> Tensor:
    """`x` as [rows, columns] with unit column stride; a copy only where no view will do."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def register(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define `kexaone::<schema>` with its kernel, shape function and gradient; returns the op."""

    def shapes(*args: Any, **named: Any) -> Any:
        return (fake if targeted() is None else kernel)(*args, **named)

    name = schema.split("(")[0]
    _kernels[f"kexaone::{name}"] = kernel
    _library.define(schema)
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"kexaone::{name}", shapes, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"kexaone::{name}", backward, setup_context=setup_context, lib=_library
        )
    return getattr(torch.ops.kexaone, name).default


def kernel_of(op: Any) -> Callable[..., Any] | None:
    """What a registered op runs; None if the op is not one of ours."""
    return _kernels.get(op.name().removesuffix(".default"))


def require(holds: bool, message: str) -> None:
    """Raises ValueError with the message unless `holds`."""
    if not holds:
        raise ValueError(message)
