"""A loop nest over one iteration space: values are pulled into it by index.

Loops run over the dimensions in order, the lane dimension in strips of `lanes` elements. Every
expression is emitted at the outermost loop level whose variables it needs, once per index.
"""

from __future__ import annotations

from dataclasses import dataclass

from .analysis import Analysis
from .cxx import C_TYPES, element_bytes, elementwise, literal, register_type
from .ir import Op, Region, Type, Value
from .views import VIEWS, source_index


@dataclass(frozen=True)
class Buffer:
    """A tile in the scratch memory of a program, row-major."""

    name: str
    elem: str
    shape: tuple[int, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        steps, step = [], 1
        for size in reversed(self.shape):
            steps.append(step)
            step *= size
        return tuple(reversed(steps))


@dataclass(frozen=True)
class Ix:
    """Index along one dimension: C++ text, whether it runs over the lanes, its loop level."""

    code: str
    lane: bool = False
    level: int = 0


ZERO = Ix("0")
Index = tuple[Ix, ...]


@dataclass(frozen=True)
class Expr:
    """A named value at a loop level, a vector of `lanes` or a scalar."""

    code: str
    type: Type
    vector: bool
    level: int


@dataclass(frozen=True)
class Affine:
    """sum(terms) + stride * (position along the lane dimension) + sum(scale * offset[lane])."""

    terms: tuple[tuple[int, str], ...]
    stride: int | str = 0
    offsets: tuple[tuple[Expr, int], ...] = ()

    def offset_of_lane(self) -> str:
        """A lambda from the lane number to the irregular part."""
        parts = [f"(i64){e.code}[lane] * {scale}" for e, scale in self.offsets]
        return f"[&](int lane) -> i64 {{ return {' + '.join(parts) or '0'}; }}"


@dataclass(frozen=True)
class Mask:
    """Conjunction of scalar conditions, bounds on the lane position, and lane masks."""

    conditions: tuple[tuple[int, str], ...] = ()
    low: tuple[tuple[int, str], ...] = ()
    high: tuple[tuple[int, str], ...] = ()
    vectors: tuple[Expr, ...] = ()


class TooWide(Exception):
    """A 64-bit vector came up in a nest laid out for 32-bit lanes."""


@dataclass
class Scope:
    """What a nest needs to know about the function around it."""

    analysis: Analysis
    scalars: dict[Value, str]
    buffers: dict[Value, Buffer]
    offsets: dict[Value, str]  # split loop-carried tensor -> the scalar to add
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
        self._masks: dict[tuple, tuple[int, str, str]] = {}
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
                    f'_Pragma("GCC unroll {self.unroll}")',
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
            return self.name(scalar, first.vector, first.level,
                             f"{first.code} + ({C_TYPES[scalar.elem]}){self.scope.offsets[value]}")  # fmt: skip
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
            return self.load(op, index)
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
            if op.regions or op.name.startswith(("tt.call", "cf.")):
                raise op.refuse("control flow inside a combine function is not supported")
            inputs = [local.get(o) or self.pull(o, ()) for o in op.operands]
            local[op.result] = self.apply(op, inputs)
        return [local.get(v) or self.pull(v, ()) for v in block.ops[-1].operands]

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

    # ---- addresses

    def affine(self, value: Value, index: Index) -> Affine:
        """An integer or an address (in bytes) as scalar terms, a lane stride and the rest."""
        if not any(i.lane for i in index):
            simple = self._affine_structure(value, index)
            if simple is not None:
                return simple
            e = self.pull(value, index)
            return Affine(((e.level, f"(i64){e.code}"),))
        found = self._affine_structure(value, index)
        if found is not None:
            return found
        e = self.pull(value, index)
        return Affine((), 0, ((e, 1),)) if e.vector else Affine(((e.level, f"(i64){e.code}"),))

    def _affine_structure(self, value: Value, index: Index) -> Affine | None:
        scope = self.scope
        if not value.type.is_tensor:
            return Affine(((0, f"(i64){scope.scalars[value]}"),))
        if value in scope.buffers:
            return None
        if value in scope.offsets:
            first = self.affine(scope.analysis.splits[value], index)
            term = (0, f"(i64){scope.offsets[value]}")
            return Affine((*first.terms, term), first.stride, first.offsets)
        op = scope.analysis.definition.get(value)
        if op is None:
            return None
        if op.name in VIEWS:
            return self.affine(op.operands[0], source_index(op, index, ZERO))
        if op.name == "arith.constant" and not isinstance(op.attrs["value"], tuple):
            return Affine(((0, str(op.attrs["value"])),))
        if op.name == "tt.make_range":
            at, start = index[0], op.attrs.get("start", 0)
            terms = ((0, str(start)),) if start else ()
            if at.lane:
                return Affine(terms, 1)
            return Affine((*terms, (at.level, at.code)))
        if op.name in ("arith.extsi", "arith.index_cast", "tt.bitcast"):
            source = op.operands[0].type
            if source.elem == "i1" or (op.name == "tt.bitcast" and not source.is_pointer):
                return None
            return self.affine(op.operands[0], index)
        if op.name in ("arith.addi", "arith.subi", "tt.addptr") and value.type.elem != "i1":
            scale = element_bytes(value.type) if op.name == "tt.addptr" else 1
            scale = -1 if op.name == "arith.subi" else scale
            return self._sum(op, index, scale)
        if op.name == "arith.muli" and value.type.elem != "i1":
            return self._product(op, index)
        return None

    def _sum(self, op: Op, index: Index, scale: int) -> Affine | None:
        a, b = (self.affine(o, index) for o in op.operands)
        moved = tuple((e, factor * scale) for e, factor in b.offsets)
        terms = tuple((level, f"({t}) * {scale}") for level, t in b.terms)
        return Affine((*a.terms, *(terms if scale != 1 else b.terms)),
                      _add(a.stride, _mul(b.stride, scale)), (*a.offsets, *moved))  # fmt: skip

    def _product(self, op: Op, index: Index) -> Affine | None:
        a, b = (self.affine(o, index) for o in op.operands)
        if a.offsets or b.offsets or (a.stride != 0 and b.stride != 0):
            return None
        if b.stride != 0:
            a, b = b, a
        factor = " + ".join(t for _, t in b.terms) or "0"
        level = max((lv for lv, _ in b.terms), default=0)
        terms = tuple((max(lv, level), f"({t}) * ({factor})") for lv, t in a.terms)
        stride: int | str = 0
        if a.stride != 0:
            number = b.terms[0][1] if len(b.terms) == 1 else factor
            whole = number.lstrip("-").isdigit()
            stride = _mul(a.stride, int(number) if whole else f"({factor})")
            if not whole and level >= self.lane_level:
                return None
        return Affine(terms, stride)

    def address(self, pointer: Value, index: Index) -> tuple[str, int, Affine]:
        """Named byte address of lane position 0, its level, and the affine form."""
        form = self.affine(pointer, index)
        key = (pointer, index, "address")
        if key not in self.memo:
            self.memo[key] = self._accumulate(form.terms)
        e = self.memo[key]
        return e.code, e.level, form

    def _accumulate(self, terms: tuple[tuple[int, str], ...]) -> Expr:
        """One variable per loop level, each adding the terms of its level."""
        running, at = "", 0
        for level in sorted({lv for lv, _ in terms}):
            parts = [t for lv, t in terms if lv == level]
            code = " + ".join([running, *parts] if running else parts)
            running, at = self.scope.fresh("a"), level
            self.emit(level, f"const i64 {running} = {code};")
        return Expr(running or "0", Type("i64"), False, at)

    # ---- masks

    def mask(self, value: Value, index: Index) -> Mask:
        """A mask as scalar conditions, bounds on the lane position and lane masks."""
        scope = self.scope
        if value.type.is_tensor and value not in scope.buffers:
            op = scope.analysis.definition.get(value)
            if op is not None:
                if op.name in VIEWS and scope.analysis.is_inline(value):
                    return self.mask(op.operands[0], source_index(op, index, ZERO))
                if op.name == "arith.andi":
                    return _both(*(self.mask(o, index) for o in op.operands))
                if op.name == "arith.constant" and op.attrs["value"] in (1, -1):
                    return Mask()
                if op.name == "arith.cmpi":
                    found = self._bounds(op, index)
                    if found is not None:
                        return found
        e = self.pull(value, index)
        return Mask(vectors=(e,)) if e.vector else Mask(conditions=((e.level, e.code),))

    def _bounds(self, op: Op, index: Index) -> Mask | None:
        predicate = op.words[0]
        if predicate[0] == "u" or op.operands[0].type.elem == "i1":
            return None
        if not any(i.lane for i in index):
            return None
        a, b = (self.affine(o, index) for o in op.operands)
        if a.offsets or b.offsets:
            return None
        if predicate in ("sgt", "sge"):
            a, b, predicate = b, a, {"sgt": "slt", "sge": "sle"}[predicate]
        stride = _add(a.stride, _mul(b.stride, -1))
        if stride not in (0, 1, -1):
            return None
        left = self._accumulate(a.terms)
        right = self._accumulate(b.terms)
        level = max(left.level, right.level)
        if level >= self.lane_level and stride:
            return None
        gap = f"({right.code} - {left.code})"
        test = {"slt": "<", "sle": "<=", "eq": "==", "ne": "!="}[predicate]
        if stride == 0:
            return Mask(conditions=((level, f"{left.code} {test} {right.code}"),))
        if predicate in ("eq", "ne"):
            return None
        extra = 1 if predicate == "sle" else 0
        if stride == 1:
            return Mask(high=((level, f"{gap} + {extra}"),))
        return Mask(low=((level, f"1 - {gap} - {extra}"),))

    def limits(self, value: Value, index: Index) -> tuple[int, str, str, list[Expr]]:
        """Lane positions [low, high) where scalar conditions and bounds hold; and lane masks."""
        m = self.mask(value, index)
        key = (value, index)
        if key not in self._masks:
            size = self.shape[self.lane_dim] if self.lane_dim is not None else 1
            every = (*m.conditions, *m.low, *m.high)
            level = max((lv for lv, _ in every), default=0)
            low, high = "0", str(size)
            if m.high or m.conditions:
                high = self.scope.fresh("h")
                self.emit(level, f"i64 {high} = {size};")
                for _, bound in m.high:
                    self.emit(level, f"if ({bound} < {high}) {high} = {bound};")
                if m.conditions:
                    condition = " && ".join(f"({c})" for _, c in m.conditions)
                    self.emit(level, f"if (!({condition})) {high} = 0;")
            if m.low:
                low = self.scope.fresh("l")
                self.emit(level, f"i64 {low} = 0;")
                for _, bound in m.low:
                    self.emit(level, f"if ({bound} > {low}) {low} = {bound};")
            self._masks[key] = (level, low, high)
            if level < self.lane_level and (low, high) != ("0", str(size)):
                self.bounds.append((low, high))
        return (*self._masks[key], list(m.vectors))

    def _all(self, level: int) -> str:
        """Whether bounds known at `level` hold in unchecked strips."""
        return "all" if level < self.lane_level else "kx::part{}"

    def condition(self, value: Value, index: Index) -> tuple[int, str]:
        """A mask at an index without lanes."""
        e = self.pull(value, index)
        return e.level, e.code

    def lane_mask(self, value: Value | None, index: Index) -> tuple[int, str]:
        """A mask as one vector."""
        if value is None:
            return 0, f"kx::splat_mask<{self.lanes}>(true)"
        level, low, high, vectors = self.limits(value, index)
        parts = [self.as_vector(v) for v in vectors]
        level = max([level, *(v.level for v in vectors)])
        if (low, high) != ("0", str(self.shape[self.lane_dim or 0])):
            level = max(level, self.lane_level)
            known = self._masks[value, index][0]
            parts.append(f"kx::in_range<{self.lanes}>({self._all(known)}, {low} - {self.strip}, "
                         f"{high} - {self.strip})")  # fmt: skip
        return level, " & ".join(parts) or f"kx::splat_mask<{self.lanes}>(true)"

    # ---- global memory

    def load(self, op: Op, index: Index) -> Expr:
        """`tt.load` at an index."""
        pointer, *rest = op.operands
        mask = rest[0] if rest else None
        other = rest[1] if len(rest) > 1 else None
        kind = op.result.type.scalar()
        storage = C_TYPES[kind.elem]
        base, level, form = self.address(pointer, index)
        if not any(i.lane for i in index):
            code = f"*(const {storage}*)({base})"
            if mask is not None:
                at, condition = self.condition(mask, index)
                fill = self.pull(other, index) if other else Expr("0", kind, False, 0)
                level = max(level, at, fill.level)
                code = f"{condition} ? {code} : ({storage}){fill.code}"
            return self.name(kind, False, level, code)
        return self._load_strip(op, index, form, base)

    def _load_strip(self, op: Op, index: Index, form: Affine, base: str) -> Expr:
        rest = op.operands[1:]
        kind = op.result.type.scalar()
        storage, n = C_TYPES[kind.elem], self.lanes
        size = kind.stored_bytes
        vector = f"kx::V<{storage},{n}>"
        fill, at = f"{vector}{{}}", 0
        if len(rest) > 1:
            e = self.pull(rest[1], index)
            fill, at = self.as_vector(e), e.level
            if kind.elem == "i1":
                fill = f"kx::mask_to_int<uint8_t>({fill}, false)"
        level = max([self.lane_level, at, *(i.level for i in index), *(lv for lv, _ in form.terms),
                     *(o.level for o, _ in form.offsets)])  # fmt: skip
        start = f"(const {storage}*)({base} + {self.strip} * {_bytes(form.stride)})"
        if form.stride == size and not form.offsets:
            if not rest:
                code = f"kx::load<{storage},{n}>({start})"
            else:
                known, low, high, vectors = self.limits(rest[0], index)
                level = max([level, known, *(v.level for v in vectors)])
                if vectors:
                    at, mask = self.lane_mask(rest[0], index)
                    code = f"kx::load_masked<{storage},{n}>({start}, {mask}, {fill})"
                else:
                    low = f"{low} - {self.strip}" if low != "0" else "0"
                    code = (f"kx::load_range<{storage},{n}>({self._all(known)}, {start}, {low}, "
                            f"{high} - {self.strip}, {fill})")  # fmt: skip
        else:
            start = f"({base} + {self.strip} * {_bytes(form.stride)})"
            at, mask = self.lane_mask(rest[0] if rest else None, index)
            level = max(level, at)
            if form.stride == 0 and len(form.offsets) == 1 and form.offsets[0][1] == size:
                code = (f"kx::gather_or_load<{storage},{n}>({start}, {form.offsets[0][0].code}, "
                        f"{mask}, {fill})")  # fmt: skip
            else:
                code = (f"kx::gather<{storage},{n}>({start}, {_bytes(form.stride)}, {mask}, {fill}, "
                        f"{form.offset_of_lane()})")  # fmt: skip
        if kind.elem == "i1":
            code = f"kx::to_mask<{vector}>({code} != 0)"
        return self.name(kind, True, level, code)

    def store(self, op: Op, index: Index, value: Expr) -> str:
        """The statement of a `tt.store` at an index."""
        pointer, mask = op.operands[0], op.operands[2] if len(op.operands) > 2 else None
        kind = value.type
        storage, n, size = C_TYPES[kind.elem], self.lanes, kind.stored_bytes
        base, _, form = self.address(pointer, index)
        if not any(i.lane for i in index):
            guard = f"if ({self.condition(mask, index)[1]}) " if mask is not None else ""
            return f"{guard}*({storage}*)({base}) = {value.code};"
        code = self.as_vector(value)
        if kind.elem == "i1":
            code = f"kx::mask_to_int<uint8_t>({code}, false)"
        start = f"({storage}*)({base} + {self.strip} * {_bytes(form.stride)})"
        if form.stride == size and not form.offsets:
            if mask is None:
                return f"kx::store<{storage},{n}>({start}, {code});"
            known, low, high, vectors = self.limits(mask, index)
            if vectors:
                lane_mask = self.lane_mask(mask, index)[1]
                return f"kx::store_masked<{storage},{n}>({start}, {lane_mask}, {code});"
            low = f"{low} - {self.strip}" if low != "0" else "0"
            return (f"kx::store_range<{storage},{n}>({self._all(known)}, {start}, {low}, "
                    f"{high} - {self.strip}, {code});")  # fmt: skip
        lane_mask = self.lane_mask(mask, index)[1]
        start = f"({base} + {self.strip} * {_bytes(form.stride)})"
        return (f"kx::scatter<{storage},{n}>({start}, {_bytes(form.stride)}, {lane_mask}, {code}, "
                f"{form.offset_of_lane()});")  # fmt: skip


def _bytes(stride: int | str) -> str:
    return f"(i64){stride}"


def _add(a: int | str, b: int | str) -> int | str:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0 or b == 0:
        return b if a == 0 else a
    return f"({a} + {b})"


def _mul(a: int | str, b: int | str) -> int | str:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if a == 0 or b == 0:
        return 0
    if a == 1 or b == 1:
        return b if a == 1 else a
    return f"({a} * {b})"


def _both(a: Mask, b: Mask) -> Mask:
    return Mask(a.conditions + b.conditions, a.low + b.low, a.high + b.high, a.vectors + b.vectors)
