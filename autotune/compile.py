"""Compiling a captured launch for a GPU that need not be present.

Arguments are specialised by Triton's own code for the target: pointers and integers divisible by
16, integers equal to 1, tensors under 2 GiB. Without that a different kernel would be measured.

Each kernel is compiled in a process of its own, several at a time: Triton and ptxas may abort on
what they cannot compile, which must cost one result and not the audit. Triton's cache on disk makes
the second run cheap.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ..kernels.arch import Arch
from . import gcn, sass
from .capture import Launch
from .machine import MachineCode

TIMEOUT = 600.0
"""Seconds after which a compilation counts as failed."""


@dataclass(frozen=True)
class Job:
    """All a fresh process needs to compile one kernel. `where` is `module:name`."""

    where: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    arch: Arch


@dataclass(frozen=True)
class Compiled:
    """The intermediate code and a reading of the machine code, or why there is none."""

    ttir: str = ""
    code: MachineCode | None = None
    error: str = ""


def target_of(arch: Arch) -> GPUTarget:
    """Triton's name for an architecture."""
    number = int(arch.name[3:]) if arch.backend == "cuda" else arch.name
    return GPUTarget(arch.backend, number, arch.warp_size)


def specialise(launch: Launch, arch: Arch) -> Job:
    """What the JIT would compile for this launch on `arch`."""
    kernel = launch.kernel
    backend = make_backend(target_of(arch))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    named = {**launch.arguments, **launch.options}
    bound, specialisation, _ = binder(**named)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options, signature, constants, attributes = kernel._pack_args(
            backend, launch.options, bound, specialisation, None
        )
    where = f"{kernel.__module__}:{kernel.__qualname__}"
    return Job(where, signature, constants, attributes, dict(options.__dict__), arch)


def import_kernel(where: str) -> Any:
    """The kernel that `module:name` or `file.py:name` names, without decorators around it.

    Raises:
        ValueError: there is no such module, or no Triton kernel of that name in it.
    """
    module_name, _, name = where.rpartition(":")
    found: Any = _import_module(module_name)
    for part in name.split("."):
        found = getattr(found, part, None)
    while found is not None and not isinstance(found, JITFunction):
        found = getattr(found, "fn", None)  # an autotuner or heuristics
    if found is None:
        raise ValueError(f"no @triton.jit kernel {name!r} in {module_name}")
    return found


def _import_module(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    try:
        if name.endswith(".py"):
            if not Path(name).is_file():
                raise ValueError(f"no such file: {name}")
            spec = importlib.util.spec_from_file_location(name, name)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return importlib.import_module(name)
    except ValueError:
        raise
    except Exception as error:  # whatever a user's module raises
        raise ValueError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def compile_job(job: Job) -> Compiled:
    """Compile in this process; what the compiler refuses is returned as `error`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = ASTSource(
                import_kernel(job.where), job.signature, job.constants, job.attributes
            )
            built = triton.compile(source, target=target_of(job.arch), options=job.options)
        metadata = built.metadata
        read = sass.read if job.arch.backend == "cuda" else gcn.read
        binary = built.asm["cubin" if job.arch.backend == "cuda" else "amdgcn"]
        code = replace(read(binary), shared=metadata.shared, warps=metadata.num_warps)
        return Compiled(str(built.asm["ttir"]), code)
    except Exception as error:  # the front end, the passes and the assembler raise what they like
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Compiled(error=f"{type(error).__name__}: {lines[-1] if lines else ''}")


def compile_all(
    jobs: Sequence[Job], *, workers: int | None = None, done: Callable[[], None] = lambda: None
) -> Iterator[Compiled]:
    """Results in the order of `jobs`, each compiled once; `done` is called after each job."""
    unique = list({repr(job): job for job in jobs}.values())
    count = max(1, min(workers or os.cpu_count() or 1, len(unique)))
    with ThreadPoolExecutor(count) as pool:
        found = {repr(j): pool.submit(_compile_apart, j) for j in unique}
        for job in jobs:
            yield found[repr(job)].result()
            done()


def _compile_apart(job: Job) -> Compiled:
    """`compile_job` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(TIMEOUT):
            return ours.recv()
        return Compiled(error=f"not compiled after {TIMEOUT:.0f} s")
    except EOFError:
        process.join()
        return Compiled(error=f"the compiler ended with exit code {process.exitcode}")
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


def _serve(job: Job, answer: Connection) -> None:
    # what an aborting compiler writes must not mix with the table
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    answer.send(compile_job(job))
