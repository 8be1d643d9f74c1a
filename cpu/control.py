"""Functions: scalars, control flow, loop-carried tensors; tiles go to the scheduler."""

from __future__ import annotations

from .analysis import Analysis
from .contraction import emit_dot
from .cxx import C_TYPES, ELEMENTWISE, element_bytes, elementwise, literal, register_type
from .effects import emit_effect, is_write
from .ir import Block, Function, Op, Type, Value, walk
from .nest import Buffer, Nest, Scope
from .schedule import Scheduler
from .sinks import GroupEmitter, Sink
from .tiles import TILE_OPS, emit_tile_op
from .views import VIEWS, is_simple_view

_PROGRAM = {"x": 0, "y": 1, "z": 2, 0: 0, 1: 1, 2: 2}
_IGNORED = {"llvm.intr.assume", "tt.assume", "ub.poison"}


class FunctionEmitter:
    """Lines of C++ for one function."""

    def __init__(self, function: Function, vector_bytes: int) -> None:
        self.function = function
        self.analysis = Analysis(function)
        self.scope = Scope(self.analysis, {}, {}, {})
        self.vector_bytes = vector_bytes
        self.arena = 0
        self.prologue: list[str] = []
        self.out: list[str] = []
        self.emitter = GroupEmitter(self.scope, vector_bytes)
        self.scheduler: Scheduler | None = None
        self.loops: list[Op] = []

    # ---- names and memory

    def allocate(self, elem: str, shape: tuple[int, ...]) -> Buffer:
        """A buffer in the scratch memory of a program."""
        buffer = Buffer(self.scope.fresh("b"), elem, shape)
        count = 1
        for size in shape:
            count *= size
        kind = C_TYPES[elem]
        self.prologue.append(f"{kind} *const {buffer.name} = ({kind} *)(arena + {self.arena});")
        # 64 bytes apart from a multiple of the page, so that buffers do not alias in L1
        self.arena += (count * max(1, Type(elem).bits // 8) + 64 + 63) // 64 * 64
        return buffer

    def declare(self, value: Value, code: str = "") -> str:
        """Declare the C++ variable of a scalar, at the top of the function."""
        name = self.scope.fresh("v")
        self.scope.scalars[value] = name
        self.prologue.append(f"{register_type(value.type.elem, 1)} {name}{{}};")
        if code:
            self.out.append(f"{name} = {code};")
        return name

    def scalar(self, value: Value) -> str:
        return self.scope.scalars[value]

    # ---- blocks

    def body(self) -> list[str]:
        """The statements of the function, without its signature."""
        blocks = self.function.body.blocks
        for block in blocks[1:]:
            for argument in block.arguments:
                if argument.type.is_tensor:
                    self.scope.buffers[argument] = self.allocate(
                        argument.type.elem, argument.type.dims
                    )
                else:
                    self.declare(argument)
        for at, block in enumerate(blocks):
            if at:
                self.out.append(f"{block.label}:;")
            self.out.append("{")
            self.block(block)
            self.out.append("}")
        return [*self.prologue, *self.out]

    def block(self, block: Block) -> Scheduler:
        """Emit the ops of a block; the scheduler is left flushed."""
        outer = self.scheduler
        here = Scheduler(self.scope, block, self.out, self.emitter, self.allocate, self.effect)
        self.scheduler = here
        for op in block.ops:
            self.op(op, here)
        here.flush_all()
        self.scheduler = outer
        return here

    def effect(self, nest: Nest, sink: Sink) -> list[str]:
        return emit_effect(self, nest, sink)

    def op(self, op: Op, here: Scheduler) -> None:
        """One op of a block."""
        tensor = any(v.type.is_tensor for v in (*op.results, *op.operands))
        position = here.uses.position[op]
        if op.name in _IGNORED:
            for result in op.results:
                if not result.type.is_tensor:
                    self.declare(result, literal(0, result.type.elem))
        elif op.name in ("scf.for", "scf.while", "scf.if"):
            self.enter_region(op, here)
            getattr(self, "emit_" + op.name[4:])(op, here)
            here.done.add(op)
        elif op.name in ("scf.yield", "scf.condition", "tt.return", "cf.br", "cf.cond_br"):
            self.terminator(op, here)
        elif is_write(op):
            self.write(op, here, tensor)
        elif op.name == "tt.reduce":
            self.reduce(op, here)
        elif op.name == "tt.dot":
            emit_dot(self, op, here)
            here.done.add(op)
        elif op.name in TILE_OPS or (op.name in VIEWS and tensor and not self.lazy(op)):
            emit_tile_op(self, op, here)
            here.done.add(op)
        elif tensor:
            self.lazy_op(op, here, position)
        else:
            self.scalar_op(op, here)

    def lazy(self, op: Op) -> bool:
        return is_simple_view(op) and op.results[0].type.is_tensor

    def lazy_op(self, op: Op, here: Scheduler, position: int) -> None:
        """Inline values cost nothing here; constant lists become static tables."""
        value = op.result
        if op.name == "arith.constant" and isinstance(op.attrs["value"], tuple):
            kind = value.type.elem
            items = ", ".join(literal(v, kind) for v in op.attrs["value"])
            name = self.scope.fresh("b")
            self.prologue.append(f"static const {C_TYPES[kind]} {name}[] = {{{items}}};")
            self.scope.buffers[value] = Buffer(name, kind, value.type.dims)
        elif not self.analysis.is_inline(value):
            raise op.refuse("the CPU backend does not support this op")

    def write(self, op: Op, here: Scheduler, tensor: bool) -> None:
        """Stores, atomics and other effects."""
        position = here.uses.position[op]
        if op.name == "tt.store" and tensor:
            value = op.operands[1]
            here.place(Sink("store", op, (value,), value.type.dims, position))
            return
        for value in here.crossing(position):
            here.materialize(value)
        if tensor:
            shape = next(v.type.dims for v in op.operands if v.type.is_tensor)
            for result in op.results:
                self.scope.buffers[result] = self.allocate(result.type.elem, result.type.dims)
            here.flush_all()
            here.flush(here.place(Sink("each", op, (), shape, position)))
            return
        here.flush_all()
        for result in op.results:
            self.declare(result)
        nest = Nest(self.scope, (), None, 1)
        lines = emit_effect(self, nest, Sink("each", op, (), (), position))
        nest.code[0] += lines
        self.out += nest.text()
        here.done.add(op)

    def reduce(self, op: Op, here: Scheduler) -> None:
        axis = op.attrs["axis"]
        for result in op.results:
            if result.type.is_tensor:
                self.scope.buffers[result] = self.allocate(result.type.elem, result.type.dims)
            else:
                self.declare(result)
        shape = op.operands[0].type.dims
        position = here.uses.position[op]
        here.place(Sink("reduce", op, op.operands, shape, position, axis))

    def scalar_op(self, op: Op, here: Scheduler) -> None:
        """An op on scalars only."""
        here.settle(op.operands)
        args = [self.scalar(o) for o in op.operands]
        if op.name == "arith.constant":
            self.scope.scalars[op.result] = literal(op.attrs["value"], op.result.type.elem)
        elif op.name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = _PROGRAM[op.words[0] if op.words else op.attrs.get("axis", 0)]
            source = "program" if op.name == "tt.get_program_id" else "context->grid"
            self.declare(op.result, f"{source}[{axis}]")
        elif op.name == "tt.load":
            kind = op.result.type
            for group in list(here.open):
                if group.first_store < here.uses.position[op]:
                    here.flush(group)
            code = f"*(const {C_TYPES[kind.elem]} *)({args[0]})"
            if len(args) > 1:
                fill = args[2] if len(args) > 2 else "0"
                code = f"{args[1]} ? {code} : ({C_TYPES[kind.elem]})({fill})"
            self.declare(op.result, code)
        elif op.name in ELEMENTWISE:
            self.declare(op.result, elementwise(op, args, 1))
        else:
            raise op.refuse("the CPU backend does not support this op")
        here.done.add(op)

    # ---- control flow

    def enter_region(self, op: Op, here: Scheduler) -> None:
        """Put into buffers what a region uses and must not recompute inside."""
        writes = any(is_write(inner) for region in op.regions for inner in walk(region))
        if writes:
            for value in here.crossing(here.uses.position[op]):
                here.materialize(value)
        inside = {inner for region in op.regions for inner in walk(region)}
        used = {o for inner in inside for o in inner.operands if o.type.is_tensor}
        for value in used:
            definition = self.analysis.definition.get(value)
            if definition is not None and definition in here.uses.position:
                self.prepare(value, here)
        here.flush_all()
        here.settle(op.operands)

    def prepare(self, value: Value, here: Scheduler) -> None:
        """Make a value cheap to use from inside a region."""
        if value in self.scope.buffers or not value.type.is_tensor:
            return
        if not self.analysis.is_inline(value) or value in self.analysis.splits:
            return
        op = self.analysis.definition[value]
        cheap = self.analysis.cost(value) <= 2 and not self.analysis.reads_memory(value)
        if op in here.uses.position and not (cheap or self.analysis.is_transparent(value)):
            here.materialize(value)
            return
        for operand in op.operands:
            self.prepare(operand, here)

    def store_scalar(self, target: str, value: Value) -> None:
        self.out.append(f"{target} = {self.scalar(value)};")

    def start_carry(self, argument: Value, first: Value, here: Scheduler) -> None:
        """Storage of a loop-carried value, holding its first value."""
        if not argument.type.is_tensor:
            self.declare(argument, self.scalar(first))
            return
        buffer = self.allocate(argument.type.elem, argument.type.dims)
        at = here.uses.position.get(self.analysis.definition.get(first), -1)  # type: ignore[arg-type]
        group = here.place(Sink("keep", None, (first,), first.type.dims, at, None, buffer))
        here.flush(group)
        self.scope.buffers[argument] = buffer

    def increment(
        self, argument: Value, value: Value, body: Block
    ) -> list[tuple[Value, int]] | None:
        """Uniform steps from a carried tensor to its next value: [(operand, sign)] or None."""
        steps: list[tuple[Value, int]] = []
        while value is not argument:
            op = self.analysis.definition.get(value)
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
        op = self.analysis.definition.get(value)
        while op is not None and op.name in VIEWS and op.operands[0].type.is_tensor:
            op = self.analysis.definition.get(op.operands[0])
        if op is None:
            return False
        constant = op.name == "arith.constant" and not isinstance(op.attrs["value"], tuple)
        return op.name == "tt.splat" or constant

    def uniform_code(self, value: Value) -> str:
        op = self.analysis.definition[value]
        while op.name in VIEWS and op.operands[0].type.is_tensor:
            op = self.analysis.definition[op.operands[0]]
        if op.name == "arith.constant":
            return literal(op.attrs["value"], op.result.type.elem)
        return self.scalar(op.operands[0])

    def emit_for(self, op: Op, here: Scheduler) -> None:
        low, high, step, *firsts = op.operands
        body = op.regions[0].block
        counter, *carried = body.arguments
        final = body.ops[-1].operands
        split: dict[Value, list[tuple[Value, int]]] = {}
        for argument, first, last in zip(carried, firsts, final, strict=True):
            steps = None
            if argument.type.is_tensor and not argument.type.is_float:
                if first not in self.scope.buffers and self.analysis.is_inline(first):
                    steps = self.increment(argument, last, body)
            if steps is None:
                self.start_carry(argument, first, here)
            else:
                self.prepare(first, here)
                here.flush_all()
                split[argument] = steps
                self.scope.offsets[argument] = name = self.scope.fresh("k")
                self.prologue.append(f"i64 {name}{{}};")
                self.out.append(f"{name} = 0;")
                self.analysis.splits[argument] = first
        here.flush_all()
        self.loop_header(op, counter, [self.scalar(v) for v in (low, high, step)])
        self.loops.append(op)
        self.block(body)
        self.loops.pop()
        for argument, steps in split.items():
            scale = element_bytes(argument.type) if argument.type.is_pointer else 1
            code = " + ".join(
                f"(i64)({self.uniform_code(v)}) * {sign * scale}" for v, sign in steps
            )
            if code:
                self.out.append(f"{self.scope.offsets[argument]} += {code};")
        self.out.append("}")
        self.finish_carries(op.results, carried)

    def finish_carries(self, results: tuple[Value, ...], carried: list[Value]) -> None:
        """Loop results are what the carried values hold at the end."""
        for result, argument in zip(results, carried, strict=True):
            if argument in self.analysis.splits:
                self.analysis.splits[result] = self.analysis.splits[argument]
                self.scope.offsets[result] = self.scope.offsets[argument]
            elif argument.type.is_tensor:
                self.scope.buffers[result] = self.scope.buffers[argument]
            else:
                self.scope.scalars[result] = self.scope.scalars[argument]

    def loop_header(self, op: Op, counter: Value, bounds: list[str]) -> None:
        low, high, step = bounds
        kind = C_TYPES[counter.type.elem]
        if op.attrs.get("unsigned"):
            kind = "u" + kind
        name = self.declare(counter)
        inner = self.scope.fresh("n")
        # counted in 64 bits: the last step may pass the largest i32
        self.out.append(
            f"for (i64 {inner} = ({kind}){low}; {inner} < (i64)({kind}){high}; "
            f"{inner} += (i64)({kind}){step}) {{"
        )
        self.out.append(f"{name} = {inner};")

    def emit_if(self, op: Op, here: Scheduler) -> None:
        for result in op.results:
            if result.type.is_tensor:
                self.scope.buffers[result] = self.allocate(result.type.elem, result.type.dims)
            else:
                self.declare(result)
        self.out.append(f"if ({self.scalar(op.operands[0])}) {{")
        for at, region in enumerate(op.regions):
            if at:
                self.out.append("} else {")
            self.loops.append(op)
            self.block(region.block)
            self.loops.pop()
        self.out.append("}")

    def emit_while(self, op: Op, here: Scheduler) -> None:
        before, after = (r.block for r in op.regions)
        for argument, first in zip(before.arguments, op.operands, strict=True):
            self.start_carry(argument, first, here)
        for value in (*after.arguments,):
            if value.type.is_tensor:
                self.scope.buffers[value] = self.allocate(value.type.elem, value.type.dims)
            else:
                self.declare(value)
        self.out.append("while (true) {")
        self.loops.append(op)
        self.block(before)
        self.block(after)
        self.loops.pop()
        self.out.append("}")
        for result, value in zip(op.results, after.arguments, strict=True):
            if value.type.is_tensor:
                self.scope.buffers[result] = self.scope.buffers[value]
            else:
                self.scope.scalars[result] = self.scope.scalars[value]

    def terminator(self, op: Op, here: Scheduler) -> None:
        here.settle(op.operands)
        if op.name == "tt.return":
            here.flush_all()
            value = f" {self.scalar(op.operands[0])}" if op.operands else ""
            self.out.append(f"return{value};")
        elif op.name.startswith("cf."):
            self.branch(op, here)
        elif op.name == "scf.condition":
            holder = self.loops[-1]
            self.assign(holder.regions[1].block.arguments, op.operands[1:], here)
            self.out.append(f"if (!{self.scalar(op.operands[0])}) break;")
        else:
            holder = self.loops[-1]
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
            if target in self.analysis.splits or target is value:
                continue
            if not target.type.is_tensor:
                temporary = self.scope.fresh("n")
                self.out.append(f"const auto {temporary} = {self.scalar(value)};")
                copies.append(f"{self.scalar(target)} = {temporary};")
                continue
            buffer = self.scope.buffers[target]
            if self.scope.buffers.get(value) is buffer:
                continue
            direct = self.may_overwrite(target, here, {terminator})
            destination = buffer if direct else self.allocate(buffer.elem, buffer.shape)
            if not direct:
                pending.append((buffer, destination))
            at = len(here.block.ops)
            here.place(Sink("keep", None, (value,), value.type.dims, at, None, destination))
        here.done.add(terminator)
        here.flush_all()
        for buffer, source in pending:
            size = f"sizeof(*{buffer.name}) * {_count(buffer.shape)}"
            self.out.append(f"memcpy({buffer.name}, {source.name}, {size});")
        self.out += copies

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
            if user.results and self.analysis.is_inline(user.result):
                if self._viewed(user.result, here, seen):
                    return True
        return False

    def branch(self, op: Op, here: Scheduler) -> None:
        """cf.br and cf.cond_br: tensors that other blocks use are put into buffers first."""
        for inner in here.block.ops:
            for value in inner.results:
                if value.type.is_tensor and any(
                    here.uses.local(u) is None for u in self.analysis.users.get(value, [])
                ):
                    self.prepare(value, here)
        here.flush_all()
        blocks = {b.label: b for b in self.function.body.blocks}
        jumps = []
        for label, values in op.successors:
            mark = len(self.out)
            self.assign(blocks[label].arguments, values, here)
            jumps.append([*self.out[mark:], f"goto {label};"])
            del self.out[mark:]
        if op.name == "cf.br":
            self.out += jumps[0]
        else:
            self.out += [f"if ({self.scalar(op.operands[0])}) {{", *jumps[0], "} else {",
                         *jumps[1], "}"]  # fmt: skip


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
