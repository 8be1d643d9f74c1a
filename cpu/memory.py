"""Loads and stores of global memory at an index of a loop nest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .cxx import C_TYPES
from .expressions import Expr, Index
from .ir import Op

if TYPE_CHECKING:
    from .addresses import Affine
    from .nest import Nest, Scope


def site(scope: Scope, op: Op) -> str:
    """Arguments of a checked access: context, program, tensor argument and source position."""
    arguments = scope.analysis.function.arguments
    root = scope.analysis.root(op.operands[0])
    number = arguments.index(root) if root in arguments else -1
    return f"program, {number}, {json.dumps(str(op.location))}"


def is_volatile(op: Op) -> bool:
    """Whether a load must look at memory each time, once, and in order."""
    return op.name == "tt.load" and bool(op.attrs.get("isVolatile"))


def read(scope: Scope, op: Op, storage: str, address: str) -> str:
    """A scalar read of global memory."""
    if is_volatile(op) and not scope.checked:
        return f"kx::load_volatile((const {storage} *)({address}))"
    if scope.checked:
        return f"kx::checked_load<{storage}>(context, {address}, {site(scope, op)})"
    return f"*(const {storage} *)({address})"


def write(scope: Scope, op: Op, storage: str, address: str, value: str) -> str:
    """The statement of a scalar write of global memory."""
    if scope.checked:
        return f"kx::checked_store<{storage}>(context, {address}, {value}, {site(scope, op)});"
    return f"*({storage} *)({address}) = {value};"


class Memory:
    """Emits global memory accesses of one nest."""

    def __init__(self, nest: Nest) -> None:
        self.nest = nest

    def load(self, op: Op, index: Index) -> Expr:
        """`tt.load` at an index."""
        nest, addresses = self.nest, self.nest.addresses
        pointer, *rest = op.operands
        mask = rest[0] if rest else None
        other = rest[1] if len(rest) > 1 else None
        kind = op.result.type.scalar()
        storage = C_TYPES[kind.elem]
        base, level, form = addresses.address(pointer, index)
        if not any(i.lane for i in index):
            code = read(nest.scope, op, storage, base)
            if mask is not None:
                at, condition = addresses.condition(mask, index)
                fill = nest.pull(other, index) if other else Expr("0", kind, False, 0)
                level = max(level, at, fill.level)
                code = f"{condition} ? {code} : ({storage}){fill.code}"
            return nest.name(kind, False, level, code)
        return self._load_strip(op, index, form, base)

    def _load_strip(self, op: Op, index: Index, form: Affine, base: str) -> Expr:
        nest, addresses, strip = self.nest, self.nest.addresses, self.nest.strip
        rest = op.operands[1:]
        kind = op.result.type.scalar()
        storage, n = C_TYPES[kind.elem], nest.lanes
        size = kind.stored_bytes
        vector = f"kx::V<{storage},{n}>"
        fill, at = f"{vector}{{}}", 0
        if len(rest) > 1:
            e = nest.pull(rest[1], index)
            fill, at = nest.as_vector(e), e.level
            if kind.elem == "i1":
                fill = f"kx::mask_to_int<uint8_t>({fill}, false)"
        level = max([nest.lane_level, at, *(i.level for i in index), *(lv for lv, _ in form.terms),
                     *(o.level for o, _ in form.offsets)])  # fmt: skip
        start = f"(const {storage}*)({base} + {strip} * {_bytes(form.stride)})"
        if form.stride == size and not form.offsets:
            if not rest:
                code = f"kx::load<{storage},{n}>({start})"
            else:
                known, low, high, vectors = addresses.limits(rest[0], index)
                level = max([level, known, *(v.level for v in vectors)])
                if vectors:
                    at, mask = addresses.lane_mask(rest[0], index)
                    code = f"kx::load_masked<{storage},{n}>({start}, {mask}, {fill})"
                else:
                    low = f"{low} - {strip}" if low != "0" else "0"
                    limits = f"{low}, {high} - {strip}"
                    check = addresses.checked(known)
                    code = f"kx::load_range<{storage},{n}>({check}, {start}, {limits}, {fill})"
        else:
            start = f"({base} + {strip} * {_bytes(form.stride)})"
            at, mask = addresses.lane_mask(rest[0] if rest else None, index)
            level = max(level, at)
            if form.stride == 0 and len(form.offsets) == 1 and form.offsets[0][1] == size:
                code = (f"kx::gather_or_load<{storage},{n}>({start}, {form.offsets[0][0].code}, "
                        f"{mask}, {fill})")  # fmt: skip
            else:
                step = _bytes(form.stride)
                code = (f"kx::gather<{storage},{n}>({start}, {step}, {mask}, {fill}, "
                        f"{form.offset_of_lane()})")  # fmt: skip
        if kind.elem == "i1":
            code = f"kx::to_mask<{vector}>({code} != 0)"
        return nest.name(kind, True, level, code)

    def store(self, op: Op, index: Index, value: Expr) -> str:
        """The statement of a `tt.store` at an index."""
        nest, addresses, strip = self.nest, self.nest.addresses, self.nest.strip
        pointer, mask = op.operands[0], op.operands[2] if len(op.operands) > 2 else None
        kind = value.type
        storage, n, size = C_TYPES[kind.elem], nest.lanes, kind.stored_bytes
        base, _, form = addresses.address(pointer, index)
        if not any(i.lane for i in index):
            guard = f"if ({addresses.condition(mask, index)[1]}) " if mask is not None else ""
            return guard + write(nest.scope, op, storage, base, value.code)
        code = nest.as_vector(value)
        if kind.elem == "i1":
            code = f"kx::mask_to_int<uint8_t>({code}, false)"
        start = f"({storage}*)({base} + {strip} * {_bytes(form.stride)})"
        if form.stride == size and not form.offsets:
            if mask is None:
                return f"kx::store<{storage},{n}>({start}, {code});"
            known, low, high, vectors = addresses.limits(mask, index)
            if vectors:
                lane_mask = addresses.lane_mask(mask, index)[1]
                return f"kx::store_masked<{storage},{n}>({start}, {lane_mask}, {code});"
            low = f"{low} - {strip}" if low != "0" else "0"
            return (f"kx::store_range<{storage},{n}>({addresses.checked(known)}, {start}, {low}, "
                    f"{high} - {strip}, {code});")  # fmt: skip
        lane_mask = addresses.lane_mask(mask, index)[1]
        start = f"({base} + {strip} * {_bytes(form.stride)})"
        return (f"kx::scatter<{storage},{n}>({start}, {_bytes(form.stride)}, {lane_mask}, {code}, "
                f"{form.offset_of_lane()});")  # fmt: skip


def _bytes(stride: int | str) -> str:
    return f"(i64){stride}"
