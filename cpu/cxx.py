"""C++ spelling of types, literals and elementwise ops (the functions are in runtime/)."""

from __future__ import annotations

import math
import struct
from typing import Any

from .ir import Op, Type

C_TYPES = {
    "f32": "float", "f64": "double", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t",
    "i64": "int64_t", "index": "int64_t", "ptr": "int64_t", "bf16": "uint16_t", "f16": "uint16_t",
    "f8E4M3FN": "uint8_t", "f8E5M2": "uint8_t", "i1": "uint8_t",
}  # fmt: skip
_SHORT = {"bf16": "bf16", "f16": "f16", "f8E4M3FN": "e4m3", "f8E5M2": "e5m2"}
_FORMAT = {"f32": ("<f", "<I"), "f16": ("<e", "<H")}


def register_type(elem: str, lanes: int) -> str:
    """Type of a value in registers: `lanes` of it, or one scalar."""
    if elem == "i1":
        return "bool" if lanes == 1 else f"kx::V<int32_t,{lanes}>"
    return C_TYPES[elem] if lanes == 1 else f"kx::V<{C_TYPES[elem]},{lanes}>"


def float_bits(value: float, elem: str) -> int:
    """Bit pattern of a constant in a 16- or 8-bit format; constants are exact in their format."""
    if elem in _FORMAT:
        pack, raw = _FORMAT[elem]
        return struct.unpack(raw, struct.pack(pack, value))[0]
    if elem == "bf16":
        return struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    if elem == "f8E5M2":
        return struct.unpack("<H", struct.pack("<e", value))[0] >> 8
    sign = 0x80 if math.copysign(1, value) < 0 else 0
    if math.isnan(value):
        return 0x7F
    magnitude = abs(value)
    if magnitude < 2.0**-6:
        return sign | round(magnitude * 512)
    fraction, exponent = math.frexp(magnitude)
    return sign | (exponent + 6) << 3 | (round(fraction * 16) - 8)


def literal(value: Any, elem: str) -> str:
    """A scalar constant."""
    if elem == "i1":
        return "true" if value else "false"
    if elem in ("f32", "f64"):
        suffix = "f" if elem == "f32" else ""
        if math.isnan(value):
            return f'__builtin_nan{suffix}("")'
        if math.isinf(value):
            return ("-" if value < 0 else "") + f"__builtin_inf{suffix}()"
        return float(value).hex() + suffix
    if elem in _SHORT:
        return f"({C_TYPES[elem]}){float_bits(value, elem)}"
    if elem in ("i64", "index", "ptr"):
        return f"(int64_t){value}LL" if value > -(2**63) else "(-9223372036854775807LL-1)"
    return f"({C_TYPES[elem]}){value}" if value != -(2**31) else "(int32_t)(-2147483647-1)"


def widen(code: str, elem: str) -> str:
    """A float of any format as f32 (f64 stays)."""
    return code if elem in ("f32", "f64") else f"kx::{_SHORT[elem]}_to_f32({code})"


def narrow(code: str, source: str, elem: str, rounding: str = "rtne") -> str:
    """An f32 or f64 as a float of format `elem`."""
    if elem == "f64":
        return code if source == "f64" else f"kx::cast<double>({code})"
    if elem == "f32":
        return f"kx::cast<float>({code})" if source == "f64" else code
    if source == "f64":
        code = f"kx::f64_to_f32_odd({code})"
    suffix = "_rtz" if rounding == "rtz" and elem in ("bf16", "f16") else ""
    return f"kx::f32_to_{_SHORT[elem]}{suffix}({code})"


def convert_float(code: str, source: str, elem: str, rounding: str = "rtne") -> str:
    """A float of one format in another."""
    if source.startswith("f8") and elem == "bf16":
        return f"kx::{_SHORT[source]}_to_bf16({code})"
    return narrow(widen(code, source), "f64" if source == "f64" else "f32", elem, rounding)


