"""`tt.dot`: operands packed into tiles, then a register-blocked micro-kernel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from .expressions import Buffer
from .ir import Op, Type, Value
from .operands import emit_operand
from .schedule import Scheduler
from .sinks import Sink

if TYPE_CHECKING:
    from .control import FunctionEmitter

# format that the operands are packed in: exact for every pair
_PACKED = {"bf16": "bf16", "f8E4M3FN": "bf16", "f8E5M2": "bf16", "f16": "f32", "f32": "f32",
           "f64": "f64", "i8": "i32", "i16": "i32", "i32": "i32"}  # fmt: skip
_WIDER = ("bf16", "f32", "f64")
# up to this many rows of A a product whose B lies along K adds in lanes, as `few_rows` in kx_dot.h
_FEW_ROWS = 16


def packed_format(op: Op) -> str:
    """The format both operands are converted to before they are multiplied."""
    a, b = (v.type.elem for v in op.operands[:2])
    if a not in _PACKED or b not in _PACKED:
        raise op.refuse(f"dot of {a} and {b} is not supported")
    pa, pb = _PACKED[a], _PACKED[b]
    if pa == pb:
        return pa
    if pa in _WIDER and pb in _WIDER:
        return max(pa, pb, key=_WIDER.index)
    raise op.refuse(f"dot of {a} and {b} is not supported")


def accumulator(op: Op) -> str:
    """Element type the sum is kept in."""
    elem = op.result.type.elem
    return "f32" if elem in ("bf16", "f16") else elem


def emit_dot(function: FunctionEmitter, op: Op, here: Scheduler) -> None:
    """C = A B + C over two- or three-dimensional tiles."""
    here.settle(op.operands)
    a, b, c = op.operands[:3]
    form = packed_format(op)
    out = _accumulator_buffer(function, op, c, here)
    *batch, m, k = a.type.dims
    n = b.type.dims[-1]
    left = emit_operand(function, op, a, form, here)
    right = emit_operand(function, op, b, form, here, held=m <= _FEW_ROWS)
    size = Type(form).stored_bytes
    scratch = function.allocate("i8", (size * (k * n + m * k) + 64 * k,))
    count = math.prod(batch)
    index = ""
    if count > 1:
        index = function.scope.fresh("x")
        function.out.append(f"for (int {index} = 0; {index} < {count}; {index}++)")
        left, right = (
            replace(x, code=x.code.replace("}", f" + {index} * {step}}}"))
            for x, step in ((left, m * k), (right, k * n))
        )
    result = f"{out.name} + {index} * {m * n}" if index else out.name
    flags = ",".join("true" if x.flipped else "false" for x in (left, right))
    function.out.append(
        f"kx::dot_{form}<{m},{n},{k},{flags}>({left.code}, {right.code}, {result}, {scratch.name});"
    )
    if accumulator(op) != op.result.type.elem:
        here.done.add(op)
        _round_result(function, op, out, here)
    else:
        function.scope.buffers[op.result] = out


def _accumulator_buffer(function: FunctionEmitter, op: Op, c: Value, here: Scheduler) -> Buffer:
    """The buffer that holds C and then the result; the loop-carried one where that is safe."""
    elem = accumulator(op)
    if c in function.scope.buffers and elem == c.type.elem:
        held = function.scope.buffers[c]
        is_carried = c not in function.analysis.definition
        if is_carried and not (here.uses.sinks(c) - here.done - {op}):
            return held
    target = carried_target(function, op, here) if elem == op.result.type.elem else None
    if target is None:
        target = function.allocate(elem, op.result.type.dims)
    at = here.uses.position[op]
    group = here.place(Sink("keep", None, (c,), c.type.dims, at, None, target, elem))
    here.flush(group)
    return target


def carried_target(function: FunctionEmitter, op: Op, here: Scheduler) -> Buffer | None:
    """The buffer of the carried value that the result is yielded to, if it may be overwritten."""
    last = here.block.ops[-1]
    if last.name != "scf.yield" or not function.loops or function.loops[-1].name != "scf.for":
        return None
    arguments = function.loops[-1].regions[0].block.arguments[1:]
    for argument, value in zip(arguments, last.operands, strict=True):
        if value is op.result and function.regions.may_overwrite(argument, here, {op}):
            return function.scope.buffers.get(argument)
    return None


def _round_result(function: FunctionEmitter, op: Op, wide: Buffer, here: Scheduler) -> None:
    """Round an fp32 sum to the narrower result type."""
    from .cxx import narrow
    from .nest import Nest

    kind = op.result.type
    target = function.allocate(kind.elem, kind.dims)
    lanes = min(function.vector_bytes // 4, kind.dims[-1])
    nest = Nest(function.scope, kind.dims, len(kind.dims) - 1 if lanes > 1 else None, lanes)
    e = nest.read(wide, nest.index)
    code = narrow(e.code, "f32", kind.elem)
    rounded = nest.name(Type(kind.elem), e.vector, e.level, code)
    nest.emit(nest.depth, nest.write(target, nest.index, rounded))
    function.out += nest.text()
    function.scope.buffers[op.result] = target


def emit_dot_scaled(function: FunctionEmitter, op: Op, here: Scheduler) -> None:
    """Microscaled dot: both operands are decoded and scaled exactly to fp32, then multiplied."""
    here.settle(op.operands)
    a, a_scale, b, b_scale, c = scaled_operands(op)
    m, n = op.result.type.dims[-2:]
    if len(op.result.type.dims) != 2:
        raise op.refuse("batches are not supported")
    k = a.type.dims[1] * (2 if op.attrs.get("lhs") == "e2m1" else 1)
    if op.attrs.get("lhs_k_pack") is False or op.attrs.get("rhs_k_pack") is False:
        raise op.refuse("e2m1 packed along M or N is not supported")
    out = function.allocate("f32", (m, n))
    group = here.place(
        Sink("keep", None, (c,), c.type.dims, here.uses.position[op], None, out, "f32")
    )
    here.flush(group)
    left = _scaled_tile(function, op, (a, a_scale, str(op.attrs.get("lhs"))), (m, k, True), here)
    right = _scaled_tile(function, op, (b, b_scale, str(op.attrs.get("rhs"))), (n, k, False), here)
    panels = function.allocate("f32", (k * n,))
    function.out.append(
        f"kx::dot_f32<{m},{n},{k},false,false>(kx::Tile<float,{k}>{{{left.name}}}, "
        f"kx::Tile<float,{n}>{{{right.name}}}, {out.name}, {panels.name});"
    )
    if op.result.type.elem != "f32":
        here.done.add(op)
        _round_result(function, op, out, here)
    else:
        function.scope.buffers[op.result] = out


def scaled_operands(op: Op) -> tuple[Value, Value | None, Value, Value | None, Value]:
    """A, its scales, B, its scales, C; the text names only the scales that are there."""
    first, *rest, c = op.operands
    if len(rest) == 3:
        return first, rest[0], rest[1], rest[2], c
    if len(rest) == 1:
        return first, None, rest[0], None, c
    has_left = rest[0].type.dims[-2] == first.type.dims[-2] and rest[0].type.stored_bytes == 1
    has_left = has_left and rest[0].type.dims[-1] < first.type.dims[-1]
    return (first, rest[0], rest[1], None, c) if has_left else (first, None, rest[0], rest[1], c)


def _scaled_tile(
    function: FunctionEmitter,
    op: Op,
    operand: tuple[Value, Value | None, str],
    layout: tuple[int, int, bool],
    here: Scheduler,
) -> Buffer:
    """An operand decoded to fp32: A as [M, K], B as [K, N]."""
    value, scale, form = operand
    rows, k, is_left = layout
    source = here.materialize(value)
    target = function.allocate("f32", (rows, k) if is_left else (k, rows))
    packed = 2 if form == "e2m1" else 1
    width = k // packed if is_left else rows
    at = f"row * {width} + k / {packed}" if is_left else f"k / {packed} * {width} + row"
    raw = f"{source.name}[{at}]"
    decode = {
        "e4m3": f"kx::e4m3_to_f32((uint8_t){raw})", "e5m2": f"kx::e5m2_to_f32((uint8_t){raw})",
        "bf16": f"kx::bf16_to_f32({raw})", "fp16": f"kx::f16_to_f32({raw})",
        "e2m1": f"kx::e2m1_to_f32((uint8_t){raw} >> (k % 2 * 4) & 15)",
    }  # fmt: skip
    if form not in decode:
        raise op.refuse(f"the operand format {form} is not supported")
    kind, group, scales = "kx::unscaled", k, "nullptr"
    if scale is not None:
        held = here.materialize(scale)
        kind = "kx::e4m3_scale" if scale.type.elem == "f8E4M3FN" else "kx::e8m0"
        group, scales = k // scale.type.dims[-1], f"(const uint8_t *){held.name}"
    steps = f"{k}, 1" if is_left else f"1, {rows}"
    function.out.append(
        f"kx::scaled_tile<{kind},{rows},{k},{group}>([&](int row, int k) "
        f"{{ return {decode[form]}; }}, {scales}, {target.name}, {steps});"
    )
    return target
