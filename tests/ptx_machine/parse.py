"""PTX text to statements: labels, scopes, registers and symbols resolved, opcodes left as text."""

import bisect
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

REGISTER_BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip
SHARED_BASE = 1024  # as in core/machine.h

# One part of an operand, as core/program.h has it: kind, value, name.
Part = tuple[str, int, str]
# The parts, an address's offset, and whether it is an address.
Operand = tuple[tuple[Part, ...], int, bool]
NOTHING: Part = ("_", 0, "")


class PtxSyntaxError(ValueError):
    """The text is not what this parser understands."""


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: where it lies among the parameters, in bytes."""

    name: str
    type: str
    offset: int
    size: int


@dataclass(frozen=True)
class Statement:
    """One instruction; `guard` is a register's index or -1."""

    line: int
    guard: int
    negated: bool
    opcode: str
    operands: tuple[Operand, ...]


@dataclass
class Kernel:
    """An entry of a PTX module."""

    name: str
    parameters: list[Parameter]
    threads: int  # as .reqntid or .maxntid says; 0 where neither does
    static_shared: int  # bytes, without the base
    register_bits: list[int] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)

    def replaced(self, index: int, **changes: Any) -> "Kernel":
        """Return a copy in which a statement is another."""
        statements = list(self.statements)
        statements[index] = replace(statements[index], **changes)
        return replace(self, statements=statements)

    def doubled(self, sites: set[int]) -> "Kernel":
        """Return a copy in which the statements at `sites` stand twice."""
        return self._ordered(
            i for i in range(len(self.statements)) for _ in range(1 + (i in sites))
        )

    def moved(self, behind: dict[int, int]) -> "Kernel":
        """Return a copy in which each statement that `behind` names comes behind another, by index.

        A branch to one of them goes to what follows where it was.
        """
        order = [
            each
            for i in range(len(self.statements))
            for each in (*([i] if i not in behind else []), *(s for s in behind if behind[s] == i))
        ]
        return self._ordered(order, behind)

    def _ordered(self, order: Iterable[int], moved: Container[int] = ()) -> "Kernel":
        statements, places = [], []  # where a branch to a statement goes now
        for i in order:
            if i not in moved:
                places += [len(statements)] * (i + 1 - len(places))
            statements.append(self.statements[i])
        places += [len(statements)] * (len(self.statements) + 1 - len(places))

        def led(statement: Statement) -> Statement:
            operands = tuple(
                (tuple((k, places[v] if k == "l" else v, n) for k, v, n in parts), *rest)
                for parts, *rest in statement.operands
            )
            changed = operands != statement.operands
            return replace(statement, operands=operands) if changed else statement

        return replace(self, statements=list(map(led, statements)))


def parse(text: str, entry: str | None = None) -> Kernel:
    """Return the kernel named `entry`, or the only one there is.

    Raises:
        PtxSyntaxError: naming the line and what was not understood.
    """
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^[ \t]*\.(?:loc|file|pragma)\b[^\n]*", "", text, flags=re.M)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", text, re.S))
    chosen = [e for e in entries if entry is None or e[1] == entry]
    if len(chosen) != 1:
        raise PtxSyntaxError(f"entry {entry} among {[e[1] for e in entries]}")
    head = chosen[0]
    symbols, static_shared = _shared_symbols(text)
    parameters = _parameters(head[2])
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    kernel = Kernel(head[1], parameters, int(threads[1]) if threads else 0, static_shared)
    _Body(kernel, text, head.end(), symbols).parse()
    return kernel