_INFIX = {
    "arith.addf": "+", "arith.subf": "-", "arith.mulf": "*", "arith.divf": "/",
    "arith.addi": "+", "arith.subi": "-", "arith.muli": "*",
    "arith.andi": "&", "arith.ori": "|", "arith.xori": "^",
    "tt.precise_divf": "/",
}  # fmt: skip
_ON_MASKS = {"arith.addi": "^", "arith.subi": "^", "arith.muli": "&"}
FUNCTIONS = {
    "arith.maxnumf": "max_num", "arith.minnumf": "min_num", "arith.maximumf": "max_nan",
    "arith.minimumf": "min_nan", "arith.maxsi": "max_int", "arith.minsi": "min_int",
    "arith.maxui": "max_unsigned", "arith.minui": "min_unsigned", "arith.divsi": "div_signed",
    "arith.remsi": "rem_signed", "arith.divui": "div_unsigned", "arith.remui": "rem_unsigned",
    "arith.floordivsi": "floor_div", "arith.ceildivsi": "ceil_div",
    "arith.ceildivui": "ceil_div_unsigned", "arith.shli": "shift_left",
    "arith.shrui": "shift_right", "arith.shrsi": "shift_arithmetic", "tt.mulhiui": "mul_high",
    "arith.remf": "fmod_", "math.exp": "exp", "math.exp2": "exp2", "math.log": "log",
    "math.log2": "log2", "math.log1p": "log1p", "math.expm1": "expm1", "math.log10": "log10_",
    "math.sin": "sin", "math.cos": "cos", "math.tan": "tan_", "math.tanh": "tanh",
    "math.erf": "erf", "math.sqrt": "sqrt", "math.rsqrt": "rsqrt", "tt.precise_sqrt": "sqrt",
    "math.absf": "absf", "math.absi": "abs_int", "math.floor": "floor", "math.ceil": "ceil",
    "math.fma": "fma", "math.powf": "pow_", "math.atan2": "atan2_", "math.atan": "atan_",
    "math.roundeven": "rint_", "math.round": "round_", "math.trunc": "trunc_",
    "math.copysign": "copysign", "math.cbrt": "cbrt_",
}  # fmt: skip
# libdevice symbols without their `__nv_` prefix and their trailing f
_LIBDEVICE = {
    **{n: n for n in ("exp", "exp2", "log", "log2", "log1p", "expm1", "sin", "cos", "tanh", "erf",
                      "sqrt", "rsqrt", "floor", "ceil", "fma", "copysign")},
    **{n: n + "_" for n in ("log10", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh",
                            "acosh", "atanh", "cbrt", "erfc", "lgamma", "tgamma", "trunc", "round",
                            "rint", "exp10", "j0", "j1", "pow", "atan2", "fmod", "remainder",
                            "hypot", "fdim", "nextafter")},
    "fabs": "absf", "nearbyint": "rint_", "erfinv": "inverse_normal_erf", "abs": "abs_int",
    "llabs": "abs_int", "fmax": "max_num", "fmin": "min_num", "fast_exp": "exp", "fast_log": "log",
    "fast_log2": "log2", "fast_sin": "sin", "fast_cos": "cos", "fast_tanh": "tanh",
    "fast_exp10": "exp10_", "fast_log10": "log10_", "fast_tan": "tan_", "fast_pow": "pow_",
    "sqrt_rn": "sqrt", "fsqrt_rn": "sqrt", "dsqrt_rn": "sqrt",
    "umulhi": "mul_high", "umul64hi": "mul_high", "mulhi": "mul_high_signed",
    "mul64hi": "mul_high_signed",
}  # fmt: skip
_LIBDEVICE_TESTS = {"isnan": "{0} != {0}", "isinf": "kx::absf({0}) == kx::infinity<{1}>()",
                    "finite": "kx::absf({0}) < kx::infinity<{1}>()",
                    "isfinite": "kx::absf({0}) < kx::infinity<{1}>()",
                    "signbit": "kx::bits<kx::S<{1}>>({0}) < 0"}  # fmt: skip
