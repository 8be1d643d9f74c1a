"""Ops on whole tiles: scan, gather, histogram, join, split, cat, reshape, map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .expressions import Buffer, Expr
from .ir import Op, Value
from .nest import Nest
from .schedule import Scheduler
from .views import VIEWS

if TYPE_CHECKING:
    from .control import FunctionEmitter

TILE_OPS = {
    "tt.scan", "tt.gather", "tt.histogram", "tt.join", "tt.split", "tt.cat", "tt.unsplat",
    "tt.map_elementwise",
}  # fmt: skip


def emit_tile_op(function: FunctionEmitter, op: Op, here: Scheduler) -> None:
    """Emit an op that needs its operands whole."""
    here.settle(op.operands)
    if op.name in VIEWS and op.results[0].type.is_tensor:
        source = here.materialize(op.operands[0])
        target = op.result.type
        function.scope.buffers[op.result] = Buffer(source.name, source.elem, target.dims)
        return
    if op.name == "tt.unsplat":
        source = here.materialize(op.operands[0])
        function.declare(op.result, f"{source.name}[0]")
        return
    sources = [here.materialize(o) if o.type.is_tensor else None for o in op.operands]
    for result in op.results:
        function.scope.buffers[result] = function.allocate(result.type.elem, result.type.dims)
    emit = {
        "tt.scan": _scan, "tt.gather": _gather, "tt.histogram": _histogram, "tt.join": _join,
        "tt.split": _split, "tt.cat": _cat, "tt.map_elementwise": _map,
    }[op.name]  # fmt: skip
    emit(function, op, [s for s in sources if s is not None])


def _targets(function: FunctionEmitter, op: Op) -> list[Buffer]:
    return [function.scope.buffers[r] for r in op.results]


def _element(buffer: Buffer, offset: str, value: Value, nest: Nest) -> Expr:
    return nest.name(value.type.scalar(), False, nest.depth, f"{buffer.name}[{offset}]")


def _scan(function: FunctionEmitter, op: Op, sources: list[Buffer]) -> None:
    """Serial along the axis; the running values are re-read from the result."""
    axis, reverse = op.attrs["axis"], op.attrs.get("reverse", False)
    nest = Nest(function.scope, sources[0].shape, None, 1, axis)
    size, step = sources[0].shape[axis], sources[0].strides[axis]
    plain, _ = nest.locate(sources[0], nest.index)
    at = function.scope.fresh("p")
    position = nest.index[axis].code
    if reverse:
        nest.emit(nest.depth, f"const i64 {at} = {plain} + ({size - 1} - 2 * {position}) * {step};")
    else:
        nest.emit(nest.depth, f"const i64 {at} = {plain};")
    back = f"{at} {'+' if reverse else '-'} {step}"
    new = [_element(s, at, v, nest) for s, v in zip(sources, op.operands, strict=True)]
    targets = _targets(function, op)
    nest.emit(nest.depth, f"if ({position} == 0) {{")
    for target, e in zip(targets, new, strict=True):
        nest.emit(nest.depth, f"{target.name}[{at}] = {e.code};")
    nest.emit(nest.depth, "} else {")
    old = [_element(t, back, v, nest) for t, v in zip(targets, op.results, strict=True)]
    combined = nest.region(op.regions[0], [old, new])
    for target, e in zip(targets, combined, strict=True):
        nest.emit(nest.depth, f"{target.name}[{at}] = {e.code};")
    nest.emit(nest.depth, "}")
    function.out += nest.text()


def _gather(function: FunctionEmitter, op: Op, sources: list[Buffer]) -> None:
    source, indices = sources
    axis = op.attrs["axis"]
    (target,) = _targets(function, op)
    nest = Nest(function.scope, indices.shape, None, 1)
    here, _ = nest.locate(indices, nest.index)
    chosen = function.scope.fresh("p")
    nest.emit(nest.depth, f"const i64 {chosen} = {indices.name}[{here}];")
    parts = [
        f"{chosen if d == axis else i.code} * {s}"
        for d, (i, s) in enumerate(zip(nest.index, source.strides, strict=True))
    ]
    nest.emit(nest.depth, f"{target.name}[{here}] = {source.name}[{' + '.join(parts)}];")
    function.out += nest.text()


def _histogram(function: FunctionEmitter, op: Op, sources: list[Buffer]) -> None:
    (target,) = _targets(function, op)
    size = target.shape[0]
    name = sources[0].name
    guard = f"{sources[1].name}[i] && " if len(sources) > 1 else ""
    function.out += [
        f"memset({target.name}, 0, sizeof(*{target.name}) * {size});",
        f"for (int i = 0; i < {sources[0].shape[0]}; i++)",
        f"if ({guard}(uint64_t)(i64){name}[i] < {size}) {target.name}[{name}[i]]++;",
    ]


def _join(function: FunctionEmitter, op: Op, sources: list[Buffer]) -> None:
    (target,) = _targets(function, op)
    count = _size(sources[0])
    function.out.append(f"for (int i = 0; i < {count}; i++) {{")
    for at, source in enumerate(sources):
        function.out.append(f"{target.name}[2 * i + {at}] = {source.name}[i];")
    function.out.append("}")


def _split(function: FunctionEmitter, op: Op, sources: list[Buffer]) -> None:
    targets = _targets(function, op)
    function.out.append(f"for (int i = 0; i < {_size(targets[0])}; i++) {{")
    for at, target in enumerate(targets):
        function.out.append(f"{target.name}[i] = {sources[0].name}[2 * i + {at}];")
    function.out.append("}")


def _cat(function: FunctionEmitter, op: Op, sources: list[Buffer]) -> None:
    (target,) = _targets(function, op)
    at = 0
    for source in sources:
        count = _size(source)
        size = f"sizeof(*{target.name}) * {count}"
        function.out.append(f"memcpy({target.name} + {at}, {source.name}, {size});")
        at += count


def _map(function: FunctionEmitter, op: Op, sources: list[Buffer]) -> None:
    """`pack` consecutive elements are passed to each call of the region."""
    pack = int(op.attrs.get("pack", 1))
    targets = _targets(function, op)
    nest = Nest(function.scope, (_size(sources[0]) // pack,), None, 1)
    at = nest.index[0].code
    args = [
        [_element(s, f"{at} * {pack} + {j}", v, nest) for j in range(pack)]
        for s, v in zip(sources, op.operands, strict=True)
    ]
    results = nest.region(op.regions[0], args)
    for index, target in enumerate(targets):
        for j in range(pack):
            code = results[index * pack + j].code
            nest.emit(nest.depth, f"{target.name}[{at} * {pack} + {j}] = {code};")
    function.out += nest.text()


def _size(buffer: Buffer) -> int:
    total = 1
    for size in buffer.shape:
        total *= size
    return total
