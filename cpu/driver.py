"""The driver half of the Triton plug-in. Imported by every `import triton`: keep it light."""

from __future__ import annotations

import os
from typing import Any

from triton.backends.driver import DriverBase as _Base

# Never equal to a device number of another driver: Triton caches kernels by it.
DEVICE = -1


class _Utilities:
    """What Triton and kernel libraries ask of a device."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 1 << 30,
            "multiprocessor_count": os.cpu_count() or 1,
            "max_num_regs": 1 << 20,
            "warpSize": 1,
            "sm_clock_rate": 1_000_000,
            "mem_clock_rate": 1_000_000,
            "mem_bus_width": 64,
        }

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple:
        from .launch import load

        module, function = load(name, binary)
        return module, function, 0, 0, 1 << 20

    @staticmethod
    def unload_module(module: Any) -> None:
        """Kernels stay loaded: another thread may still run them."""

    @staticmethod
    def set_printf_fifo_size(size: int) -> None:
        """Printing is not buffered here."""


class CpuDriver(_Base):
    """Runs compiled kernels on the processor."""

    utils = _Utilities()

    @classmethod
    def is_active(cls) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Only when asked: `KEXAONE_CPU=1` or `TRITON_DEFAULT_BACKEND=cpu`."""
        asked = os.environ.get("KEXAONE_CPU", "0") not in ("", "0")
        return asked or os.environ.get("TRITON_DEFAULT_BACKEND") == "cpu"

    @property
    def launcher_cls(self) -> Any:
        from .launch import make_launcher

        return make_launcher

    def map_python_to_cpp_type(self, ty: str) -> str:
        if ty.startswith("*"):
            return "void*"
        floats = {"fp64": "double", "fp32": "float", "fp16": "uint16_t", "bf16": "uint16_t"}
        return floats.get(ty) or ("int8_t" if ty in ("i1", "u1") else f"{ty.replace('i', 'int')}_t")

    def get_current_device(self) -> int:
        from .activation import checking

        # kernels with checks are other kernels
        return DEVICE - 1 if checking() else DEVICE

    def set_current_device(self, device: int) -> None:
        """There is one device."""

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        from .target import host_isa

        return GPUTarget("cpu", host_isa().name, 1)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        from . import timing

        return timing

    def get_benchmarker(self) -> Any:
        from triton.testing import do_bench

        return do_bench

    def get_empty_cache_for_benchmark(self) -> Any:
        import torch

        return torch.empty(64 << 20, dtype=torch.int8)

    def clear_cache(self, cache: Any) -> None:
        cache.zero_()
