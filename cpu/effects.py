"""Ops with effects: scalar stores, atomics, printing, assertions, calls, barriers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .cxx import C_TYPES, narrow, widen
from .expressions import Expr
from .ir import Op, Value
from .memory import is_volatile, read, site, write
from .nest import Nest
from .sinks import Sink

if TYPE_CHECKING:
    from .control import FunctionEmitter

_BARRIERS = {"gpu.barrier", "ttg.barrier", "ttg.local_barrier", "tt.debug_barrier"}
_EFFECTS = {"tt.store", "tt.atomic_rmw", "tt.atomic_cas", "tt.atomic_load", "tt.atomic_store",
            "tt.atomic_poll", "tt.call", "tt.print", "tt.assert"} | _BARRIERS  # fmt: skip
_LOOKS = {"tt.atomic_load", "tt.atomic_poll"}
_ORDERS = {
    "relaxed": "__ATOMIC_RELAXED", "acquire": "__ATOMIC_ACQUIRE",
    "release": "__ATOMIC_RELEASE", "acq_rel": "__ATOMIC_ACQ_REL",
}  # fmt: skip


def is_write(op: Op) -> bool:
    """Whether memory, or the order of effects, may differ after the op."""
    return op.name in _EFFECTS or is_volatile(op)


def emit_effect(function: FunctionEmitter, nest: Nest, sink: Sink) -> list[str]:
    """Statements for one element (or for the scalar op)."""
    op = sink.op
    assert op is not None
    if op.name in _BARRIERS:
        return []
    args = [nest.pull(o, nest.index if o.type.is_tensor else ()) for o in op.operands]
    if op.name == "tt.store":
        return [_store(nest, op, args)]
    if op.name == "tt.load":
        return [_define(nest, op.result, _volatile_load(nest, op, args))]
    if op.name == "tt.atomic_rmw":
        return _atomic(nest, op, args)
    if op.name == "tt.atomic_cas":
        kind = C_TYPES[op.result.type.elem]
        code = (f"kx::compare_and_swap<{kind}>(({kind} *){args[0].code}, {args[1].code}, "
                f"{args[2].code}, {_order(op)})")  # fmt: skip
        return [_define(nest, op.result, _allowed(nest, op, args[0].code, kind, code))]
    if op.name in ("tt.atomic_load", "tt.atomic_store", "tt.atomic_poll"):
        return [_ordered(nest, op, args)]
    if op.name == "tt.assert":
        text = f"{op.location}: assertion failed: {op.attrs.get('text', [''])[0]}"
        stop = "return {};" if function.function.results else "return;"
        return [f"if (!({args[0].code})) {{ kx::fail(context, {json.dumps(text)}); {stop} }}"]
    if op.name == "tt.print":
        return _print(nest, op, args)
    if op.name == "tt.call":
        return [_call(nest, op, args)]
    raise op.refuse("the CPU backend does not support this op")


def _store(nest: Nest, op: Op, args: list[Expr]) -> str:
    storage = C_TYPES[op.operands[1].type.elem]
    guard = f"if ({args[2].code}) " if len(args) > 2 else ""
    return guard + write(nest.scope, op, storage, args[0].code, args[1].code)


def _volatile_load(nest: Nest, op: Op, args: list[Expr]) -> str:
    storage = C_TYPES[op.result.type.elem]
    code = read(nest.scope, op, storage, args[0].code)
    if len(args) == 1:
        return code
    fill = args[2].code if len(args) > 2 else "0"
    return f"{args[1].code} ? {code} : ({storage})({fill})"


def _allowed(nest: Nest, op: Op, address: str, storage: str, code: str) -> str:
    """An atomic access, in checked mode only where its check passes."""
    if not nest.scope.checked:
        return code
    where = f"context, {address}, {site(nest.scope, op)}, {_order(op)}"
    kind = f"{storage}, {'false' if op.name in _LOOKS else 'true'}"
    return f"kx::checked_atomic<{kind}>({where}) ? {code} : {storage}{{}}"


def _ordered(nest: Nest, op: Op, args: list[Expr]) -> str:
    """An atomic load, an atomic store, or the wait until a load finds a value."""
    pointer, *given = args
    loads = op.name == "tt.atomic_load"
    if op.name == "tt.atomic_poll" and len(given) > 1:
        raise op.refuse("a timeout is not supported")
    storage = C_TYPES[op.result.type.elem if loads else op.operands[1].type.elem]
    values = "" if loads else f"{given[0].code}, "
    code = f"kx::{op.name[3:]}<{storage}>(({storage} *){pointer.code}, {values}{_order(op)})"
    code = f"({_allowed(nest, op, pointer.code, storage, code)})"
    masked = given[0 if loads else 1 :] if op.name != "tt.atomic_poll" else []
    guard = masked[0].code if masked else "true"
    if not op.results:
        return f"if ({guard}) {code};"
    return _define(nest, op.result, f"{guard} ? {code} : ({storage})0")


def _order(op: Op) -> str:
    found = [w for w in op.words if w in _ORDERS]
    return _ORDERS[found[0] if found else "acq_rel"]


def _define(nest: Nest, result: Value, code: str) -> str:
    """Assign a result: an element of its buffer, or the scalar."""
    if result.type.is_tensor:
        offset, _ = nest.locate(nest.scope.buffers[result], nest.index)
        return f"{nest.scope.buffers[result].name}[{offset}] = {code};"
    return f"{nest.scope.scalars[result]} = {code};"


def _atomic(nest: Nest, op: Op, args: list[Expr]) -> list[str]:
    kind = op.result.type
    storage = C_TYPES[kind.elem]
    pointer, value = args[0].code, args[1].code
    action = op.words[0]
    place = f"({storage} *){pointer}"
    if action == "exch":
        code = f"__atomic_exchange_n({_as_int(kind.elem)}{pointer}, "
        bits = f"kx::bits<{_int_type(kind.elem)}>({value})"
        code = f"kx::bits<{storage}>({code}{bits}, {_order(op)}))"
    elif action in ("add", "and", "or", "xor") and kind.is_int:
        code = f"__atomic_fetch_{action}({place}, {value}, {_order(op)})"
    else:
        change = f"[&]({storage} old) {{ {_new(action, op, value)} }}"
        code = f"kx::update<{storage}>({place}, {_order(op)}, {change})"
    guard = args[2].code if len(args) > 2 else "true"
    code = f"({_allowed(nest, op, pointer, storage, code)})"
    return [_define(nest, op.result, f"{guard} ? {code} : ({storage})0")]


def _int_type(elem: str) -> str:
    return f"int{8 * _size(elem)}_t"


def _size(elem: str) -> int:
    return {"f64": 8, "f32": 4, "i64": 8, "i32": 4, "f16": 2, "bf16": 2, "i16": 2}.get(elem, 1)


def _as_int(elem: str) -> str:
    return f"({_int_type(elem)} *)"


def _new(action: str, op: Op, value: str) -> str:
    elem = op.result.type.elem
    wide = "f64" if elem == "f64" else "f32"
    if action == "fadd":
        code = narrow(f"{widen('old', elem)} + {widen(value, elem)}", wide, elem)
        return f"return {code};"
    functions = {"max": "max_int", "min": "min_int", "umax": "max_unsigned", "umin": "min_unsigned"}
    if op.result.type.is_float:
        functions = {"max": "max_num", "min": "min_num", "fmax": "max_num", "fmin": "min_num",
                     "umax": "max_num", "umin": "min_num"}  # fmt: skip
        a, b = widen("old", elem), widen(value, elem)
        if action in functions:
            return f"return {narrow(f'kx::{functions[action]}({a}, {b})', wide, elem)};"
    if action in functions:
        return f"return kx::{functions[action]}(old, {value});"
    raise op.refuse(f"atomic {action} on {elem} is not supported")


def _print(nest: Nest, op: Op, args: list[Expr]) -> list[str]:
    """One line per element: program id, index, prefix, value."""
    prefix = json.dumps(str(op.attrs.get("text", [""])[0]))
    indices = ", ".join(f"(int){i.code}" for i in nest.index)
    shown = []
    for at, e in enumerate(args):
        unsigned = not (op.attrs.get("isSigned") or (1,) * len(args))[at]
        value = e.code
        if e.type.is_float:
            value = f"(double){widen(e.code, e.type.elem)}"
            form = '"%f"'
        elif op.attrs.get("hex"):
            form, value = '"0x%llx"', f"(unsigned long long)kx::U<decltype({value})>({value})"
            if e.type.elem == "i1":
                value = f"(unsigned long long){e.code}"
        else:
            form = '"%llu"' if unsigned else '"%lld"'
            value = f"({'unsigned ' if unsigned else ''}long long){value}"
        place = f"program, {{{indices}}}, {len(nest.index)}, {prefix}, {at}"
        shown.append(f"kx::print_value({place}, {form}, {value});")
    return shown or [f'kx::print_value(program, {{}}, 0, {prefix}, 0, "%s", "");']


def _call(nest: Nest, op: Op, args: list[Expr]) -> str:
    code = ", ".join([*(a.code for a in args), "program", "context", "arena"])
    call = f"{mangle(str(op.attrs['callee']))}({code})"
    if not op.results:
        return f"{call};"
    if len(op.results) > 1:
        raise op.refuse("functions with several results are not supported")
    return _define(nest, op.result, call)


def mangle(name: str) -> str:
    """A C++ name of a TTIR function."""
    return "f_" + "".join(c if c.isalnum() else "_" for c in name)
