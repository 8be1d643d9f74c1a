"""Grouping the ops of one block into loop nests.

Elementwise values are never computed on their own: stores, reductions and buffers pull them. A
sink joins an open group of its shape unless it needs something that group only has at its end.
Values that depend on memory and are used after a later write are put in a buffer before that write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .analysis import KEEP_ABOVE, Analysis
from .expressions import Buffer
from .ir import Block, Op, Value
from .nest import Nest, Scope
from .sinks import Group, GroupEmitter, KeepPlan, Sink
from .views import VIEWS


@dataclass
class Uses:
    """Which non-inline ops of a block a value reaches through inline ones."""

    block: Block
    analysis: Analysis
    position: dict[Op, int] = field(default_factory=dict)
    _reach: dict[Value, frozenset[Op]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.position = {op: at for at, op in enumerate(self.block.ops)}

    def local(self, op: Op) -> Op | None:
        """The op of this block that is, or holds, `op`."""
        current: Op | None = op
        while current is not None and current not in self.position:
            current = self.analysis.parent.get(current)
        return current

    def direct(self, value: Value) -> list[tuple[Op, bool]]:
        """Users as ops of this block, and whether the user itself is in the block."""
        found = []
        for user in self.analysis.users.get(value, []):
            at = self.local(user)
            if at is not None:
                found.append((at, at is user))
        return found

    def sinks(self, value: Value) -> frozenset[Op]:
        """The non-inline ops of the block that need the value."""
        if value not in self._reach:
            self._reach[value] = frozenset()
            found: set[Op] = set()
            for user, here in self.direct(value):
                if here and user.results and self.analysis.is_inline(user.result):
                    found |= self.sinks(user.result)
                    found |= {self.block.ops[-1]} if self._leaves(user.result) else set()
                else:
                    found.add(user)
            self._reach[value] = frozenset(found)
        return self._reach[value]

    def _leaves(self, value: Value) -> bool:
        """Whether a value is used in another block of the function."""
        return any(self.local(u) is None for u in self.analysis.users.get(value, []))

    def last_direct(self, value: Value) -> int:
        """Position of the last direct user, looking through views."""
        last = -1
        for user, here in self.direct(value):
            if here and user.name in VIEWS and user.results[0].type.is_tensor:
                last = max(last, self.last_direct(user.result))
            else:
                last = max(last, self.position[user])
        if self._leaves(value):
            last = len(self.block.ops)
        return last


class Scheduler(KeepPlan):
    """Open groups of one block, and the decision when each is emitted."""

    def __init__(
        self, scope: Scope, block: Block, out: list[str], emitter: GroupEmitter,
        allocate: Callable[[str, tuple[int, ...]], Buffer],
        effect: Callable[[Nest, Sink], list[str]],
        home: Callable[[Value, Scheduler], Buffer | None],
    ) -> None:  # fmt: skip
        self.scope, self.block, self.out = scope, block, out
        self.analysis = scope.analysis
        self.uses = Uses(block, scope.analysis)
        self._emitter, self._allocate, self._effect = emitter, allocate, effect
        self._home = home
        self.open: list[Group] = []
        self.done: set[Op] = set()

    # ---- placing

    def leaves(self, values: tuple[Value, ...]) -> tuple[set[Value], list[int], set[Value]]:
        """Buffers, positions of loads, and all inline values that pulling `values` would touch."""
        buffers: set[Value] = set()
        loads: list[int] = []
        inline: set[Value] = set()
        pending = list(values)
        while pending:
            value = pending.pop()
            if value in inline or value in buffers:
                continue
            if value in self.scope.buffers or not self.analysis.is_inline(value):
                buffers.add(value)
                continue
            inline.add(value)
            if value in self.analysis.splits:
                pending.append(self.analysis.splits[value])
                continue
            op = self.analysis.definition[value]
            if op.name == "tt.load" and op in self.uses.position:
                loads.append(self.uses.position[op])
            pending += op.operands
        return buffers, loads, inline

    def place(self, sink: Sink) -> Group:
        """Put a sink into an open group or a new one, after emitting what it waits for."""
        roots = sink.values
        if sink.op is not None and sink.kind == "store":
            roots = sink.op.operands
        if sink.op is not None and sink.kind == "each":
            roots = sink.op.operands
        needed, loads, _ = self.leaves(roots)
        for group in list(self.open):
            if group.outputs & needed:
                self.flush(group)
        latest = max(loads, default=-1)
        for group in list(self.open):
            if group.first_store < latest:
                self.flush(group)
        if sink.kind in ("store", "each"):
            self._before_write(sink)
        group = next((g for g in reversed(self.open) if self._fits(g, sink)), None)
        if sink.kind in ("store", "each"):
            for other in [g for g in self.open if g is not group]:
                self.flush(other)
        if group is None:
            group = Group(sink.shape)
            self.open.append(group)
        group.sinks.append(sink)
        if sink.kind == "reduce" and sink.op is not None:
            group.axis = sink.axis
            group.outputs |= set(sink.op.results)
        if sink.kind == "keep" and sink.target is not None:
            group.outputs |= {v for v in sink.values if self.scope.buffers.get(v) is sink.target}
        return group

    def _fits(self, group: Group, sink: Sink) -> bool:
        if group.shape != sink.shape or sink.kind == "each":
            return False
        if any(s.kind == "each" for s in group.sinks):
            return False
        if sink.kind == "reduce" and group.axis is not None:
            return group.axis == sink.axis
        return True

    def _before_write(self, sink: Sink) -> None:
        """Save what later ops need from memory as it is before this write."""
        if sink.kind == "store" and sink.op is not None:
            for value in self._disturbed(sink.op, sink.op.operands):
                self.materialize(value)
        for value in self.crossing(sink.position):
            safe = sink.op is not None and not self._disturbed(sink.op, (value,))
            if sink.kind == "store" and safe and value.type.dims == sink.shape:
                self._place_saved(value, sink.position - 0.5)
            else:
                self.materialize(value)

    def _disturbed(self, store: Op, values: tuple[Value, ...]) -> list[Value]:
        """Loads among what `values` pull that the store may overwrite too early."""
        _, _, inline = self.leaves(values)
        loads = [self.analysis.definition[v] for v in inline if v in self.analysis.definition]
        return [
            op.result for op in loads
            if op.name == "tt.load" and self.analysis.may_disturb(store, op)
        ]  # fmt: skip

    def _place_saved(self, value: Value, position: float) -> None:
        self.place(Sink("keep", None, (value,), value.type.dims, int(position)))

    def crossing(self, at: int) -> list[Value]:
        """Inline values read from memory before position `at` and used directly after it."""
        found = []
        for op in self.block.ops[:at]:
            for value in op.results:
                if (
                    self.analysis.is_inline(value)
                    and value not in self.scope.buffers
                    and op.name not in VIEWS
                    and not value.type.is_pointer
                    and self.analysis.reads_memory(value)
                    and self.uses.last_direct(value) > at
                    and self.uses.sinks(value) - self.done
                ):
                    found.append(value)
        return found

    # ---- emission

    def materialize(self, value: Value, elem: str = "", transposed: bool = False) -> Buffer:
        """A buffer that holds the value (converted to `elem`), filled by the time of the flush.

        A transposed one serves its caller only: later ops expect rows.
        """
        held = self.scope.buffers.get(value)
        if held is not None and not transposed and elem in ("", held.elem):
            return held
        elem = elem or value.type.elem
        target = replace(self._allocate(elem, value.type.dims), transposed=transposed)
        op = self.analysis.definition.get(value)
        at = self.uses.position.get(op, -1) if op is not None else -1
        group = self.place(Sink("keep", None, (value,), value.type.dims, at, None, target, elem))
        self.flush(group)
        if elem == value.type.elem and not transposed:
            self.scope.buffers[value] = target
        return target

    def flush(self, group: Group) -> None:
        """Emit a group."""
        self.open.remove(group)
        self.done |= {s.op for s in group.sinks if s.op is not None}
        self.out += self._emitter.emit(group, self)

    def flush_all(self) -> None:
        while self.open:
            self.flush(self.open[0])

    def settle(self, values: tuple[Value, ...]) -> None:
        """Emit the groups whose results `values` need."""
        needed, _, _ = self.leaves(tuple(v for v in values if v.type.is_tensor))
        needed |= {v for v in values if not v.type.is_tensor}
        for group in list(self.open):
            if group.outputs & needed:
                self.flush(group)

    # ---- KeepPlan

    def choose(self, group: Group, evaluated: list[Value]) -> list[Value]:
        position = self.uses.position
        kept: list[Value] = []
        order = sorted(
            (v for v in evaluated if self.analysis.definition.get(v) in position),
            key=lambda v: -position[self.analysis.definition[v]],
        )
        keeps = [s for s in group.sinks if s.kind == "keep"]
        saved = {s.values[0] for s in keeps if s.target is None}
        targets = [(s.values[0], s.target) for s in keeps if s.target is not None]
        filled = {value for value, target in targets if target.elem == value.type.elem}
        # what these fill serves later users as well, so that what it was made of need not be kept
        rows = {value for value, target in targets if value in filled and not target.transposed}
        for value in order:
            if value in filled:
                continue
            if value in saved and self.uses.sinks(value) - self.done:
                kept.append(value)
                continue
            if self.analysis.is_transparent(value) or self.analysis.cost(value) <= KEEP_ABOVE:
                continue
            if self._wanted(value, {*kept, *rows}):
                kept.append(value)
        return kept

    def _wanted(self, value: Value, kept: set[Value]) -> bool:
        for user, here in self.uses.direct(value):
            inline = here and user.results and self.analysis.is_inline(user.result)
            if inline and user.result not in kept:
                if self.uses.sinks(user.result) - self.done:
                    return True
            elif not inline and user not in self.done:
                return True
        return False

    def buffer(self, value: Value) -> Buffer:
        if value not in self.scope.buffers:
            home = self._home(value, self)
            self.scope.buffers[value] = home or self._allocate(value.type.elem, value.type.dims)
        return self.scope.buffers[value]

    def effect(self, nest: Nest, sink: Sink) -> list[str]:
        return self._effect(nest, sink)
