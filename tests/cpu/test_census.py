"""Every op that the front end of Triton emits is lowered, or refused by name and line.

Elementwise ops come as TTIR text, which Triton's own parser reads first; the others from kernels.
Their values are tested elsewhere: here it is that none is missing, and that the C++ compiles.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir

from kexaone.cpu.emitter import emit_module
from kexaone.cpu.ir import Unsupported, walk
from kexaone.cpu.parser import parse_module
from kexaone.cpu.target import build

DOCS = Path(__file__).parents[2] / "docs" / "cpu.md"

# operand types, result type and attributes -> names of the ops that have them
ELEMENTWISE = {
    ("f32 f32", "f32", ""): """
        arith.addf arith.subf arith.mulf arith.divf arith.remf arith.maxnumf arith.minnumf
        arith.maximumf arith.minimumf math.copysign math.powf math.atan2 tt.precise_divf""",
    ("f32", "f32", ""): """
        arith.negf math.absf math.exp math.exp2 math.log math.log2 math.log1p math.expm1 math.log10
        math.sin math.cos math.tan math.tanh math.atan math.erf math.sqrt math.rsqrt math.cbrt
        math.floor math.ceil math.round math.roundeven math.trunc tt.precise_sqrt""",
    ("f32 f32 f32", "f32", ""): "math.fma",
    ("f32 f32 f32", "f32", "{propagateNan = 0 : i32}"): "tt.clampf",
    ("i32 i32", "i32", ""): """
        arith.addi arith.subi arith.muli arith.andi arith.ori arith.xori arith.shli arith.shrsi
        arith.shrui arith.divsi arith.divui arith.remsi arith.remui arith.floordivsi
        arith.ceildivsi arith.ceildivui arith.maxsi arith.minsi arith.maxui arith.minui
        tt.mulhiui""",
    ("i32", "i32", ""): "math.absi",
    ("i32 i32", "i1", "{predicate = 2 : i64}"): "arith.cmpi",
    ("f32 f32", "i1", "{predicate = 2 : i64}"): "arith.cmpf",
    ("i1 f32 f32", "f32", ""): "arith.select",
    ("f16", "f32", ""): "arith.extf",
    ("f32", "f16", ""): "arith.truncf",
    ("f32", "f8E5M2", "{rounding = 1 : i32}"): "tt.fp_to_fp",
    ("i16", "i32", ""): "arith.extsi arith.extui",
    ("i32", "i16", ""): "arith.trunci",
    ("i32", "f32", ""): "arith.sitofp arith.uitofp arith.bitcast tt.bitcast",
    ("f32", "i32", ""): "arith.fptosi arith.fptoui",
    ("f32", "f32", '{libname = "", libpath = "", pure = true, symbol = "__nv_sinhf"}'):
        "tt.extern_elementwise",
}  # fmt: skip
# of all others, what the kernels below leave in TTIR
STRUCTURED = """
    tt.int_to_ptr tt.ptr_to_int
    tt.addptr tt.atomic_cas tt.atomic_rmw tt.broadcast tt.call tt.dot tt.dot_scaled tt.expand_dims
    tt.gather tt.get_num_programs tt.get_program_id tt.histogram tt.join tt.load tt.make_range
    tt.map_elementwise tt.print tt.assert tt.reduce tt.reshape tt.return tt.scan tt.split tt.splat
    tt.store tt.trans tt.unsplat tt.cat arith.constant scf.for scf.if scf.while scf.yield
    scf.condition cf.cond_br tt.reduce.return tt.scan.return tt.map_elementwise.return"""
NEW_IN_3_9 = ["tt.atomic_load", "tt.atomic_store", "tt.atomic_poll"]
# gone after the passes: tt.make_tensor_descriptor, tt.descriptor_*, tt.make_tensor_ptr, tt.advance
REFUSED = {"math.sinh": "f32", "tt.elementwise_inline_asm": "f32"}


def function(name: str, op: str, inputs: str, output: str, attributes: str = "") -> str:
    """TTIR that loads the operands of one op, and stores its result."""
    kinds = inputs.split()
    arguments = [f"%p{i}: !tt.ptr<{kind}>" for i, kind in enumerate([*kinds, output])]
    lines = ["%at = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32>"]
    for i, kind in enumerate([*kinds, output]):
        block = f"tensor<16x!tt.ptr<{kind}>>"
        lines.append(f"%s{i} = tt.splat %p{i} : !tt.ptr<{kind}> -> {block}")
        lines.append(f"%a{i} = tt.addptr %s{i}, %at : {block}, tensor<16xi32>")
        if i < len(kinds):
            lines.append(f"%x{i} = tt.load %a{i} : {block}")
    given = ", ".join(f"%x{i}" for i in range(len(kinds)))
    types = ", ".join(f"tensor<16x{kind}>" for kind in kinds)
    lines.append(f'%r = "{op}"({given}) {attributes} : ({types}) -> tensor<16x{output}>')
    lines.append(f"tt.store %a{len(kinds)}, %r : tensor<16x!tt.ptr<{output}>>")
    body = "\n    ".join([*lines, "tt.return"])
    return f"tt.func public @{name}({', '.join(arguments)}) {{\n    {body}\n  }}"


def read_by_triton(text: str, folder: Path) -> str:
    """The text as Triton prints it; its verifier has then accepted the op."""
    path = folder / "op.ttir"
    path.write_text(f"module {{\n  {text}\n}}\n")
    context = ir.context()
    ir.load_dialects(context)
    return str(ir.parse_mlir_module(str(path), context))


def test_elementwise_ops_lower_to_what_compiles(tmp_path):
    bodies = []
    for (inputs, output, attributes), names in ELEMENTWISE.items():
        for at, op in enumerate(names.split()):
            text = read_by_triton(function("op", op, inputs, output, attributes), tmp_path)
            module = parse_module(text)
            assert op in {o.name for o in walk(module.kernel.body)}, text
            lines = emit_module(module).splitlines()
            space = f"in_{len(bodies)}_{at}"
            code = [s for s in lines if not s.startswith("#include")]
            bodies.append("\n".join([f"namespace {space} {{", *code, "}"]))
            headers = [s for s in lines if s.startswith("#include")]
    source = "\n".join([*headers, *bodies]).replace('extern "C" ', "")
    assert build(source, "-O0")


@pytest.mark.parametrize("op", REFUSED)
def test_other_ops_are_refused_by_name(op):
    kind = REFUSED[op]
    text = function("op", op, kind, kind).replace("\n    tt.return", ' loc("k.py":7:1)\n tt.return')
    with pytest.raises(Unsupported, match=rf"{re.escape(op)}: the CPU backend does not support"):
        emit_module(parse_module(f"module {{\n{text}\n}}"))


@triton.jit(noinline=True)
def apart(a):
    return a + 1


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def clipped(a):
    if a > 3:
        return a
    return a * 2


@triton.jit
def tiles_kernel(x, y, out, n, N: tl.constexpr):
    if n < 0:
        return
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.device_assert(value > -100, "small")
    tl.device_print("value", n)
    pairs = tl.load(y + tl.arange(0, N)[:, None] * 2 + tl.arange(0, 2)[None, :])
    left, right = tl.split(pairs)
    whole = tl.sum(tl.join(right, left), 1) + tl.associative_scan(value, 0, larger)
    whole += tl.gather(value, at % 7, 0) + tl.histogram(value, N)
    whole += tl.map_elementwise(clipped, value)
    grid = tl.reshape(value, (N // 8, 8))
    whole += tl.reshape(tl.trans(grid), (N,))
    count = 0
    while count < n:
        count += apart(count)
    for i in range(n):
        if i % 2 == 0:
            whole += i
        else:
            whole -= tl.num_programs(0)
    tl.store(out + at, whole + count)
    tl.store(out + N + tl.arange(0, 2 * N), tl.cat(value, at, can_reorder=True))
    tl.atomic_add(out + at, 1)
    tl.atomic_cas(out + tl.program_id(0), 0, 1)
    one = tl.load(x + tl.arange(0, 1)).reshape([], can_reorder=True)
    tl.store((out.to(tl.int64) + 4 * n).to(tl.pointer_type(tl.int32)), one)


@triton.jit
def products_kernel(a, b, sa, sb, out, N: tl.constexpr):
    r, c, g = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, N // 32)[None, :]
    x, y = tl.load(a + r * N + c), tl.load(b + r * N + c)
    scaled = tl.dot_scaled(x, tl.load(sa + r * (N // 32) + g), "e4m3",
                           y, tl.load(sb + r * (N // 32) + g), "e4m3")  # fmt: skip
    tl.store(out + r * N + c, tl.dot(x, y, scaled))


@triton.jit
def ordered_kernel(flags, out, N: tl.constexpr):
    """Each program waits for the one before it."""
    pid, at = tl.program_id(0), tl.arange(0, N)
    found = tl.atomic_poll(flags + pid, 7)
    tl.store(out + pid, tl.atomic_load(out + pid + N, sem="relaxed") + found.to(tl.int32))
    tl.atomic_store(out + 2 * N + at, tl.atomic_load(out + N + at, mask=at < 3), mask=at < 3)
    tl.atomic_store(flags + pid + 1, 7, sem="release")


def left_by(compiled) -> set[str]:
    return {op.name for f in parse_module(compiled.asm["ttir"]).functions for op in walk(f.body)}


def test_kernels_leave_every_structured_op():
    tiles = tiles_kernel.warmup(torch.int32, torch.int32, torch.int32, 3, N=64, debug=True,
                                grid=(1,))  # fmt: skip
    kind = torch.float8_e4m3fn
    products = products_kernel.warmup(kind, kind, torch.uint8, torch.uint8, torch.float32, N=64,
                                      grid=(1,))  # fmt: skip
    missing = set(STRUCTURED.split()) - left_by(tiles) - left_by(products)
    assert not missing


@pytest.mark.skipif(not hasattr(tl, "atomic_poll"), reason="new in Triton 3.9")
def test_ordered_loads_and_stores():
    programs, n = 8, 16
    flags, out = torch.zeros(programs + 1).int(), torch.arange(3 * n).int()
    flags[0] = 7
    ordered_kernel[(programs,)](flags, out, N=n)
    assert (flags == 7).all()
    assert torch.equal(out[:programs], torch.arange(n, n + programs).int() + 1)
    assert out[2 * n :].tolist() == [n, n + 1, n + 2, *range(2 * n + 3, 3 * n)]
    compiled = ordered_kernel.warmup(torch.int32, torch.int32, N=n, grid=(1,))
    assert set(NEW_IN_3_9) <= left_by(compiled)


def test_the_docs_list_the_census():
    listed = set(re.findall(r"`((?:tt|arith|math|scf|cf)\.[\w.]+)`", DOCS.read_text()))
    ops = {op for names in ELEMENTWISE.values() for op in names.split()}
    expected = ops | {o for o in STRUCTURED.split() if not o.endswith(".return")} | set(NEW_IN_3_9)
    assert expected <= listed, sorted(expected - listed)
