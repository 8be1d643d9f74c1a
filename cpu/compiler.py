"""The compiler half of the Triton plug-in: TTIR passes, then C++, then a shared object.

Triton imports this module in every process that imports Triton, so it loads nothing heavy:
the stages import what they need when they run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend as _Base
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Options:
    """Compile options. GPU-only ones are accepted, because kernels pass them, and ignored."""

    num_warps: int = 4
    num_ctas: int = 1
    num_stages: int = 3
    warp_size: int = 1
    enable_fp_fusion: bool = False
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False
    extern_libs: tuple = ()
    debug: bool = False
    sanitize_overflow: bool = False
    checked: bool = False
    arch: str = ""
    backend_name: str = "cpu"
    instrumentation_mode: str = ""
    fpsan_homomorphic_casts: bool = False
    supported_fp8_dtypes: tuple[str, ...] = ("fp8e4nv", "fp8e5")
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0
    maxnreg: int | None = None
    min_shared_mem: int | None = None
    ptx_options: str | None = None
    ptx_version: int | None = None
    ir_override: str | None = None
    enable_reflect_ftz: bool = True
    sched4reg: bool = False
    clc: bool = False
    cluster_dims: tuple[int, ...] = (1, 1, 1)
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    kpack: int = 1
    allow_flush_denorm: bool = False
    schedule_hint: str = "none"
    min_dot_size: tuple[int, int, int] = (1, 1, 1)

    def hash(self) -> str:
        return hashlib.sha256(repr(sorted(self.__dict__.items())).encode()).hexdigest()


class CpuBackend(_Base):
    """Compiles a kernel for the processor this process runs on."""

    binary_ext = "so"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        from .store import require_folder
        from .target import build_key

        require_folder()
        return hashlib.sha256(build_key().encode()).hexdigest()

    def parse_options(self, options: dict[str, Any]) -> Options:
        known = {f.name for f in fields(Options)}
        given: dict[str, Any] = {k: v for k, v in options.items() if k in known and v is not None}
        if "checked" not in given:
            from .activation import checking

            given["checked"] = checking()
        if given["checked"]:
            # Triton then asserts that signed integer arithmetic does not overflow
            given.update(debug=True, sanitize_overflow=True)
        # lists come from JSON
        frozen: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
        }
        return Options(**frozen)

    # a default for `language`, which the base class of Triton 3.8 does not have
    def add_stages(self, stages: dict, options: Any, language: Any = None) -> None:
        from . import stages as pipeline
        from .store import require_room

        require_room()
        stages["ttir"] = lambda module, metadata: pipeline.make_ttir(module, metadata, options)
        stages["cpp"] = lambda module, metadata: pipeline.make_cpp(module, metadata, options)
        stages["so"] = lambda source, metadata: pipeline.make_so(source, metadata)

    def load_dialects(self, context: Any) -> None:
        pass

    def get_codegen_implementation(self, options: Options) -> dict[str, Any]:
        from .stages import convert_custom_float

        return {
            "min_dot_size": lambda lhs, rhs: options.min_dot_size,
            "convert_custom_types": convert_custom_float,
        }

    def get_module_map(self) -> dict[str, ModuleType]:
        from triton.language.extra.cuda import libdevice

        return {"triton.language.extra.libdevice": libdevice}

    def pack_metadata(self, metadata: Any) -> Any:
        return metadata