_INTEGER_TESTS = {"eq": "==", "ne": "!=", "slt": "<", "sle": "<=", "sgt": ">", "sge": ">=",
                  "ult": "<", "ule": "<=", "ugt": ">", "uge": ">="}  # fmt: skip
_FLOAT_TESTS = {"eq": "==", "gt": ">", "ge": ">=", "lt": "<", "le": "<="}
CASTS = {
    "arith.extf", "arith.truncf", "tt.fp_to_fp", "arith.extsi", "arith.extui", "arith.trunci",
    "arith.sitofp", "arith.uitofp", "arith.fptosi", "arith.fptoui", "arith.bitcast", "tt.bitcast",
    "arith.index_cast", "arith.index_castui", "tt.int_to_ptr", "tt.ptr_to_int",
}  # fmt: skip
ELEMENTWISE = (
    {*_INFIX, *FUNCTIONS, *CASTS}
    | {"arith.cmpi", "arith.cmpf", "arith.select", "arith.negf", "tt.clampf"}
    | {"tt.extern_elementwise", "tt.addptr"}
)


def _cast(op: Op, code: str, lanes: int) -> str:
    source, target = op.operands[0].type, op.results[0].type
    to = C_TYPES[target.elem]
    name = op.name.split(".")[1]
    if name in ("extf", "truncf", "fp_to_fp"):
        rounding = op.attrs.get("rounding", op.attrs.get("mode", ""))
        return convert_float(code, source.elem, target.elem, rounding)
    if name in ("bitcast", "int_to_ptr", "ptr_to_int"):
        if "i1" in (source.elem, target.elem) and source.elem != target.elem:
            if source.elem == "i1":
                return f"kx::mask_to_int<{to}>({code}, false)"
            return f"kx::int_to_mask({code})"
        return f"kx::bits<{register_type(target.elem, lanes)}>({code})"
    if name in ("sitofp", "uitofp"):
        if source.elem == "i1":
            code = f"kx::mask_to_int<int32_t>({code}, {'true' if name[0] == 's' else 'false'})"
        elif name == "uitofp":
            code = f"(kx::U<{register_type(source.elem, lanes)}>)({code})"
        if target.elem in ("f32", "f64"):
            return f"kx::cast<{to}>({code})"
        return narrow(f"kx::cast<double>({code})", "f64", target.elem)
    if name in ("fptosi", "fptoui"):
        unsigned = "u" if name == "fptoui" else ""
        if target.elem == "i1":
            return f"kx::int_to_mask(kx::to_int<int32_t>({widen(code, source.elem)}))"
        body = f"kx::to_int<{unsigned}{to}>({widen(code, source.elem)})"
        return f"({register_type(target.elem, lanes)})({body})"
    if source.elem == "i1":
        return f"kx::mask_to_int<{to}>({code}, {'true' if name == 'extsi' else 'false'})"
    if target.elem == "i1":
        return f"kx::int_to_mask({code})"
    if name in ("extui", "index_castui"):
        code = f"(kx::U<{register_type(source.elem, lanes)}>)({code})"
    return f"kx::cast<{to}>({code})"


