"""Addresses and masks of a loop nest: affine forms, bounds on the lane position.

An address that is affine along the lanes becomes a base and a stride; a mask that compares such a
form with a bound becomes a range of lane positions. Arithmetic inside an address is taken not to
overflow, as on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cxx import element_bytes
from .expressions import ZERO, Expr, Index
from .ir import Op, Type, Value
from .views import VIEWS, source_index

if TYPE_CHECKING:
    from .nest import Nest


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


class Addresses:
    """Affine forms and masks, at indices of one nest."""

    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self._masks: dict[tuple, tuple[int, str, str]] = {}

    def affine(self, value: Value, index: Index) -> Affine:
        """An integer or an address (in bytes) as scalar terms, a lane stride and the rest."""
        if not any(i.lane for i in index):
            simple = self._affine_structure(value, index)
            if simple is not None:
                return simple
            e = self.nest.pull(value, index)
            return Affine(((e.level, f"(i64){e.code}"),))
        found = self._affine_structure(value, index)
        if found is not None:
            return found
        e = self.nest.pull(value, index)
        return Affine((), 0, ((e, 1),)) if e.vector else Affine(((e.level, f"(i64){e.code}"),))

    def _affine_structure(self, value: Value, index: Index) -> Affine | None:
        scope = self.nest.scope
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
            if not whole and level >= self.nest.lane_level:
                return None
        return Affine(terms, stride)

    def address(self, pointer: Value, index: Index) -> tuple[str, int, Affine]:
        """Named byte address of lane position 0, its level, and the affine form."""
        form = self.affine(pointer, index)
        key = (pointer, index, "address")
        if key not in self.nest.memo:
            self.nest.memo[key] = self._accumulate(form.terms)
        e = self.nest.memo[key]
        return e.code, e.level, form

    def _accumulate(self, terms: tuple[tuple[int, str], ...]) -> Expr:
        """One variable per loop level, each adding the terms of its level."""
        running, at = "", 0
        for level in sorted({lv for lv, _ in terms}):
            parts = [t for lv, t in terms if lv == level]
            code = " + ".join([running, *parts] if running else parts)
            running, at = self.nest.scope.fresh("a"), level
            self.nest.emit(level, f"const i64 {running} = {code};")
        return Expr(running or "0", Type("i64"), False, at)

    # ---- masks

    def mask(self, value: Value, index: Index) -> Mask:
        """A mask as scalar conditions, bounds on the lane position and lane masks."""
        scope = self.nest.scope
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
        e = self.nest.pull(value, index)
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
        if level >= self.nest.lane_level and stride:
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
            size = self.nest.shape[self.nest.lane_dim] if self.nest.lane_dim is not None else 1
            every = (*m.conditions, *m.low, *m.high)
            level = max((lv for lv, _ in every), default=0)
            low, high = "0", str(size)
            if m.high or m.conditions:
                high = self.nest.scope.fresh("h")
                self.nest.emit(level, f"i64 {high} = {size};")
                for _, bound in m.high:
                    self.nest.emit(level, f"if ({bound} < {high}) {high} = {bound};")
                if m.conditions:
                    condition = " && ".join(f"({c})" for _, c in m.conditions)
                    self.nest.emit(level, f"if (!({condition})) {high} = 0;")
            if m.low:
                low = self.nest.scope.fresh("l")
                self.nest.emit(level, f"i64 {low} = 0;")
                for _, bound in m.low:
                    self.nest.emit(level, f"if ({bound} > {low}) {low} = {bound};")
            self._masks[key] = (level, low, high)
            if level < self.nest.lane_level and (low, high) != ("0", str(size)):
                self.nest.bounds.append((low, high))
        return (*self._masks[key], list(m.vectors))

    def checked(self, level: int) -> str:
        """Whether bounds known at `level` hold in unchecked strips."""
        return "all" if level < self.nest.lane_level else "kx::part{}"

    def condition(self, value: Value, index: Index) -> tuple[int, str]:
        """A mask at an index without lanes."""
        e = self.nest.pull(value, index)
        return e.level, e.code

    def lane_mask(self, value: Value | None, index: Index) -> tuple[int, str]:
        """A mask as one vector."""
        if value is None:
            return 0, f"kx::splat_mask<{self.nest.lanes}>(true)"
        level, low, high, vectors = self.limits(value, index)
        parts = [self.nest.as_vector(v) for v in vectors]
        level = max([level, *(v.level for v in vectors)])
        if (low, high) != ("0", str(self.nest.shape[self.nest.lane_dim or 0])):
            level = max(level, self.nest.lane_level)
            known = self._masks[value, index][0]
            strip = self.nest.strip
            limits = f"{self.checked(known)}, {low} - {strip}, {high} - {strip}"
            parts.append(f"kx::in_range<{self.nest.lanes}>({limits})")
        return level, " & ".join(parts) or f"kx::splat_mask<{self.nest.lanes}>(true)"


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
