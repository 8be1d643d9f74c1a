"""Facts about values that scheduling and emission ask for: users, cost, strides."""

from __future__ import annotations

from functools import cached_property

from .cxx import ELEMENTWISE, element_bytes
from .ir import Function, Op, Value, walk
from .memory import is_volatile
from .views import VIEWS, is_simple_view, source_index

# recomputing a value that costs more than this is dearer than a trip through a buffer
KEEP_ABOVE = 8
_COSTS = {
    "math.sqrt": 8, "math.rsqrt": 12, "arith.divf": 8, "arith.divsi": 30, "arith.remsi": 30,
    "arith.divui": 30, "arith.remui": 30, "arith.remf": 60, "tt.extern_elementwise": 30,
    "tt.precise_divf": 8, "tt.precise_sqrt": 8, "tt.fp_to_fp": 4, "arith.floordivsi": 30,
}  # fmt: skip
_LINEAR = {"arith.addi", "arith.subi", "arith.extsi", "arith.index_cast", "tt.addptr"}
INLINE = ELEMENTWISE | VIEWS | {"arith.constant", "tt.make_range", "tt.load", "ub.poison"}


class Analysis:
    """Lazy facts over one function."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.definition: dict[Value, Op] = {}
        self.users: dict[Value, list[Op]] = {}
        for op in walk(function.body):
            for result in op.results:
                self.definition[result] = op
            for operand in [*op.operands, *(v for _, vs in op.successors for v in vs)]:
                self.users.setdefault(operand, []).append(op)
        # loop-carried tensors that are their first value plus a scalar: value -> first value
        self.splits: dict[Value, Value] = {}
        self._cost: dict[Value, int] = {}
        self._loads: dict[Value, bool] = {}
        self._strides: dict[Value, tuple[int | None, ...]] = {}

    @cached_property
    def parent(self) -> dict[Op, Op | None]:
        """The op whose region holds an op."""
        parents: dict[Op, Op | None] = dict.fromkeys(walk(self.function.body))
        for op in list(parents):
            for region in op.regions:
                for block in region.blocks:
                    parents.update(dict.fromkeys(block.ops, op))
        return parents

    def is_inline(self, value: Value) -> bool:
        """Whether consumers may compute the value where they need it."""
        if value in self.splits:
            return True
        op = self.definition.get(value)
        if op is None or not value.type.is_tensor or op.name not in INLINE:
            return False
        if op.name == "arith.constant" and isinstance(op.attrs["value"], tuple):
            return False
        if is_volatile(op):
            return False
        return op.name not in VIEWS or is_simple_view(op)

    def is_transparent(self, value: Value) -> bool:
        """Addresses, masks and views: always recomputed, so that their structure stays visible."""
        if value in self.splits:
            return True
        op = self.definition.get(value)
        if op is None or not self.is_inline(value):
            return False
        if op.name in VIEWS or op.name in ("arith.constant", "tt.make_range", "ub.poison"):
            return True
        if op.name in _LINEAR or value.type.is_pointer or op.name == "arith.muli":
            return op.name != "tt.load"
        return value.type.elem == "i1" and op.name != "tt.load"

    def cost(self, value: Value) -> int:
        """Rough operations per element to recompute a value."""
        if value not in self._cost:
            op = self.definition.get(value)
            if value in self.splits:
                return 0
            if op is None or not self.is_inline(value):
                self._cost[value] = 2
            elif op.name == "tt.load":
                contiguous = self.unit_dim(op.operands[0]) is not None
                self._cost[value] = 2 if contiguous else 14
            else:
                own = 0 if op.name in VIEWS or op.name in ("arith.constant", "tt.make_range") else 1
                if op.name.startswith("math.") and op.name not in ("math.absf", "math.fma"):
                    own = 12
                own = _COSTS.get(op.name, own)
                if value.type.elem.startswith("f8"):
                    own += 4
                tensors = [o for o in op.operands if o.type.is_tensor]
                self._cost[value] = min(own + sum(self.cost(o) for o in tensors), 1 << 20)
        return self._cost[value]

    def reads_memory(self, value: Value) -> bool:
        """Whether recomputing the value loads from memory."""
        if value not in self._loads:
            op = self.definition.get(value)
            self._loads[value] = False
            if op is not None and self.is_inline(value):
                self._loads[value] = op.name == "tt.load" or any(
                    self.reads_memory(o) for o in op.operands
                )
        return self._loads[value]

    def strides(self, value: Value) -> tuple[int | None, ...]:
        """Step of an integer (or of an address, in bytes) along each dimension, None if unknown."""
        if value not in self._strides:
            if value in self.splits:
                return self.strides(self.splits[value])
            self._strides[value] = (None,) * len(value.type.dims)
            op = self.definition.get(value)
            if op is not None:
                self._strides[value] = self._find_strides(op, value)
        return self._strides[value]

    def _find_strides(self, op: Op, value: Value) -> tuple[int | None, ...]:
        rank = len(value.type.dims)
        if op.name == "tt.make_range":
            return (1,)
        if op.name == "tt.splat" or (
            op.name == "arith.constant" and not isinstance(op.attrs["value"], tuple)
        ):
            return (0,) * rank
        if op.name in VIEWS and is_simple_view(op):
            inner = self.strides(op.operands[0])
            positions = source_index(op, tuple(range(rank)), -1)
            by_dim = {p: s for p, s in zip(positions, inner, strict=True) if p >= 0}
            return tuple(by_dim.get(d, 0) for d in range(rank))
        if op.name in ("arith.extsi", "arith.index_cast", "tt.bitcast") and rank:
            return self.strides(op.operands[0])
        if op.name in ("arith.addi", "arith.subi", "tt.addptr"):
            a, b = (self.strides(o) for o in op.operands)
            if op.name == "tt.addptr":
                size = element_bytes(value.type)
                b = tuple(None if s is None else s * size for s in b)
            sign = -1 if op.name == "arith.subi" else 1
            return tuple(
                None if x is None or y is None else x + sign * y for x, y in zip(a, b, strict=True)
            )
        if op.name == "arith.muli":
            return self._product_strides(op)
        return (None,) * rank

    def _product_strides(self, op: Op) -> tuple[int | None, ...]:
        a, b = op.operands
        for factor, other in ((a, b), (b, a)):
            constant = self.constant(factor)
            if constant is not None:
                return tuple(None if s is None else s * constant for s in self.strides(other))
        return tuple(
            0 if x == 0 and y == 0 else None
            for x, y in zip(self.strides(a), self.strides(b), strict=True)
        )

    def constant(self, value: Value) -> int | None:
        """The value of an integer constant, or of a splat of one."""
        op = self.definition.get(value)
        while op is not None and op.name in VIEWS:
            op = self.definition.get(op.operands[0])
        if op is None or op.name != "arith.constant" or isinstance(op.attrs["value"], tuple):
            return None
        return op.attrs["value"] if isinstance(op.attrs["value"], int) else None

    def unit_dim(self, pointer: Value) -> int | None:
        """The dimension along which a tensor of pointers is contiguous."""
        size = element_bytes(pointer.type)
        dims = pointer.type.dims
        found = [d for d, s in enumerate(self.strides(pointer)) if s == size and dims[d] > 1]
        return found[-1] if found else None

    def root(self, pointer: Value) -> Value:
        """The function argument (or other source) that an address is computed from."""
        while True:
            if pointer in self.splits:
                pointer = self.splits[pointer]
                continue
            op = self.definition.get(pointer)
            if op is None or op.name not in VIEWS | {"tt.addptr", "tt.bitcast"}:
                return pointer
            pointer = op.operands[0]

    def may_disturb(self, store: Op, load: Op) -> bool:
        """Whether a store may overwrite what the load reads for another element of the tile.

        Distinct arguments are taken to be one tensor or disjoint ones: then only accesses that
        walk the tile differently disturb each other.
        """
        to, at = store.operands[0], load.operands[0]
        if to is at:
            return False
        if self.root(to) is self.root(at):
            return True
        pairs = zip(self.strides(to), self.strides(at), strict=False)
        return any(s != t for s, t in pairs if s is not None and t is not None)
