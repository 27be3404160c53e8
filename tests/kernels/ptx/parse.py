"""PTX text to a list of instructions: what Triton's compiler and nvcc write, and inline assembly within it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Number:
    text: str

    @property
    def bits(self) -> int:
        text = self.text.rstrip("U")
        return int(text[2:], 16) if text.startswith(("0f", "0d")) else int(text, 0)


@dataclass(frozen=True)
class Symbol:
    """A parameter, the shared memory, or ``_``, which takes what nobody wants."""

    name: str


@dataclass(frozen=True)
class Not:
    operand: Operand


@dataclass(frozen=True)
class Address:
    """Of memory; with coordinates, a box of a tensor map."""

    base: Register | Symbol
    offset: int
    coordinates: tuple[Operand, ...] = ()


Operand = Register | Number | Symbol | Not | Address | tuple


@dataclass
class Instruction:
    """One line. parts: of the name, between its dots; source: where it comes from, as file:line; target: of a jump."""

    guard: str | None
    negated: bool
    name: str
    parts: list[str]
    operands: list[Operand]
    text: str
    source: str
    target: int = -1
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()


@dataclass
class Program:
    """parameters: their names and types; types: of registers, by name or by what comes before the number in it; shared:
    where in shared memory its variables are, behind which there is what is asked for at the launch."""

    name: str
    parameters: dict[str, str]
    threads: int
    types: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_size: int = 0
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str, threads: int | None = None) -> Program:
    """The first kernel in a text. threads: of a block, where the text does not tell."""
    entry = re.search(r"\.entry (\w+)\(\s*(.*?)\)\s*(.*?)\{", text, re.S)
    told = re.search(r"\.reqntid (\d+)", entry[3]) if entry else None
    if entry is None or told is None and threads is None:
        raise ValueError("no kernel with a known number of threads")
    words = [re.sub(r"\[\d+\]", "", one).split() for one in entry[2].split(",") if one.strip()]
    program = Program(entry[1], {one[-1]: one[1].lstrip(".") for one in words}, threads or int(told[1]))
    for kind, names in re.findall(r"\.reg \.(\w+)\s+([^;]+);", text):
        program.types |= {re.sub(r"<\d+>", "", name.strip()): kind for name in names.split(",")}
    files = {number: Path(name).name for number, name in re.findall(r'\.file\s+(\d+) "([^"]+)"', text)}
    _Body(program, files).read(text[entry.end() :], text[: entry.end()].count("\n") + 1)
    return program


def kernels(text: str) -> dict[str, str]:
    """Of a module with several: the text of each, by name."""
    starts = [
        (found.start(), found[1]) for found in re.finditer(r"^(?:\.visible )?\.entry (\w+)\(", text, re.MULTILINE)
    ]
    files = "\n".join(re.findall(r"\.file\s.*", text))
    ends = [*(start for start, _ in starts), len(text)][1:]
    return {name: f"{text[start:end]}\n{files}" for (start, name), end in zip(starts, ends, strict=True)}


class _Body:
    def __init__(self, program: Program, files: dict[str, str]) -> None:
        self.program, self.files = program, files
        self.labels: dict[tuple[str, int], int] = {}  # by name and scope
        self.jumps: list[tuple[Instruction, str, list[int]]] = []
        self.scopes = [0]
        self.num_scopes = 0

    def read(self, text: str, first_line: int) -> None:
        source = ""
        for number, line in enumerate(text.splitlines(), first_line):
            code, _, comment = line.partition("//")
            if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", code):
                if place[2] != "0":  # of no line
                    found = re.match(r"\s*([^\s:]+:\d+)", comment)  # the innermost comes first
                    source = found[1] if found else f"{self.files.get(place[1], place[1])}:{place[2]}"
                continue
            for statement in code.split(";"):
                self.add(statement.strip(), source or f"line {number}")
            if not self.scopes:
                break
        for instruction, name, scopes in self.jumps:
            targets = [self.labels[name, scope] for scope in reversed(scopes) if (name, scope) in self.labels]
            if not targets:
                raise ValueError(f"no such label: {instruction.text}")
            instruction.target = targets[0]

    def add(self, statement: str, source: str) -> None:
        while start := re.match(r"[{}]\s*|([\w$.]+):(?!:)\s*", statement):
            if start[1]:
                self.labels[start[1], self.scopes[-1]] = len(self.program.instructions)
            elif start[0][0] == "{":
                self.num_scopes += 1
                self.scopes.append(self.num_scopes)
            else:
                self.scopes.pop()
            statement = statement[start.end() :]
        if variable := re.match(r"\.shared \.align (\d+) \.[a-z](\d+) ([\w$]+)(?:\[(\d+)\])?", statement):
            alignment, bits, name, count = variable.groups()
            start = -(-self.program.shared_size // int(alignment)) * int(alignment)
            self.program.shared[name] = start
            self.program.shared_size = start + int(bits) // 8 * int(count or 1)
        if not statement or statement.startswith("."):
            return
        found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.S)
        if found is None:
            raise ValueError(f"no instruction: {statement}")
        negated, guard, name, rest = found.groups()
        operands = [self.operand(one) for one in split(rest)]
        instruction = Instruction(guard, bool(negated), name, name.split("."), operands, statement, source)
        if instruction.parts[0] == "bra":
            self.jumps.append((instruction, rest.strip(), list(self.scopes)))
        elif operands:
            stores = isinstance(operands[0], Address)
            instruction.reads = frozenset(registers(operands if stores else operands[1:]))
            instruction.writes = frozenset() if stores else frozenset(registers(operands[:1]))
        self.program.instructions.append(instruction)

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return tuple(self.operand(one) for one in split(text[1:-1]))
        if text.startswith("["):
            address, *coordinates = split(text[1:-1])
            found = re.fullmatch(r"(%?[\w.$]+)\s*(?:\+\s*(-?\w+))?", address)
            if found is None:
                raise ValueError(f"no address: {text}")
            return Address(self.operand(found[1]), int(found[2] or "0", 0), *map(self.operand, coordinates))
        if "|" in text:
            return tuple(self.operand(one) for one in text.split("|"))
        if text.startswith("!"):
            return Not(self.operand(text[1:]))
        if re.fullmatch(r"-?\d\w*", text):
            return Number(text)
        return Register(text) if text.startswith("%") or text in self.program.types else Symbol(text)


def split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    return [one.strip() for one in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{[])+", text) if one.strip()]


def registers(operands: list[Operand] | tuple) -> list[str]:
    names: list[str] = []
    for one in operands:
        if isinstance(one, Register):
            names.append(one.name)
        elif isinstance(one, tuple):
            names += registers(one)
        elif isinstance(one, Not):
            names += registers((one.operand,))
        elif isinstance(one, Address):
            names += registers((one.base, *one.coordinates))
    return names