def _shared_symbols(text: str) -> tuple[dict[str, int], int]:
    """Return the address of each variable in shared memory, the external ones last."""
    found = re.findall(
        r"(\.extern\s+)?(?:\.visible\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
        r"(?:\[(\d*)\])?\s*;",
        text,
    )
    symbols, at = {}, SHARED_BASE
    for external in (False, True):
        for is_external, align, kind, name, length in found:
            if bool(is_external) is not external:
                continue
            width = max(REGISTER_BITS[kind] // 8, 1)
            step = int(align or width)
            at = -(-at // step) * step
            symbols[name] = at
            at += 0 if external else width * int(length or 1)
    return symbols, at - SHARED_BASE


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        m = re.fullmatch(
            r"\.param\s+((?:\.\w+\s+(?:\d+\s+)?)*?)([\w$]+)(?:\[(\d+)\])?", declaration
        )
        if m is None:
            raise PtxSyntaxError(f"parameter {declaration!r}")
        kind = next(t for t in re.findall(r"\.(\w+)", m[1]) if t in REGISTER_BITS)
        size = REGISTER_BITS[kind] // 8
        align = re.search(r"\.align\s+(\d+)", m[1])
        # A pointer's alignment is that of what it points to.
        step = int(align[1]) if align and ".ptr" not in m[1] else size
        size *= int(m[3] or 1)
        offset = -(-offset // step) * step
        parameters.append(Parameter(m[2], kind, offset, size))
        offset += size
    return parameters


class _Body:
    """Walks through the statements of an entry."""

    def __init__(self, kernel: Kernel, text: str, start: int, symbols: dict[str, int]) -> None:
        self.kernel, self.text, self.start = kernel, text, start
        self.symbols = symbols
        self.parameters = {p.name: p.offset for p in kernel.parameters}
        self.registers: dict[str, int] = {}  # by name, with the scope in front where it is local
        self.families: dict[str, int] = {}  # bits, by the name of %r<100>
        self.scopes: list[int] = [0]
        self.parents = {0: 0}
        self.labels: dict[tuple[int, str], int] = {}
        self.known: dict[str, Operand] = {}  # operands that mean the same in every scope
        self.newlines = [m.start() for m in re.finditer("\n", text)]

    def parse(self) -> None:
        raw: list[tuple[str, int, tuple[int, ...]]] = []
        label = re.compile(r"([\w$]+)\s*:(?!:)")
        at, text = self.start, self.text
        while True:
            while text[at].isspace():
                at += 1
            if text[at] == "{":
                scope = len(self.parents)
                self.parents[scope] = self.scopes[-1]
                self.scopes.append(scope)
                at += 1
            elif text[at] == "}":
                if len(self.scopes) == 1:
                    break
                self.scopes.pop()
                at += 1
            elif found := label.match(text, at):
                self.labels[self.scopes[-1], found[1]] = len(raw)
                at = found.end()
            else:
                end = text.index(";", at)
                statement = " ".join(text[at:end].split())
                if statement.startswith(".reg"):
                    self.declare(statement)
                elif statement.startswith("."):
                    raise PtxSyntaxError(f"line {self.line(at)}: {statement}")
                elif statement:
                    raw.append((statement, at, tuple(self.scopes)))
                at = end + 1
        for statement, at, scopes in raw:
            self.scopes = list(scopes)
            try:
                self.kernel.statements.append(self.statement(statement, self.line(at)))
            except (PtxSyntaxError, KeyError, ValueError) as error:
                raise PtxSyntaxError(f"line {self.line(at)}: {statement[:120]}: {error}") from error

    def line(self, at: int) -> int:
        return bisect.bisect_left(self.newlines, at) + 1

    def declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        bits = REGISTER_BITS[kind[1:]]
        for name in (n.strip() for n in names.split(",")):
            if m := re.fullmatch(r"([%\w$]+)<\d+>", name):
                self.families[m[1]] = bits
            else:
                self.add_register(f"{self.scopes[-1]}:{name}", bits)

    def add_register(self, name: str, bits: int) -> int:
        self.registers[name] = len(self.kernel.register_bits)
        self.kernel.register_bits.append(bits)
        return self.registers[name]

    def statement(self, text: str, line: int) -> Statement:
        guard, negated = -1, False
        if m := re.match(r"@(!?)([%\w$]+)\s*", text):
            guard, negated, text = self.part(m[2])[1], bool(m[1]), text[m.end() :]
        opcode, _, rest = text.partition(" ")
        operands = tuple(self.operand(o) for o in _split(rest))
        return Statement(line, guard, negated, opcode, operands)

    def operand(self, text: str) -> Operand:
        found = self.known.get(text)
        if found is None:
            found = self.read_operand(text)
            names = re.findall(r"[%\w$]+", text)
            if all(n[0] == "%" or n[0].isdigit() or n == "_" for n in names):
                self.known[text] = found
        return found

    def read_operand(self, text: str) -> Operand:
        if text[0] == "{":
            return tuple(self.part(p) for p in _split(text[1:-1])), 0, False
        if text[0] == "[":
            first, *coordinates = _split(text[1:-1])
            base, offset = first, 0
            if m := re.fullmatch(r"([%\w$.]+)\s*([+-])\s*(-?\w+)", first):
                base, offset = m[1], int(m[3], 0) * (-1 if m[2] == "-" else 1)
            parts = [self.part(base.strip())]
            for each in coordinates:
                parts += [self.part(p) for p in _split(each.strip("{} "))]
            return tuple(parts), offset, True
        if "|" in text:
            return tuple(self.part(p) for p in text.split("|")), 0, False
        if m := re.fullmatch(r"([A-Za-z_$][\w$]*)\s*\+\s*(\d+)", text):
            kind, value, name = self.part(m[1])
            return ((kind, value + int(m[2]), name),), 0, False
        return (self.part(text),), 0, False

    def part(self, text: str) -> Part:
        text = text.strip()
        if text == "_":
            return NOTHING
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            return "i", _signed(int(m[1] or m[2], 16)), ""
        if m := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return "i", _signed(int(m[2], 0)) * (-1 if m[1] else 1), ""
        for scope in self.chain():
            if (name := f"{scope}:{text}") in self.registers:
                return "r", self.registers[name], ""
            if (scope, text) in self.labels:
                return "l", self.labels[scope, text], ""
        if text in self.symbols:
            return "s", self.symbols[text], ""
        if text in self.parameters:
            return "i", self.parameters[text], ""
        if text in self.registers:
            return "r", self.registers[text], ""
        if (m := re.fullmatch(r"(%[A-Za-z_$]+)\d+", text)) and m[1] in self.families:
            return "r", self.add_register(text, self.families[m[1]]), ""
        if re.fullmatch(r"%[a-z]\w*(\.[xyz])?", text):
            return "x", 0, text
        raise PtxSyntaxError(f"operand {text!r}")

    def chain(self) -> list[int]:
        """Return the scopes from the innermost outwards."""
        scopes = [self.scopes[-1]]
        while scopes[-1] != 0:
            scopes.append(self.parents[scopes[-1]])
        return scopes


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*found, last] if last else found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
