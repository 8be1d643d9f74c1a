"""C++ of a whole kernel: its functions and the entry that runs the grid."""

from __future__ import annotations

import json

from .control import FunctionEmitter
from .cxx import register_type
from .effects import mangle
from .ir import Function, Module
from .target import host_isa

_HEADERS = ("kx_base.h", "kx_cast.h", "kx_math.h", "kx_tile.h", "kx_dot.h")


def emit_module(module: Module, *, checked: bool = False) -> str:
    """C++ of all functions of a kernel.

    Raises:
        Unsupported: an op is not supported; the message names it and its source line.
    """
    lines = [f'#include "{header}"' for header in _HEADERS] + ["#include <omp.h>"]
    if checked:
        lines.append('#include "kx_check.h"')
    kernel = module.kernel
    largest = 0
    bodies = []
    for function in (*(f for f in module.functions if not f.public), kernel):
        emitter = FunctionEmitter(function, host_isa().vector_bytes, checked)
        for argument in function.arguments:
            emitter.scope.scalars[argument] = emitter.scope.fresh("arg")
        body = emitter.body()
        bodies.append([signature(function, emitter) + " {", *body, "}"])
        largest = max(largest, emitter.arena)
    for function in module.functions:
        if not function.public:
            lines.append(declaration(function) + ";")
    for body in bodies:
        lines += body
    lines += entry(kernel, largest, checked)
    return "\n".join(lines) + "\n"


def _parameters(function: Function, names: list[str]) -> str:
    typed = [
        f"{register_type(a.type.elem, 1)} {name}"
        for a, name in zip(function.arguments, names, strict=True)
    ]
    return ", ".join([*typed, "const int32_t *program", "kx::Context *context", "char *arena"])


def _returns(function: Function) -> str:
    return register_type(function.results[0].elem, 1) if function.results else "void"


def declaration(function: Function) -> str:
    names = ["" for _ in function.arguments]
    return f"static {_returns(function)} {mangle(function.name)}({_parameters(function, names)})"


def signature(function: Function, emitter: FunctionEmitter) -> str:
    names = [emitter.scope.scalars[a] for a in function.arguments]
    return f"static {_returns(function)} {mangle(function.name)}({_parameters(function, names)})"


def entry(kernel: Function, scratch: int, checked: bool) -> list[str]:
    """The function the launcher calls: unpack arguments, run the programs on all cores."""
    unpacked = []
    for at, argument in enumerate(kernel.arguments):
        kind = register_type(argument.type.elem, 1)
        unpacked.append(f"{kind} arg{at}; memcpy(&arg{at}, &arguments[{at}], sizeof arg{at});")
    passed = ", ".join([*(f"arg{at}" for at in range(len(kernel.arguments))),
                        "program", "&context", "arena"])  # fmt: skip
    return [
        'extern "C" __attribute__((visibility("default"))) const char *kx_entry(',
        "    const int32_t *grid, const uint64_t *arguments, const uint64_t *extents) {",
        "kx::Context context = {grid, extents, nullptr, nullptr, {}};",
        *unpacked,
        "const i64 programs = (i64)grid[0] * grid[1] * grid[2];",
        *(_checker(kernel) if checked else ["#pragma omp parallel if (programs > 1)"]),
        "{",
        f"char *arena = kx::scratch({scratch + 4096});",
        "const i64 share = programs / (16 * (i64)omp_get_num_threads());",
        "" if checked else "#pragma omp for schedule(dynamic, share > 1 ? share : 1)",
        "for (i64 at = 0; at < programs; at++) {",
        # most grids have one dimension: no division for them
        "const i64 row = grid[0] == programs ? 0 : at / grid[0];",
        "const i64 plane = grid[2] == 1 ? 0 : row / grid[1];",
        "const int32_t program[3] = {(int32_t)(at - row * grid[0]), "
        "(int32_t)(row - plane * grid[1]), (int32_t)plane};",
        "check.start(at);" if checked else "",
        f"if (!context.fault) {mangle(kernel.name)}({passed});",
        "}",
        "}",
        *(
            [
                "static char message[sizeof context.message];",
                "if (context.fault) {",
                "strcpy(message, (const char *)context.fault);",
                "return message;",
                "}",
            ]
            if checked
            else []
        ),
        "return context.fault;",
        "}",
    ]


def _checker(kernel: Function) -> list[str]:
    """Checked mode: the shadow memory of this launch; its programs run one after another."""
    names = ", ".join(json.dumps(a.location.name or a.name) for a in kernel.arguments)
    return [
        f"static const char *const names[] = {{{names or 'nullptr'}}};",
        "kx::Checker check(&context, names);",
        "context.check = &check;",
    ]
