"""A loop nest over one iteration space: values are pulled into it by index.

Loops run over the dimensions in order, the lane dimension in strips of `lanes` elements. Every
expression is emitted at the outermost loop level whose variables it needs, once per index.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from .addresses import Addresses
from .analysis import Analysis
from .cxx import C_TYPES, elementwise, literal, register_type
from .expressions import ZERO, Buffer, Expr, Index, Ix
from .ir import Op, Region, Type, Value
from .memory import Memory
from .views import VIEWS, source_index


class TooWide(Exception):
    """A 64-bit vector came up in a nest laid out for 32-bit lanes."""


@dataclass
class Scope:
    """What a nest needs to know about the function around it."""

    analysis: Analysis
    scalars: dict[Value, str]
    buffers: dict[Value, Buffer]
    offsets: dict[Value, str]  # split loop-carried tensor -> the scalar to add
    steps: dict[Value, str]  # the same -> bytes from one step of its loop to the next, if known
    checked: bool = False
    counter: int = 0

    def fresh(self, prefix: str) -> str:
        self.counter += 1
        return f"{prefix}{self.counter}"


class Nest:
    """Emits expressions into the loop levels of one iteration space."""

    def __init__(
        self, scope: Scope, shape: tuple[int, ...], lane_dim: int | None, lanes: int,
        inner: int | None = None, unroll: int = 1,
    ) -> None:  # fmt: skip
        self.scope, self.shape, self.lane_dim, self.lanes = scope, shape, lane_dim, lanes
        self.unroll = unroll
        order = [d for d in range(len(shape)) if d not in (lane_dim, inner)]
        if lane_dim is not None:
            order.append(lane_dim)
        if inner is not None:
            order.append(inner)
        self.order = [d for d in order if shape[d] > 1 or d == lane_dim]
        names = {d: scope.fresh("x") for d in self.order}
        self.index: Index = tuple(
            Ix(names[d], d == lane_dim, self.order.index(d) + 1) if d in names else ZERO
            for d in range(len(shape))
        )
        depth = len(self.order)
        self.depth = depth
        self.code: list[list[str]] = [[] for _ in range(depth + 1)]
        self.post: list[list[str]] = [[] for _ in range(depth + 1)]
        self.memo: dict[tuple, Expr] = {}
        self.addresses = Addresses(self)
        self.memory = Memory(self)
        # bounds on the lane position that hold for a whole row: strips inside need no checks
        self.bounds: list[tuple[str, str]] = []
        # beyond this lane position nothing is stored (empty: the whole dimension counts)
        self.end = ""
        self.lane_level = self.order.index(lane_dim) + 1 if lane_dim is not None else depth
        self.strip = names[lane_dim] if lane_dim is not None else "0"

    # ---- emission

    def emit(self, level: int, code: str) -> None:
        self.code[level].append(code)

    def name(self, type: Type, vector: bool, level: int, code: str) -> Expr:
        lanes = self.lanes if vector else 1
        if vector and type.bits == 64 and self.lanes > self.wide_lanes:
            raise TooWide
        name = self.scope.fresh("t")
        self.emit(level, f"const {register_type(type.elem, lanes)} {name} = {code};")
        return Expr(name, type, vector, level)

    wide_lanes = 64

    def text(self) -> list[str]:
        """The nest as lines of C++."""
        lines = ["{", *self.code[0]]
        for level, dim in enumerate(self.order, 1):
            name, size = self.index[dim].code, self.shape[dim]
            if dim == self.lane_dim:
                lines.append(f"const auto strip{name} = [&](const i64 {name}, const int {name}u, "
                             "auto all) __attribute__((always_inline)) {")  # fmt: skip
            else:
                lines.append(f"for (i64 {name} = 0; {name} < {size}; {name} += 1) {{")
            lines += self.code[level]
        for level in range(self.depth, 0, -1):
            lines += self.post[level]
            lines += self._strips() if self.order[level - 1] == self.lane_dim else ["}"]
        return [*lines, *self.post[0], "}"]

    def _strips(self) -> list[str]:
        """Close the strip function and call it: checked, unchecked and again checked strips."""
        assert self.lane_dim is not None
        size, name = self.shape[self.lane_dim], self.strip
        step = self.lanes * self.unroll

        def loop(end: str, check: str) -> list[str]:
            call = f"strip{name}({name} + u * {self.lanes}, u, kx::{check}{{}});"
            return [f"for (; {name} < {end}; {name} += {step})",
                    f"KX_UNROLL({self.unroll})",
                    f"for (int u = 0; u < {self.unroll}; u++) {call}"]  # fmt: skip

        lines = ["};", "{", f"i64 {name} = 0;"]
        if not self.bounds:
            return [*lines, *loop(str(size), "whole"), "}"]
        lows = {low for low, _ in self.bounds if low != "0"}
        highs = {high for _, high in self.bounds if not high.isdigit()}
        if lows:
            lines.append(f"i64 {name}l = 0;")
            lines += [f"if ({low} > {name}l) {name}l = {low};" for low in lows]
            lines.append(f"if ({name}l > {size}) {name}l = {size};")
            lines += loop(f"{name}l", "part")
        lines.append(f"i64 {name}h = {size};")
        lines += [f"if ({high} < {name}h) {name}h = {high};" for high in highs]
        lines.append(f"{name}h -= {step - 1};")
        return [*lines, *loop(f"{name}h", "whole"), *loop(self.end or str(size), "part"), "}"]

    # ---- values

    def as_vector(self, e: Expr) -> str:
        """Code of an expression as a vector."""
        if e.vector or self.lanes == 1:
            return e.code
        if e.type.elem == "i1":
            return f"kx::splat_mask<{self.lanes}>({e.code})"
        kind = "splatf" if e.type.elem in ("f32", "f64") else "splat"
        return f"kx::{kind}<{register_type(e.type.elem, self.lanes)}>({e.code})"

    def pull(self, value: Value, index: Index) -> Expr:
        """The value at an index of its own shape."""
        key = (value, index)
        if key not in self.memo:
            self.memo[key] = self._pull(value, index)
        return self.memo[key]

    def _pull(self, value: Value, index: Index) -> Expr:
        if not value.type.is_tensor:
            return Expr(self.scope.scalars[value], value.type, False, 0)
        if value in self.scope.buffers:
            return self.read(self.scope.buffers[value], index)
        scalar = value.type.scalar()
        if value in self.scope.offsets:
            first = self.pull(self.scope.analysis.splits[value], index)
            step = f"({C_TYPES[scalar.elem]}){self.scope.offsets[value]}"
            return self.name(scalar, first.vector, first.level, f"{first.code} + {step}")
        op = self.scope.analysis.definition[value]
        if op.name in VIEWS:
            return self.pull(op.operands[0], source_index(op, index, ZERO))
        if op.name == "arith.constant":
            return Expr(literal(op.attrs["value"], scalar.elem), scalar, False, 0)
        if op.name == "ub.poison":
            return Expr(literal(0, scalar.elem), scalar, False, 0)
        if op.name == "tt.make_range":
            return self._range(op, index[0])
        if op.name == "tt.load":
            return self.memory.load(op, index)
        return self.apply(
            op, [self.pull(o, index if o.type.is_tensor else ()) for o in op.operands]
        )

    def apply(self, op: Op, args: list[Expr]) -> Expr:
        """An elementwise op on pulled operands."""
        vector = any(a.vector for a in args)
        level = max((a.level for a in args), default=0)
        codes = [self.as_vector(a) if vector else a.code for a in args]
        if vector and any(a.type.bits == 64 for a in args) and self.lanes > self.wide_lanes:
            raise TooWide
        code = elementwise(op, codes, self.lanes if vector else 1)
        return self.name(op.result.type.scalar(), vector, level, code)

    def _range(self, op: Op, at: Ix) -> Expr:
        start = op.attrs.get("start", 0)
        kind = op.result.type.scalar()
        if not at.lane:
            return Expr(f"((int32_t){at.code} + {start})", kind, False, at.level)
        code = f"kx::iota<{self.lanes}>() + ((int32_t){at.code} + {start})"
        return self.name(kind, True, at.level, code)

    def region(self, region: Region, args: list[list[Expr]]) -> list[Expr]:
        """Apply the body of a reduce, scan or map to expressions, one list per block argument."""
        block = region.block
        flat = [e for group in args for e in group]
        for argument, e in zip(block.arguments, flat, strict=True):
            self.memo[argument, ()] = e
        local: dict[Value, Expr] = dict(zip(block.arguments, flat, strict=True))
        for op in block.ops[:-1]:
            if op.name == "arith.constant":
                e = Expr(literal(op.attrs["value"], op.result.type.elem), op.result.type, False, 0)
                local[op.result] = e
                continue
            if op.name == "tt.assert":
                self._assert(op, local[op.operands[0]])
                continue
            if op.regions or op.name.startswith(("tt.call", "cf.")):
                raise op.refuse("control flow inside a combine function is not supported")
            inputs = [local.get(o) or self.pull(o, ()) for o in op.operands]
            local[op.result] = self.apply(op, inputs)
        return [local.get(v) or self.pull(v, ()) for v in block.ops[-1].operands]

    def _assert(self, op: Op, condition: Expr) -> None:
        """An assertion inside a combine function."""
        text = f"{op.location}: assertion failed: {op.attrs.get('text', [''])[0]}"
        holds = f"kx::all_true({condition.code})" if condition.vector else condition.code
        self.emit(condition.level, f"if (!({holds})) kx::fail(context, {json.dumps(text)});")

    # ---- scratch buffers

    def read(self, buffer: Buffer, index: Index) -> Expr:
        """An element, or a strip of elements, of a buffer."""
        kind = Type(buffer.elem)
        offset, stride = self.locate(buffer, index)
        level = max((i.level for i in index), default=0)
        storage = C_TYPES[buffer.elem]
        pointer = f"{buffer.name} + {offset}"
        vector = any(i.lane for i in index)
        if not vector:
            return self.name(kind, False, level, f"*({pointer})")
        if stride == 1:
            code = f"kx::load<{storage},{self.lanes}>({pointer})"
        else:
            code = f"kx::load_strided<{storage},{self.lanes}>({pointer}, {stride})"
        if buffer.elem == "i1":
            code = f"kx::to_mask<kx::V<uint8_t,{self.lanes}>>({code} != 0)"
        return self.name(kind, True, level, code)

    def locate(self, buffer: Buffer, index: Index) -> tuple[str, int]:
        """Element offset of an index, and the step from lane to lane."""
        terms, stride = [], 0
        for i, step in zip(index, buffer.strides, strict=True):
            stride += step if i.lane else 0
            if i.code != "0":
                terms.append(f"{i.code} * {step}" if step != 1 else i.code)
        return " + ".join(terms) or "0", stride

    def write(self, buffer: Buffer, index: Index, value: Expr) -> str:
        """The statement that stores an expression into a buffer."""
        offset, stride = self.locate(buffer, index)
        pointer = f"{buffer.name} + {offset}"
        storage = C_TYPES[buffer.elem]
        code = value.code
        if not any(i.lane for i in index):
            return f"*({pointer}) = {code};"
        code = self.as_vector(value)
        if buffer.elem == "i1":
            code = f"kx::mask_to_int<uint8_t>({code}, false)"
        if stride == 1:
            return f"kx::store<{storage},{self.lanes}>({pointer}, {code});"
        return f"kx::store_strided<{storage},{self.lanes}>({pointer}, {stride}, {code});"
