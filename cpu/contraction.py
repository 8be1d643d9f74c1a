"""`tt.dot`: operands packed into tiles, then a register-blocked micro-kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cxx import ELEMENTWISE
from .expressions import Buffer
from .ir import Op, Type, Value
from .schedule import Scheduler
from .sinks import Sink

if TYPE_CHECKING:
    from .control import FunctionEmitter

# format that the operands are packed in: exact for every pair
_PACKED = {"bf16": "bf16", "f8E4M3FN": "bf16", "f8E5M2": "bf16", "f16": "f32", "f32": "f32",
           "f64": "f64", "i8": "i32", "i16": "i32", "i32": "i32"}  # fmt: skip
_WIDER = ("bf16", "f32", "f64")
# up to this many rows of A a product is bound by reading B, which is then prefetched
_FEW_ROWS = 16
_STEPS_AHEAD = 4


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
    tile_a = here.materialize(a, form)
    transposed, source = transposed_source(function, b)
    *batch, m, k = a.type.dims
    few = m <= _FEW_ROWS
    along_k = not transposed and runs_along_k(function, b, held=few)
    if few and (transposed or along_k):
        function.scope.ahead = _STEPS_AHEAD * k
    tile_b = here.materialize(source, form, transposed=along_k)
    function.scope.ahead = 0
    n = b.type.dims[-1]
    count = 1
    for size in batch:
        count *= size
    flag = "true" if transposed or along_k else "false"
    panels = function.allocate(form if form != "bf16" else "i32", (k * n,))
    index = ""
    if count > 1:
        index = function.scope.fresh("x")
        function.out.append(f"for (int {index} = 0; {index} < {count}; {index}++)")
    offsets = [f" + {index} * {size}" if index else "" for size in (m * k, k * n, m * n)]
    function.out.append(
        f"kx::dot_{form}<{m},{n},{k},{flag}>({tile_a.name}{offsets[0]}, {tile_b.name}{offsets[1]}, "
        f"{out.name}{offsets[2]}, {panels.name});"
    )
    if accumulator(op) != op.result.type.elem:
        here.done.add(op)
        _round_result(function, op, out, here)
    else:
        function.scope.buffers[op.result] = out


def transposed_source(function: FunctionEmitter, b: Value) -> tuple[bool, Value]:
    """Look through a transposition of the last two dimensions."""
    op = function.analysis.definition.get(b)
    if op is not None and op.name == "tt.trans" and b not in function.scope.buffers:
        order = tuple(op.attrs["order"])
        rank = len(order)
        if order == (*range(rank - 2), rank - 1, rank - 2):
            return True, op.operands[0]
    return False, b


def runs_along_k(function: FunctionEmitter, b: Value, held: bool) -> bool:
    """Whether B [K, N] is read from memory in which K is the contiguous dimension.

    `held`: also where a buffer holds it by rows. A product of few rows adds in an order that
    follows from the answer, which must not depend on what else is in the kernel, such as checks.
    """
    analysis = function.analysis
    while analysis.is_inline(b) and (held or b not in function.scope.buffers):
        if b in analysis.splits or len(b.type.dims) != 2:
            return False
        op = analysis.definition[b]
        if op.name == "tt.load":
            return analysis.unit_dim(op.operands[0]) == 0
        if op.name == "tt.trans":
            return held
        if op.name not in ELEMENTWISE or len(op.operands) != 1:
            return False
        b = op.operands[0]
    return False


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
    names = ", ".join(t.name for t in (left, right, out, panels))
    function.out.append(f"kx::dot_f32<{m},{n},{k},false>({names});")
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
