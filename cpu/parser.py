"""Reads textual TTIR (Triton 3.6 to 3.9) into `ir.Module`.

The text is used instead of the bindings because the bindings hide dense float constants, enum
attributes and locations. Every op is one line, apart from its regions; sources are regular.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .ir import (
    Block,
    Function,
    Location,
    Module,
    Op,
    Region,
    Type,
    Unsupported,
    Value,
    parse_element,
)
from .literals import parse_attributes, parse_constant
from .locations import Locations, split_location

_NAME = r"%[\w.$-]+(?::\d+)?"
# results: one name, one name for several (`%r:2`), or one name each (`%low, %high`)
_OP = re.compile(rf'^(?:({_NAME}(?:, {_NAME})*) = )?"?([a-z_]\w*\.[\w.]+)"?\s*(.*)$', re.S)
_SYMBOL = re.compile(r'@([\w.$]+|"[^"]+")')
_SSA = re.compile(r"%[\w.$-]+(?:#\d+)?")
_BLOCK = re.compile(r"^\^(\w+)(?:\((.*)\))?:")
_KEYED = re.compile(r"\b(\w+) = ([\w.#<>, =]+?)(?=\s|,|$)")
_BOOLEAN_RESULT = {"arith.cmpi", "arith.cmpf"}


def parse_type(text: str) -> Type:
    """`i32`, `tensor<64x!tt.ptr<f32>>`, `!tt.ptr<bf16>` as a Type."""
    text = text.strip()
    if not text.startswith("tensor<"):
        return parse_element(text)
    inner = text[len("tensor<") : -1]
    m = re.match(r"((?:\d+x)*)(.*)$", inner)
    assert m is not None
    shape = tuple(int(d) for d in m[1].split("x")[:-1])
    return parse_element(m[2]).with_shape(shape)


def split_types(text: str) -> list[Type]:
    """A list of types separated by `, ` or ` * `, with or without parentheses."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += {"<": 1, ">": -1}.get(char, 0)
        if char in ",*" and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [parse_type(p) for p in parts if p.strip()]


def split_type_section(text: str) -> tuple[str, str]:
    """Split `operands : types` at the last top-level ` : ` (attributes hold others)."""
    depth = 0
    quoted = False
    for at in range(len(text) - 1, -1, -1):
        char = text[at]
        if char == '"':
            quoted = not quoted
        if quoted:
            continue
        if char == ">" and text[at - 1 : at + 1] == "->":
            continue
        depth += {"}": 1, "]": 1, ">": 1, ")": 1, "{": -1, "[": -1, "<": -1, "(": -1}.get(char, 0)
        if depth == 0 and text[at : at + 2] == ": " and (at == 0 or text[at - 1] == " "):
            return text[:at].strip(), text[at + 2 :].strip()
    return text.strip(), ""


def take_braces(text: str) -> tuple[str, str]:
    """Cut attribute dictionaries `{...}` and `<{...}>` out of an op line, not of its strings."""
    found, kept, depth, start = [], [], 0, 0
    quoted = angled = False
    for at, char in enumerate(text):
        quoted ^= char == '"'
        if quoted or char not in "{}":
            continue
        depth += 1 if char == "{" else -1
        if char == "{" and depth == 1:
            angled = text[start:at].endswith("<")
            kept.append(text[start:at].removesuffix("<"))
            start = at + 1
        elif char == "}" and depth == 0:
            found.append(text[start:at])
            start = at + 2 if angled else at + 1
    return "".join([*kept, text[start:]]), ", ".join(found)


def result_names(text: str) -> list[str]:
    """The names that later ops use: `%a, %r:2` defines %a, %r#0 and %r#1."""
    names = []
    for part in text.split(", ") if text.startswith("%") else []:
        name, _, count = part.partition(":")
        names += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    return names


@dataclass(frozen=True)
class _Line:
    text: str
    location: Location


class _Scope(dict[str, Value]):
    """SSA names of one region over those of the regions around it."""

    def __init__(self, outer: _Scope | None = None) -> None:
        super().__init__(outer or {})


