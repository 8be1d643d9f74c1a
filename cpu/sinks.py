"""What a loop nest is emitted for: stores, buffers, reductions, effects; and groups of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from .cxx import C_TYPES, literal, register_type
from .expressions import Buffer, Expr, Index
from .ir import FLOATS, Op, Value
from .nest import Nest, Scope, TooWide

_IDENTITY = {
    "arith.addf": -0.0, "arith.addi": 0, "arith.ori": 0, "arith.xori": 0, "arith.andi": -1,
    "arith.mulf": 1.0, "arith.muli": 1,
    "arith.maxnumf": float("nan"), "arith.minnumf": float("nan"),
    "arith.maximumf": float("-inf"), "arith.minimumf": float("inf"),
}  # fmt: skip


# A reduction over lanes keeps this many sums, and adds those up in a tree of this many
ACCUMULATORS = 64
TREE = 16


@dataclass(frozen=True, eq=False)
class Sink:
    """One thing a nest does. `position` is its place in the program order of its block."""

    kind: str  # store | keep | reduce | each
    op: Op | None
    values: tuple[Value, ...]
    shape: tuple[int, ...]
    position: int
    axis: int | None = None
    target: Buffer | None = None
    convert: str = ""  # element type of the buffer where it is not the value's


@dataclass
class Group:
    """Sinks of one iteration space, emitted as one nest."""

    shape: tuple[int, ...]
    axis: int | None = None
    sinks: list[Sink] = field(default_factory=list)
    outputs: set[Value] = field(default_factory=set)

    @property
    def first_store(self) -> int:
        stores = [s.position for s in self.sinks if s.kind in ("store", "each")]
        return min(stores, default=1 << 30)


def identity(op: Op, region_op: Op, elem: str) -> str | None:
    """Start value of a reduction by one op, None where the first elements must start it."""
    name = region_op.name
    if set(region_op.operands) != set(op.regions[0].block.arguments):
        return None
    if name in _IDENTITY:
        value = _IDENTITY[name]
        return literal(value if elem in FLOATS else int(value), elem)
    bits = {"i8": 8, "i16": 16, "i32": 32, "i64": 64}.get(elem)
    if bits is None:
        return None
    limits = {"arith.maxsi": -(2 ** (bits - 1)), "arith.minsi": 2 ** (bits - 1) - 1,
              "arith.maxui": 0, "arith.minui": -1}  # fmt: skip
    return literal(limits[name], elem) if name in limits else None


class GroupEmitter:
    """Emits one group, retrying with fewer lanes where 64-bit vectors come up."""

    def __init__(self, scope: Scope, vector_bytes: int) -> None:
        self._scope = scope
        self._vector_bytes = vector_bytes

    def layout(self, group: Group) -> tuple[int | None, int]:
        """The lane dimension, by vote of the memory accesses, and its lane count.

        One lane where every element is to be looked at: then the dimension only says in which order
        a reduction adds.
        """
        votes = [0.0] * len(group.shape)
        for pointer, weight in self._pointers(group):
            dim = self._scope.analysis.unit_dim(pointer)
            if dim is not None and pointer.type.dims == group.shape:
                votes[dim] += weight
        for at in range(len(group.shape) - 1, -1, -1):
            if group.shape[at] > 1:
                votes[at] += 0.5
                break
        best = max(range(len(votes)), key=lambda d: (votes[d], d), default=0)
        size = group.shape[best] if group.shape else 1
        if size < 2:
            return None, 1
        if self._scope.checked or any(s.kind == "each" for s in group.sinks):
            return best, 1
        return best, min(self._vector_bytes // 4, size)

    def _pointers(self, group: Group) -> list[tuple[Value, float]]:
        """Addresses that the sinks load from and store to."""
        found, seen = [], set()
        pending = [v for s in group.sinks for v in s.values]
        for sink in group.sinks:
            if sink.kind == "store" and sink.op:
                found.append((sink.op.operands[0], 1.5))
        analysis = self._scope.analysis
        while pending:
            value = pending.pop()
            if value in seen or value in self._scope.buffers or not analysis.is_inline(value):
                continue
            seen.add(value)
            if value in analysis.splits:
                continue
            op = analysis.definition[value]
            if op.name == "tt.load":
                found.append((op.operands[0], 1.0))
            pending += op.operands
        return found

    def emit(self, group: Group, keeps: KeepPlan) -> list[str]:
        """C++ lines of the group."""
        lane_dim, lanes = self.layout(group)
        wide = max(self._vector_bytes // 8, 1)
        while True:
            try:
                return self._emit(group, keeps, lane_dim, lanes, wide)
            except TooWide:
                lanes = wide

    def _emit(
        self, group: Group, keeps: KeepPlan, lane_dim: int | None, lanes: int, wide: int
    ) -> list[str]:
        slots = 1
        if group.axis is not None and group.axis == lane_dim:
            slots = min(ACCUMULATORS, group.shape[group.axis])
        if lanes == 1:
            lane_dim = None
        inner = group.axis if group.axis is not None and group.axis != lane_dim else None
        if inner is not None and group.shape[inner] == 1:
            inner = None
        unroll = 1 if lane_dim is None else max(1, slots // lanes)
        nest = Nest(self._scope, group.shape, lane_dim, lanes, inner, unroll)
        nest.wide_lanes = wide
        statements: list[tuple[int, str]] = []
        ordered = sorted(group.sinks, key=lambda s: s.position)
        pulled = {s: self._pull(nest, s) for s in ordered}
        for sink in ordered:
            if sink.kind == "reduce":
                emit_reduce(nest, sink, pulled[sink], slots)
        for sink in ordered:
            statements += self._statements(nest, sink, pulled[sink], keeps)
        kept = self._kept(nest, group, keeps)
        for value, e in kept:
            buffer = keeps.buffer(value)
            statements.append((nest.depth, nest.write(buffer, nest.index, e)))
        nest.code[nest.depth] += [text for _, text in statements]
        nest.end = "" if kept else self._end(nest, group)
        return nest.text()

    def _end(self, nest: Nest, group: Group) -> str:
        """The lane position past which a group that only stores has nothing to do."""
        if nest.lane_dim is None or any(s.kind != "store" for s in group.sinks):
            return ""
        ends = []
        for sink in group.sinks:
            assert sink.op is not None
            if len(sink.op.operands) < 3:
                return ""
            level, _, high, _ = nest.addresses.limits(sink.op.operands[2], nest.index)
            if level >= nest.lane_level:
                return ""
            ends.append(high)
        return ends[0] if len(set(ends)) == 1 else ""

    def _pull(self, nest: Nest, sink: Sink) -> list[Expr]:
        if sink.kind == "each":
            return []
        out = []
        for value in sink.values:
            e = nest.pull(value, nest.index if value.type.is_tensor else ())
            out.append(e)
        return out

    def _statements(
        self, nest: Nest, sink: Sink, pulled: list[Expr], keeps: KeepPlan
    ) -> list[tuple[int, str]]:
        if sink.kind == "store":
            assert sink.op is not None
            return [(nest.depth, nest.memory.store(sink.op, nest.index, pulled[0]))]
        if sink.kind == "keep":
            if sink.target is None:
                return []
            e = pulled[0]
            if sink.convert and sink.convert != sink.values[0].type.elem:
                e = convert(nest, e, sink.convert)
            return [(nest.depth, nest.write(sink.target, nest.index, e))]
        if sink.kind == "each":
            return [(nest.depth, line) for line in keeps.effect(nest, sink)]
        return []

    def _kept(self, nest: Nest, group: Group, keeps: KeepPlan) -> list[tuple[Value, Expr]]:
        """Evaluated values that later groups want and that are dear or unsafe to recompute."""
        evaluated = {
            value: e
            for (value, index, *rest), e in nest.memo.items()
            if not rest and index == nest.index and value.type.dims == group.shape
            and value.type.is_tensor and value not in self._scope.buffers
        }  # fmt: skip
        chosen = keeps.choose(group, list(evaluated))
        return [(v, evaluated[v]) for v in chosen]


class KeepPlan:
    """What the scheduler decides for the emitter of a group."""

    def choose(self, group: Group, evaluated: list[Value]) -> list[Value]:
        raise AssertionError

    def buffer(self, value: Value) -> Buffer:
        raise AssertionError

    def effect(self, nest: Nest, sink: Sink) -> list[str]:
        raise AssertionError


def convert(nest: Nest, e: Expr, elem: str) -> Expr:
    """A float in another float format, or an integer widened; both exact."""
    from .cxx import convert_float
    from .ir import Type

    kind = Type(elem)
    if kind.is_float:
        code = convert_float(e.code, e.type.elem, elem)
    else:
        code = f"kx::cast<{C_TYPES[elem]}>({e.code})"
    return nest.name(kind, e.vector, e.level, code)


def emit_reduce(nest: Nest, sink: Sink, inputs: list[Expr], slots: int) -> None:
    """Accumulators before the reduced loop, the combine function in it, the result after it.

    Element i goes to accumulator i modulo `slots`, whatever the vector width: the same additions on
    every machine, and in checked mode.
    """
    op, axis = sink.op, sink.axis
    assert op is not None and axis is not None
    body = op.regions[0].block.ops
    vector = nest.lane_dim is not None
    lanes = nest.lanes if vector else 1
    # code level just outside the reduced loop
    at = nest.order.index(axis) if axis in nest.order else nest.depth
    types = [register_type(v.type.elem, lanes) for v in sink.values]
    accumulators = [nest.scope.fresh("r") for _ in types]
    start = None
    if len(body) == 2 and len(inputs) == 1:
        start = identity(op, body[0], sink.values[0].type.elem)
    count = max(1, slots // lanes)
    here = nest.index[axis].code
    slot, first_pass = "", f"{here} == 0"
    if count > 1:
        slot = f"[{nest.strip}u]" if vector else f"[{here} & {count - 1}]"
        first_pass = f"{here} == {nest.strip}u * {lanes}" if vector else f"{here} < {count}"
    for name, kind, value in zip(accumulators, types, sink.values, strict=True):
        nest.emit(at, f"{kind} {name}{f'[{count}]' if count > 1 else ''}{{}};")
        if start is not None:
            first = splat(start, value.type.elem, lanes)
            fill = f"for (auto &each : {name}) each = {first};"
            nest.emit(at, fill if count > 1 else f"{name} = {first};")
    level = nest.depth
    fresh = [nest.as_vector(e) if vector else e.code for e in inputs]
    kinds = [v.type.scalar() for v in sink.values]
    old = [Expr(f"{n}{slot}", k, vector, level) for n, k in zip(accumulators, kinds, strict=True)]
    new = [Expr(code, k, vector, level) for code, k in zip(fresh, kinds, strict=True)]
    if axis not in nest.order:  # a dimension of one element
        for name, e in zip(accumulators, new, strict=True):
            nest.emit(level, f"{name} = {e.code};")
    else:
        combined = nest.region(op.regions[0], [old, new])
        for name, e, c in zip(accumulators, new, combined, strict=True):
            code = c.code if start is not None else f"{first_pass} ? {e.code} : {c.code}"
            nest.emit(level, f"{name}{slot} = {code};")
    _finish(nest, sink, accumulators, count, at)


def splat(code: str, elem: str, lanes: int) -> str:
    """A scalar constant in every lane."""
    if lanes == 1:
        return code
    if elem == "i1":
        return f"kx::splat_mask<{lanes}>({code})"
    kind = "splatf" if elem in ("f32", "f64") else "splat"
    return f"kx::{kind}<{register_type(elem, lanes)}>({code})"


def _finish(nest: Nest, sink: Sink, names: list[str], count: int, at: int) -> None:
    """Combine the accumulators, then store the result.

    First those whose numbers are equal modulo 16, in ascending order, then in a tree: registers
    first, lanes last.
    """
    assert sink.op is not None and sink.axis is not None
    region = sink.op.regions[0]
    vector = nest.lane_dim is not None
    lanes = nest.lanes if vector and sink.axis == nest.lane_dim else 1
    saved, nest.code[at] = nest.code[at], []
    kinds = [v.type.scalar() for v in sink.values]
    registers = [
        [Expr(f"{n}[{u}]" if count > 1 else n, k, vector, at)
         for n, k in zip(names, kinds, strict=True)]
        for u in range(count)
    ]  # fmt: skip
    width = max(1, min(count, TREE // lanes))
    for u in range(width, count):
        registers[u % width] = nest.region(region, [registers[u % width], registers[u]])
    while width > 1:
        width //= 2
        for u in range(width):
            registers[u] = nest.region(region, [registers[u], registers[u + width]])
    current = registers[0]
    step = lanes // 2
    while step:
        turned = [nest.name(e.type, True, at, f"kx::rotate<{step}>({e.code})") for e in current]
        current = nest.region(region, [current, turned])
        step //= 2
    if lanes > 1:
        current = [nest.name(e.type, False, at, f"{e.code}[0]" if e.type.elem != "i1"
                             else f"(bool){e.code}[0]") for e in current]  # fmt: skip
    after, nest.code[at] = nest.code[at], saved
    index: Index = tuple(i for d, i in enumerate(nest.index) if d != sink.axis)
    for result, e in zip(sink.op.results, current, strict=True):
        if result.type.is_tensor:
            after.append(nest.write(nest.scope.buffers[result], index, e))
        else:
            after.append(f"{nest.scope.scalars[result]} = {e.code};")
    nest.post[at] += after