def _compare(op: Op, a: str, b: str, lanes: int) -> str:
    kind = op.operands[0].type.elem
    predicate = op.words[0] if op.words else str(op.attrs.get("predicate"))
    vector = register_type(kind, lanes)
    if op.name == "arith.cmpi":
        if kind == "i1" and lanes == 1:
            a, b = f"-(int)({a})", f"-(int)({b})"
            vector = "int32_t"
        if predicate[0] == "u":
            a, b = f"(kx::U<{vector}>)({a})", f"(kx::U<{vector}>)({b})"
        return f"kx::to_mask<{vector}>({a} {_INTEGER_TESTS[predicate]} {b})"
    wide = register_type(kind if kind == "f64" else "f32", lanes)
    a, b = widen(a, kind), widen(b, kind)
    unordered = f"({a} != {a}) | ({b} != {b})"
    if predicate in ("true", "false"):
        return f"kx::splat_mask<{lanes}>({predicate})"
    if predicate == "uno":
        test = unordered
    elif predicate == "ord":
        test = f"({a} == {a}) & ({b} == {b})"
    elif predicate == "one":
        test = f"({a} < {b}) | ({a} > {b})"
    elif predicate == "une":
        test = f"{a} != {b}"
    else:
        test = f"{a} {_FLOAT_TESTS[predicate[1:]]} {b}"
        if predicate[0] == "u":
            test = f"({test}) | {unordered}"
    return f"kx::to_mask<{wide}>({test})"


def _extern(op: Op, args: list[str], lanes: int) -> str:
    symbol = str(op.attrs.get("symbol", ""))
    name = symbol.removeprefix("__nv_")
    target = register_type(op.result.type.elem, lanes)
    for candidate in (name, name.removesuffix("f"), name.removesuffix("d")):
        if candidate in _LIBDEVICE_TESTS:
            kind = register_type(op.operands[0].type.elem, lanes)
            mask = f"kx::to_mask<{kind}>({_LIBDEVICE_TESTS[candidate].format(args[0], kind)})"
            return (
                mask if op.result.type.elem == "i1" else f"kx::mask_to_int<int32_t>({mask}, false)"
            )
        if candidate in _LIBDEVICE:
            return f"({target})kx::{_LIBDEVICE[candidate]}({', '.join(args)})"
    if name in ("fdividef", "fast_dividef", "fdiv_rn", "ddiv_rn", "div_rn"):
        return f"{args[0]} / {args[1]}"
    raise op.refuse(f"the library function {symbol} is not supported")


def elementwise(op: Op, args: list[str], lanes: int) -> str:
    """The expression of an elementwise op on registers of `lanes` lanes.

    Arithmetic in a 16- or 8-bit float format is done in fp32 and rounded, which is exact: fp32
    has more than twice their digits.
    """
    elem = op.result.type.elem
    name = op.name
    if name == "tt.addptr":
        size = element_bytes(op.result.type)
        return f"{args[0]} + kx::cast<int64_t>({args[1]}) * {size}"
    if name in CASTS:
        return _cast(op, args[0], lanes)
    if name in ("arith.cmpi", "arith.cmpf"):
        return _compare(op, args[0], args[1], lanes)
    if name == "arith.select":
        return f"kx::select<{register_type(elem, lanes)}>({', '.join(args)})"
    if elem == "i1":
        return f"{args[0]} {_ON_MASKS.get(name) or _INFIX.get(name) or '&'} {args[1]}"
    wide = "f64" if elem == "f64" else "f32"
    if op.result.type.is_float:
        args = [widen(a, v.type.elem) if v.type.is_float else a
                for a, v in zip(args, op.operands, strict=True)]  # fmt: skip
    if name == "tt.extern_elementwise":
        code = _extern(op, args, lanes)
    elif name == "arith.negf":
        code = f"-{args[0]}"
    elif name == "tt.clampf":
        kind = "nan" if "all" in str(op.attrs.get("propagateNan", "none")) else "num"
        code = f"kx::min_{kind}(kx::max_{kind}({args[0]}, {args[1]}), {args[2]})"
    elif name in _INFIX:
        code = f"{args[0]} {_INFIX[name]} {args[1]}"
    else:
        code = f"kx::{FUNCTIONS[name]}({', '.join(args)})"
    return narrow(code, wide, elem) if op.result.type.is_float else code


def element_bytes(pointer: Type) -> int:
    """Bytes of the element a pointer points to (1 for i1, 8 for a pointer)."""
    return pointer.loaded().stored_bytes