class Parser:
    """One pass over the lines of a module."""

    def __init__(self, text: str) -> None:
        self._locations = Locations(text)
        lines = (line.strip() for line in text.splitlines())
        self._lines = [
            _Line(body, self._locations.resolve(where))
            for body, where in (split_location(s) for s in lines if s and s[0] not in "#/{")
        ]
        self._at = 0

    def module(self) -> Module:
        functions = []
        while self._at < len(self._lines):
            if self._lines[self._at].text.startswith("tt.func"):
                functions.append(self._function())
            else:
                self._at += 1
        return Module(tuple(functions))

    def _function(self) -> Function:
        line = self._next()
        name = _SYMBOL.search(line.text)
        assert name is not None
        open_at = line.text.index("(", name.end())
        close_at = _matching(line.text, open_at)
        scope = _Scope()
        arguments, divisibility = [], []
        for text in _top_level(line.text[open_at + 1 : close_at]):
            body, where = split_location(text)
            bare, attrs = take_braces(body)
            ssa, type_text = bare.split(": ", 1)
            value = Value(ssa.strip(), parse_type(type_text), self._locations.resolve(where))
            scope[value.name] = value
            arguments.append(value)
            divisibility.append(int(parse_attributes(attrs).get("tt.divisibility", 1)))
        rest = take_braces(line.text[close_at + 1 :].removesuffix("{"))[0]
        rest = rest.replace("attributes", "")
        results = split_types(rest.split("->", 1)[1]) if "->" in rest else []
        body = self._region(scope, ())
        self._next()
        return Function(
            name[1].strip('"'), tuple(arguments), tuple(divisibility), tuple(results), body,
            " public " in line.text, line.location,
        )  # fmt: skip

    def _next(self) -> _Line:
        self._at += 1
        return self._lines[self._at - 1]

    def _region(self, scope: _Scope, arguments: tuple[Value, ...]) -> Region:
        """Blocks up to, not including, the line that closes the region."""
        blocks, ops, label = [], [], "bb0"
        while not self._lines[self._at].text.startswith("}"):
            if m := _BLOCK.match(self._lines[self._at].text):
                self._next()
                if ops:
                    blocks.append(Block(label, arguments, tuple(ops)))
                label, ops = m[1], []
                arguments = tuple(self._argument(t) for t in _top_level(m[2] or ""))
                scope.update({a.name: a for a in arguments})
            else:
                ops.append(self._op(scope))
        blocks.append(Block(label, arguments, tuple(ops)))
        return Region(tuple(blocks))

    def _argument(self, text: str) -> Value:
        body, where = split_location(text)
        name, type_text = body.split(": ", 1)
        return Value(name.strip(), parse_type(type_text), self._locations.resolve(where))

    def _op(self, scope: _Scope) -> Op:
        line = self._next()
        m = _OP.match(line.text)
        if m is None:
            raise Unsupported(f"{line.location}: cannot read {line.text!r}")
        named, name, rest = m.groups()
        try:
            if name in ("scf.for", "scf.while", "scf.if"):
                op = getattr(self, "_" + name[4:])(scope, line, rest)
            elif rest.endswith("({"):
                op = self._generic(scope, line, name, rest)
            else:
                op = self._simple(scope, line, name, rest)
        except KeyError as missing:
            raise Unsupported(f"{line.location}: cannot read {line.text!r}: {missing}") from None
        scope.update(zip(result_names(named or ""), op.results, strict=True))
        return op

    def _values(self, types: list[Type], location: Location, line: str) -> tuple[Value, ...]:
        names = result_names(line.split(" = ", 1)[0])
        return tuple(Value(n, t, location) for n, t in zip(names, types, strict=True))

    def _for(self, scope: _Scope, line: _Line, rest: str) -> Op:
        unsigned = rest.startswith("unsigned ")
        m = re.match(r"(?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)", rest)
        assert m is not None
        tail, attrs = rest[m.end() :].removesuffix("{"), {}
        carried = re.search(r"iter_args\(([^)]*)\)", tail)
        pairs = [p.split(" = ") for p in carried[1].split(", ")] if carried else []
        index_type = re.search(r" : (i\d+|index)\s*$", tail)
        types = split_types(tail.split("->", 1)[1].rsplit(" : ", 1)[0]) if pairs else []
        if pairs and not index_type:
            types = split_types(tail.split("->", 1)[1])
        inner = _Scope(scope)
        counter = Value(m[1], Type(index_type[1] if index_type else "index"), line.location)
        arguments = [counter]
        for (name, _), kind in zip(pairs, types, strict=True):
            arguments.append(Value(name.strip(), kind, line.location))
        inner.update({a.name: a for a in arguments})
        body = with_yield(self._region(inner, tuple(arguments)))
        close = self._next()
        attrs = parse_attributes(take_braces(close.text.removeprefix("}"))[1])
        if unsigned:
            attrs["unsigned"] = True
        operands = [scope[m[i]] for i in (2, 3, 4)] + [scope[p[1].strip()] for p in pairs]
        results = self._values(types, close.location, line.text)
        return Op("scf.for", tuple(operands), results, attrs, (), (body,), (), close.location)

    def _while(self, scope: _Scope, line: _Line, rest: str) -> Op:
        m = re.match(r"(?:\((.*?)\) )?: (.*) -> (.*) \{$", rest)
        assert m is not None
        pairs = [p.split(" = ") for p in m[1].split(", ")] if m[1] else []
        inputs, outputs = split_types(m[2]), split_types(m[3])
        inner = _Scope(scope)
        arguments = [
            Value(p[0].strip(), t, line.location) for p, t in zip(pairs, inputs, strict=True)
        ]
        inner.update({a.name: a for a in arguments})
        before = self._region(inner, tuple(arguments))
        self._next()
        after = with_yield(self._region(_Scope(scope), ()))
        where = self._next().location
        operands = tuple(scope[p[1].strip()] for p in pairs)
        results = self._values(outputs, where, line.text)
        return Op("scf.while", operands, results, {}, (), (before, after), (), where)

    def _if(self, scope: _Scope, line: _Line, rest: str) -> Op:
        m = re.match(r"(%\S+)(?: -> (.*))? \{$", rest)
        assert m is not None
        regions = [with_yield(self._region(_Scope(scope), ()))]
        close = self._next()
        if close.text.startswith("} else"):
            regions.append(with_yield(self._region(_Scope(scope), ())))
            close = self._next()
        results = self._values(split_types(m[2] or ""), close.location, line.text)
        return Op("scf.if", (scope[m[1]],), results, {}, (), tuple(regions), (), close.location)

    def _generic(self, scope: _Scope, line: _Line, name: str, rest: str) -> Op:
        bare, attrs = take_braces(rest.removesuffix("({"))
        operands = tuple(scope[s] for s in _SSA.findall(bare))
        regions = [self._region(_Scope(scope), ())]
        close = self._next()
        while close.text.startswith("}, {"):
            regions.append(self._region(_Scope(scope), ()))
            close = self._next()
        tail, more = take_braces(close.text.removeprefix("})"))
        types = split_types(tail.split("->", 1)[1]) if "->" in tail else []
        results = self._values(types, close.location, line.text)
        return Op(name, operands, results, parse_attributes(f"{attrs}, {more}"), (),
                  tuple(regions), (), close.location)  # fmt: skip

    def _simple(self, scope: _Scope, line: _Line, name: str, rest: str) -> Op:
        if name == "arith.constant":
            body, types = split_type_section(rest)
            value, kind = parse_constant(body, types and parse_type(types))
            results = self._values([kind], line.location, line.text)
            return Op(name, (), results, {"value": value}, (), (), (), line.location)
        if name in ("cf.br", "cf.cond_br"):
            return self._branch(scope, line, name, rest)
        bare, attr_text = take_braces(rest)
        body, types = split_type_section(bare)
        attrs = parse_attributes(attr_text)
        if name == "tt.call" and (callee := _SYMBOL.search(body)):
            attrs["callee"] = callee[1].strip('"')
            body = body.replace(callee[0], "", 1)
        if quoted := re.findall(r'"((?:[^"\\]|\\.)*)"', body):
            # MLIR escapes by two hexadecimal digits
            attrs["text"] = [
                re.sub(r"\\([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), t) for t in quoted
            ]
            body = re.sub(r'"(?:[^"\\]|\\.)*"', "", body)
        operands = tuple(scope[s] for s in _SSA.findall(body))
        words = _SSA.sub("", body)
        for key, value in _KEYED.findall(words):
            attrs[key] = value
        words = tuple(re.findall(r"[a-z_]\w*", _KEYED.sub("", words)))
        results: tuple[Value, ...] = ()
        if line.text.startswith("%"):
            count = len(result_names(line.text.split(" = ", 1)[0]))
            kinds = result_types(name, types, operands, count)
            results = self._values(kinds, line.location, line.text)
        return Op(name, operands, results, attrs, words, (), (), line.location)

    def _branch(self, scope: _Scope, line: _Line, name: str, rest: str) -> Op:
        targets = []
        for m in re.finditer(r"\^(\w+)(?:\(([^)]*)\))?", rest):
            passed = tuple(scope[s] for s in _SSA.findall((m[2] or "").split(" : ")[0]))
            targets.append((m[1], passed))
        operands = (scope[_SSA.findall(rest)[0]],) if name == "cf.cond_br" else ()
        return Op(name, operands, (), {}, (), (), tuple(targets), line.location)


def result_types(name: str, types: str, operands: tuple[Value, ...], count: int) -> list[Type]:
    """Result types from the type section of an op's pretty form."""
    if "->" in types:
        found = split_types(types.rsplit("->", 1)[1])
        return found * count if len(found) < count else found
    if " to " in types:
        return [parse_type(types.rsplit(" to ", 1)[1])]
    listed = split_types(types) if types else [operands[0].type]
    if name == "tt.load":
        return [listed[0].loaded()]
    if name in _BOOLEAN_RESULT:
        return [Type("i1", listed[0].shape)]
    if name == "arith.select":
        return [listed[-1]]
    return [listed[0]] * count


def with_yield(region: Region) -> Region:
    """The printed form leaves out a yield of nothing."""
    block = region.block
    if block.ops and block.ops[-1].name in ("scf.yield", "scf.condition"):
        return region
    return Region((replace(block, ops=(*block.ops, Op("scf.yield", (), ()))),))


def _matching(text: str, at: int) -> int:
    depth = 0
    for end in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            return end
    raise Unsupported(f"unbalanced parentheses in {text!r}")


def _top_level(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += {"<": 1, "(": 1, "{": 1, ">": -1, ")": -1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def parse_module(text: str) -> Module:
    """Parse the text of a TTIR module.

    Raises:
        Unsupported: an op or a type cannot be read; the message names the line of the kernel.
    """
    return Parser(text).module()
