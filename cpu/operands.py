"""How the operands of `tl.dot` lie: tiles in scratch memory, or rows read where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cxx import C_TYPES, ELEMENTWISE, element_bytes
from .expressions import ZERO, Index
from .ir import Op, Value
from .memory import is_volatile
from .nest import Nest
from .schedule import Scheduler
from .views import VIEWS

if TYPE_CHECKING:
    from .control import FunctionEmitter

# element types that are converted, exactly, while they are packed into a format
_IN_PLACE = {
    "bf16": {"bf16": "uint16_t", "f8E4M3FN": "kx::e4m3", "f8E5M2": "kx::e5m2"},
    "f32": {"f32": "float"},
}
_MOST_ROW_BYTES = 4096  # as in kx_pack.h


@dataclass(frozen=True)
class Operand:
    """`flipped`: its rows are columns of the matrix. `code` is the C++ object that holds them."""

    code: str
    flipped: bool


def emit_operand(
    function: FunctionEmitter, op: Op, value: Value, form: str, here: Scheduler, held: bool = False
) -> Operand:
    """An operand of a dot, in memory where that will do, else in a tile of element type `form`.

    `held`: it lies by columns also where a buffer holds it by rows. A product of few rows adds in
    an order that follows from how B lies, which must not depend on what else is in the kernel, such
    as checks.
    """
    flipped, source = transposed_source(function, value)
    turned = not flipped and lies_by_columns(function, source, held)
    rows = _rows(function, op, source, form, here, int(turned))
    if rows is not None:
        return Operand(rows, flipped or turned)
    tile = here.materialize(source, form, transposed=turned)
    width = source.type.dims[-2] if turned else source.type.dims[-1]
    return Operand(f"kx::Tile<{C_TYPES[form]},{width}>{{{tile.name}}}", flipped or turned)


def transposed_source(function: FunctionEmitter, value: Value) -> tuple[bool, Value]:
    """Look through a transposition of the last two dimensions."""
    op = function.analysis.definition.get(value)
    if op is not None and op.name == "tt.trans" and value not in function.scope.buffers:
        order = tuple(op.attrs["order"])
        rank = len(order)
        if order == (*range(rank - 2), rank - 1, rank - 2):
            return True, op.operands[0]
    return False, value


def lies_by_columns(function: FunctionEmitter, value: Value, held: bool) -> bool:
    """Whether a tile is read from memory in which its first dimension is the contiguous one."""
    analysis = function.analysis
    while analysis.is_inline(value) and (held or value not in function.scope.buffers):
        if value in analysis.splits or len(value.type.dims) != 2:
            return False
        op = analysis.definition[value]
        if op.name == "tt.load":
            return analysis.unit_dim(op.operands[0]) == 0
        if op.name == "tt.trans":
            return held
        if op.name not in ELEMENTWISE or len(op.operands) != 1:
            return False
        value = op.operands[0]
    return False


def _rows(
    function: FunctionEmitter, op: Op, value: Value, form: str, here: Scheduler, axis: int
) -> str | None:
    """The C++ object of rows in memory, dimension `axis` counting them; None: not in place."""
    load = _load_in_place(function, op, value, form, here, axis)
    if load is None:
        return None
    pointer, *rest = load.operands
    count = load.result.type.dims[axis]
    rows = function.allocate("i64", (count,))
    nest = Nest(function.scope, (count,), None, 1)
    at = nest.index[0]
    index: Index = (at, ZERO) if axis == 0 else (ZERO, at)
    address, _, _ = nest.addresses.address(pointer, index)
    if rest:
        address = f"{nest.pull(rest[0], index).code} ? {address} : (i64)kx::nothing"
    nest.emit(nest.depth, f"{rows.name}[{at.code}] = {address};")
    function.out += nest.text()
    step = _step(function, pointer)
    if step is None:
        # the next tile is as far from this one as this one from the last
        last, step = function.scope.fresh("p"), function.scope.fresh("p")
        function.prologue.append(f"i64 {last}{{}}, {step}{{}};")
        function.out.append(f"{step} = {last} ? {rows.name}[0] - {last} : 0;")
        function.out.append(f"{last} = {rows.name}[0];")
    return f"kx::Rows<{_IN_PLACE[form][load.result.type.elem]}>{{{rows.name}, {step}}}"


def _step(function: FunctionEmitter, pointer: Value) -> str | None:
    """Bytes from the tile of this step of a loop to the next one's, where the loop carries it."""
    analysis = function.analysis
    while pointer not in analysis.splits:
        op = analysis.definition.get(pointer)
        if op is None or op.name not in VIEWS | {"tt.addptr"}:
            return None
        pointer = op.operands[0]
    return function.scope.steps.get(pointer)


def _load_in_place(
    function: FunctionEmitter, op: Op, value: Value, form: str, here: Scheduler, axis: int
) -> Op | None:
    """The load that a dot, and nothing else, may repeat at its own place without a copy."""
    scope, analysis = function.scope, function.analysis
    if scope.checked or len(value.type.dims) != 2:
        return None
    # a store before the load must have happened, one after it has saved what it overwrites
    for group in list(here.open):
        if group.first_store < len(here.block.ops):
            here.flush(group)
    if value.type.elem == form and value not in scope.buffers and analysis.is_inline(value):
        definition = analysis.definition.get(value)
        if definition is not None and definition.name == "tt.fp_to_fp":
            value = definition.operands[0]
    load = analysis.definition.get(value)
    if value in scope.buffers or load not in here.uses.position or load is None:
        return None
    if load.name != "tt.load" or is_volatile(load):
        return None
    kind = load.result.type
    pointer, *rest = load.operands
    dense = analysis.strides(pointer)[1 - axis] == element_bytes(pointer.type)
    if kind.elem not in _IN_PLACE.get(form, {}) or not dense or kind.dims[1 - axis] < 2:
        return None
    if here.uses.sinks(value) - here.done != {op}:
        return None
    if rest and not (
        _uniform(function, rest[0], 1 - axis)
        and all(_is_zero(function, other) for other in rest[1:])
        and kind.dims[1 - axis] * kind.stored_bytes <= _MOST_ROW_BYTES
    ):
        return None
    return load


def _uniform(function: FunctionEmitter, value: Value, dim: int) -> bool:
    """Whether a tile is seen to be the same all along a dimension."""
    if value in function.scope.buffers or not function.analysis.is_inline(value):
        return False
    op = function.analysis.definition.get(value)
    if op is None:
        return False
    if op.name == "tt.splat" or op.name == "arith.constant":
        return not isinstance(op.attrs.get("value"), tuple)
    if op.name == "tt.broadcast" and op.operands[0].type.dims[dim] == 1:
        return True
    if op.name == "tt.expand_dims":
        return op.attrs["axis"] == dim
    if op.name not in ELEMENTWISE and op.name != "tt.broadcast":
        return False
    return all(_uniform(function, o, dim) for o in op.operands)


def _is_zero(function: FunctionEmitter, value: Value) -> bool:
    op = function.analysis.definition.get(value)
    while op is not None and op.name in VIEWS:
        op = function.analysis.definition.get(op.operands[0])
    return op is not None and op.name == "arith.constant" and op.attrs["value"] == 0
