"""Functions: scalars, control flow, loop-carried tensors; tiles go to the scheduler."""

from __future__ import annotations

from .analysis import Analysis
from .contraction import emit_dot, emit_dot_scaled
from .cxx import C_TYPES, ELEMENTWISE, elementwise, literal, register_type
from .effects import emit_effect, is_write
from .expressions import Buffer
from .ir import Block, Function, Op, Type, Value
from .memory import read
from .nest import Nest, Scope
from .regions import RegionEmitter
from .schedule import Scheduler
from .sinks import GroupEmitter, Sink
from .tiles import TILE_OPS, emit_tile_op
from .views import VIEWS, is_simple_view

_PROGRAM = {"x": 0, "y": 1, "z": 2, 0: 0, 1: 1, 2: 2}
_IGNORED = {"llvm.intr.assume", "tt.assume", "ub.poison"}


class FunctionEmitter:
    """Lines of C++ for one function."""

    def __init__(self, function: Function, vector_bytes: int, checked: bool = False) -> None:
        self.function = function
        self.analysis = Analysis(function)
        self.scope = Scope(self.analysis, {}, {}, {}, {}, checked)
        self.vector_bytes = vector_bytes
        self.arena = 0
        self.prologue: list[str] = []
        self.out: list[str] = []
        self.emitter = GroupEmitter(self.scope, vector_bytes)
        self.scheduler: Scheduler | None = None
        self.loops: list[Op] = []
        self.regions = RegionEmitter(self)

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
        here = Scheduler(self.scope, block, self.out, self.emitter, self.allocate, self.effect,
                         self.regions.home)  # fmt: skip
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
            self.regions.enter(op, here)
            self.regions.emit(op, here)
            here.done.add(op)
        elif op.name in ("scf.yield", "scf.condition", "tt.return", "cf.br", "cf.cond_br"):
            self.regions.terminator(op, here)
        elif is_write(op):
            self.write(op, here, tensor)
        elif op.name == "tt.reduce":
            self.reduce(op, here)
        elif op.name == "tt.dot":
            emit_dot(self, op, here)
            here.done.add(op)
        elif op.name == "tt.dot_scaled":
            emit_dot_scaled(self, op, here)
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
            code = read(self.scope, op, C_TYPES[kind.elem], args[0])
            if len(args) > 1:
                fill = args[2] if len(args) > 2 else "0"
                code = f"{args[1]} ? {code} : ({C_TYPES[kind.elem]})({fill})"
            self.declare(op.result, code)
        elif op.name in ELEMENTWISE:
            self.declare(op.result, elementwise(op, args, 1))
        else:
            raise op.refuse("the CPU backend does not support this op")
        here.done.add(op)
