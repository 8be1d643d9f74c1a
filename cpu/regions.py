"""Control flow: loops, branches, and the values carried through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cxx import C_TYPES, element_bytes, literal
from .effects import is_write
from .expressions import Buffer
from .ir import Op, Value, walk
from .schedule import Scheduler
from .sinks import Sink
from .views import VIEWS

if TYPE_CHECKING:
    from .control import FunctionEmitter


class RegionEmitter:
    """Emits the ops of one function that hold regions, and the terminators of blocks."""

    def __init__(self, emitter: FunctionEmitter) -> None:
        self.emitter = emitter

    def emit(self, op: Op, here: Scheduler) -> None:
        """A `scf.for`, `scf.while` or `scf.if`."""
        getattr(self, "emit_" + op.name.removeprefix("scf."))(op, here)

    def enter(self, op: Op, here: Scheduler) -> None:
        """Put into buffers what a region uses and must not recompute inside."""
        writes = any(is_write(inner) for region in op.regions for inner in walk(region))
        if writes:
            for value in here.crossing(here.uses.position[op]):
                here.materialize(value)
        inside = {inner for region in op.regions for inner in walk(region)}
        used = {o for inner in inside for o in inner.operands if o.type.is_tensor}
        for value in used:
            definition = self.emitter.analysis.definition.get(value)
            if definition is not None and definition in here.uses.position:
                self.prepare(value, here)
        here.flush_all()
        here.settle(op.operands)

    def prepare(self, value: Value, here: Scheduler) -> None:
        """Make a value cheap to use from inside a region."""
        if value in self.emitter.scope.buffers or not value.type.is_tensor:
            return
        if not self.emitter.analysis.is_inline(value) or value in self.emitter.analysis.splits:
            return
        op = self.emitter.analysis.definition[value]
        cheap = self.emitter.analysis.cost(value) <= 2 and not self.emitter.analysis.reads_memory(
            value
        )
        if op in here.uses.position and not (cheap or self.emitter.analysis.is_transparent(value)):
            here.materialize(value)
            return
        for operand in op.operands:
            self.prepare(operand, here)

    def store_scalar(self, target: str, value: Value) -> None:
        self.emitter.out.append(f"{target} = {self.emitter.scalar(value)};")

    def start_carry(self, argument: Value, first: Value, here: Scheduler) -> None:
        """Storage of a loop-carried value, holding its first value."""
        if not argument.type.is_tensor:
            self.emitter.declare(argument, self.emitter.scalar(first))
            return
        buffer = self.emitter.allocate(argument.type.elem, argument.type.dims)
        at = here.uses.position.get(self.emitter.analysis.definition.get(first), -1)  # type: ignore[arg-type]
        group = here.place(Sink("keep", None, (first,), first.type.dims, at, None, buffer))
        here.flush(group)
        self.emitter.scope.buffers[argument] = buffer

    def increment(self, argument: Value, value: Value) -> list[tuple[Value, int]] | None:
        """Uniform steps from a carried tensor to its next value: [(operand, sign)] or None."""
        steps: list[tuple[Value, int]] = []
        while value is not argument:
            op = self.emitter.analysis.definition.get(value)
            if op is None or op.name not in ("tt.addptr", "arith.addi", "arith.subi"):
                return None
            a, b = op.operands
            if op.name == "arith.addi" and self._uniform(a):
                a, b = b, a
            if not self._uniform(b):
                return None
            steps.append((b, -1 if op.name == "arith.subi" else 1))
            value = a
        return steps

    def _uniform(self, value: Value) -> bool:
        """A splat of a scalar (or a constant), looking through views."""
        op = self.emitter.analysis.definition.get(value)
        while op is not None and op.name in VIEWS and op.operands[0].type.is_tensor:
            op = self.emitter.analysis.definition.get(op.operands[0])
        if op is None:
            return False
        constant = op.name == "arith.constant" and not isinstance(op.attrs["value"], tuple)
        return op.name == "tt.splat" or constant

    def uniform_code(self, value: Value) -> str:
        op = self.emitter.analysis.definition[value]
        while op.name in VIEWS and op.operands[0].type.is_tensor:
            op = self.emitter.analysis.definition[op.operands[0]]
        if op.name == "arith.constant":
            return literal(op.attrs["value"], op.result.type.elem)
        return self.emitter.scalar(op.operands[0])

    def is_known(self, value: Value) -> bool:
        """Whether a uniform value has its scalar already."""
        op = self.emitter.analysis.definition[value]
        while op.name in VIEWS and op.operands[0].type.is_tensor:
            op = self.emitter.analysis.definition[op.operands[0]]
        return op.name == "arith.constant" or op.operands[0] in self.emitter.scope.scalars

    def total(self, argument: Value, steps: list[tuple[Value, int]]) -> str:
        """The sum of the steps of a carried tensor; of addresses in bytes."""
        scale = element_bytes(argument.type) if argument.type.is_pointer else 1
        return " + ".join(f"(i64)({self.uniform_code(v)}) * {sign * scale}" for v, sign in steps)

    def _may_split(self, argument: Value, first: Value) -> bool:
        """Whether a carried tensor could be its first value plus a scalar."""
        kind = argument.type
        unread = first not in self.emitter.scope.buffers
        return (
            kind.is_tensor
            and not kind.is_float
            and unread
            and self.emitter.analysis.is_inline(first)
        )

    def emit_for(self, op: Op, here: Scheduler) -> None:
        low, high, step, *firsts = op.operands
        body = op.regions[0].block
        counter, *carried = body.arguments
        final = body.ops[-1].operands
        split: dict[Value, list[tuple[Value, int]]] = {}
        for argument, first, last in zip(carried, firsts, final, strict=True):
            steps = None
            if self._may_split(argument, first):
                steps = self.increment(argument, last)
            if steps is None:
                self.start_carry(argument, first, here)
            else:
                self.prepare(first, here)
                here.flush_all()
                split[argument] = steps
                self.emitter.scope.offsets[argument] = name = self.emitter.scope.fresh("k")
                self.emitter.prologue.append(f"i64 {name}{{}};")
                self.emitter.out.append(f"{name} = 0;")
                self.emitter.analysis.splits[argument] = first
        here.flush_all()
        self.loop_header(op, counter, [self.emitter.scalar(v) for v in (low, high, step)])
        for argument, steps in split.items():
            if all(self.is_known(v) for v, _ in steps):
                self.emitter.scope.steps[argument] = self.total(argument, steps)
        self.emitter.loops.append(op)
        self.emitter.block(body)
        self.emitter.loops.pop()
        for argument, steps in split.items():
            if steps:
                code = self.total(argument, steps)
                self.emitter.out.append(f"{self.emitter.scope.offsets[argument]} += {code};")
        self.emitter.out.append("}")
        self.finish_carries(op.results, carried)

    def finish_carries(self, results: tuple[Value, ...], carried: list[Value]) -> None:
        """Loop results are what the carried values hold at the end."""
        for result, argument in zip(results, carried, strict=True):
            if argument in self.emitter.analysis.splits:
                self.emitter.analysis.splits[result] = self.emitter.analysis.splits[argument]
                self.emitter.scope.offsets[result] = self.emitter.scope.offsets[argument]
            elif argument.type.is_tensor:
                self.emitter.scope.buffers[result] = self.emitter.scope.buffers[argument]
            else:
                self.emitter.scope.scalars[result] = self.emitter.scope.scalars[argument]

    def loop_header(self, op: Op, counter: Value, bounds: list[str]) -> None:
        low, high, step = bounds
        kind = C_TYPES[counter.type.elem]
        if op.attrs.get("unsigned"):
            kind = "u" + kind
        name = self.emitter.declare(counter)
        inner = self.emitter.scope.fresh("n")
        # counted in 64 bits: the last step may pass the largest i32
        self.emitter.out.append(
            f"for (i64 {inner} = ({kind}){low}; {inner} < (i64)({kind}){high}; "
            f"{inner} += (i64)({kind}){step}) {{"
        )
        self.emitter.out.append(f"{name} = {inner};")

    def emit_if(self, op: Op, here: Scheduler) -> None:
        for result in op.results:
            if result.type.is_tensor:
                self.emitter.scope.buffers[result] = self.emitter.allocate(
                    result.type.elem, result.type.dims
                )
            else:
                self.emitter.declare(result)
        self.emitter.out.append(f"if ({self.emitter.scalar(op.operands[0])}) {{")
        for at, region in enumerate(op.regions):
            if at:
                self.emitter.out.append("} else {")
            self.emitter.loops.append(op)
            self.emitter.block(region.block)
            self.emitter.loops.pop()
        self.emitter.out.append("}")

    def emit_while(self, op: Op, here: Scheduler) -> None:
        before, after = (r.block for r in op.regions)
        for argument, first in zip(before.arguments, op.operands, strict=True):
            self.start_carry(argument, first, here)
        for value in (*after.arguments,):
            if value.type.is_tensor:
                self.emitter.scope.buffers[value] = self.emitter.allocate(
                    value.type.elem, value.type.dims
                )
            else:
                self.emitter.declare(value)
        self.emitter.out.append("while (true) {")
        self.emitter.loops.append(op)
        self.emitter.block(before)
        self.emitter.block(after)
        self.emitter.loops.pop()
        self.emitter.out.append("}")
        for result, value in zip(op.results, after.arguments, strict=True):
            if value.type.is_tensor:
                self.emitter.scope.buffers[result] = self.emitter.scope.buffers[value]
            else:
                self.emitter.scope.scalars[result] = self.emitter.scope.scalars[value]

    def terminator(self, op: Op, here: Scheduler) -> None:
        here.settle(op.operands)
        if op.name == "tt.return":
            here.flush_all()
            value = f" {self.emitter.scalar(op.operands[0])}" if op.operands else ""
            self.emitter.out.append(f"return{value};")
        elif op.name.startswith("cf."):
            self.branch(op, here)
        elif op.name == "scf.condition":
            holder = self.emitter.loops[-1]
            self.assign(holder.regions[1].block.arguments, op.operands[1:], here)
            self.emitter.out.append(f"if (!{self.emitter.scalar(op.operands[0])}) break;")
        else:
            holder = self.emitter.loops[-1]
            if holder.name == "scf.if":
                self.assign(holder.results, op.operands, here)
            elif holder.name == "scf.while":
                self.assign(holder.regions[0].block.arguments, op.operands, here)
            else:
                self.assign(holder.regions[0].block.arguments[1:], op.operands, here)

    def assign(
        self, targets: tuple[Value, ...], values: tuple[Value, ...], here: Scheduler
    ) -> None:
        """Parallel assignment to carried variables and buffers."""
        copies: list[str] = []
        pending: list[tuple[Buffer, Buffer]] = []
        terminator = here.block.ops[-1]
        if any(group.first_store < len(here.block.ops) for group in here.open):
            here.flush_all()
        for target, value in zip(targets, values, strict=True):
            if target in self.emitter.analysis.splits or target is value:
                continue
            if not target.type.is_tensor:
                temporary = self.emitter.scope.fresh("n")
                self.emitter.out.append(f"const auto {temporary} = {self.emitter.scalar(value)};")
                copies.append(f"{self.emitter.scalar(target)} = {temporary};")
                continue
            buffer = self.emitter.scope.buffers[target]
            if self.emitter.scope.buffers.get(value) is buffer:
                continue
            direct = self.may_overwrite(target, here, {terminator})
            destination = buffer if direct else self.emitter.allocate(buffer.elem, buffer.shape)
            if not direct:
                pending.append((buffer, destination))
            at = len(here.block.ops)
            here.place(Sink("keep", None, (value,), value.type.dims, at, None, destination))
        here.done.add(terminator)
        here.flush_all()
        for buffer, source in pending:
            size = f"sizeof(*{buffer.name}) * {_count(buffer.shape)}"
            self.emitter.out.append(f"memcpy({buffer.name}, {source.name}, {size});")
        self.emitter.out += copies

    def home(self, value: Value, here: Scheduler) -> Buffer | None:
        """The buffer of the carried tensor whose next value this is, if nothing else reads it."""
        loop = self.emitter.loops[-1] if self.emitter.loops else None
        if loop is None or loop.name != "scf.for" or here.block is not loop.regions[0].block:
            return None
        carried = here.block.arguments[1:]
        for argument, final in zip(carried, here.block.ops[-1].operands, strict=True):
            if final is value and self._only_through(value, argument, here):
                return self.emitter.scope.buffers.get(argument)
        return None

    def _only_through(self, value: Value, source: Value, here: Scheduler) -> bool:
        """Whether whatever still needs `source` gets it, element for element, from `value`."""
        for user, inside in here.uses.direct(source):
            if user in here.done:
                continue
            inline = user.results and self.emitter.analysis.is_inline(user.result)
            if not inside or not inline or user.name in VIEWS:
                return False
            if user.result is not value and not self._only_through(value, user.result, here):
                return False
        return True

    def may_overwrite(self, target: Value, here: Scheduler, by: set[Op]) -> bool:
        """Whether every remaining reader of a carried tensor reads it element for element."""
        readers = here.uses.sinks(target) - here.done
        if not readers:
            return True
        return readers <= by and not self._viewed(target, here, set())

    def _viewed(self, value: Value, here: Scheduler, seen: set[Value]) -> bool:
        """Whether a value reaches a sink through a view or from an inner region."""
        if value in seen:
            return False
        seen.add(value)
        users = here.uses.direct(value)
        if any(not inside for _, inside in users):
            return True
        for user, _ in users:
            if user.name in VIEWS:
                return True
            inline = user.results and self.emitter.analysis.is_inline(user.result)
            if inline and self._viewed(user.result, here, seen):
                return True
        return False

    def branch(self, op: Op, here: Scheduler) -> None:
        """cf.br and cf.cond_br: tensors that other blocks use are put into buffers first."""
        for inner in here.block.ops:
            for value in inner.results:
                if value.type.is_tensor and any(
                    here.uses.local(u) is None for u in self.emitter.analysis.users.get(value, [])
                ):
                    self.prepare(value, here)
        here.flush_all()
        blocks = {b.label: b for b in self.emitter.function.body.blocks}
        jumps = []
        for label, values in op.successors:
            mark = len(self.emitter.out)
            self.assign(blocks[label].arguments, values, here)
            jumps.append([*self.emitter.out[mark:], f"goto {label};"])
            del self.emitter.out[mark:]
        if op.name == "cf.br":
            self.emitter.out += jumps[0]
        else:
            condition = self.emitter.scalar(op.operands[0])
            self.emitter.out += [f"if ({condition}) {{", *jumps[0], "} else {", *jumps[1], "}"]


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
