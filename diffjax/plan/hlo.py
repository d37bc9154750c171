"""What a compiled program does that its source does not say: read off XLA's text of it."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
"""Instructions whose results are no memory of their own."""

HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
LINE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")
SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+(?:e\w+)?)\[([\d,]*)\]")
CALLED = re.compile(r"(body|condition|calls|to_apply|\w+_computation|async_execution_thread)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
INTEGER = re.compile(r"constant \d+\)")
GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})")
NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    """One line of a program: its operation, the shapes of its result, and the rest of its text."""

    name: str
    result: str
    rest: str

    @property
    def bytes(self) -> int:
        """Of the result; of a tuple, of all its parts."""
        sizes = (
            _bytes(kind) * math.prod(map(int, filter(None, dims.split(","))))
            for kind, dims in SHAPE.findall(self.result)
        )
        return math.ceil(sum(sizes))

    @property
    def group(self) -> int:
        """How many devices take part in a collective; 0 where the text does not say."""
        found = GROUPS.search(self.rest)
        return 0 if not found else int(found[1]) if found[1] else len(found[2].split(","))


@dataclass(frozen=True)
class Program:
    """The computations of a compiled program, and how often a call of it runs each, loops counted."""

    computations: dict[str, list[Instruction]]
    runs: dict[str, float]
    fused: set[str] = field(default_factory=set)

    def instructions(self, fused: bool = False) -> Iterator[tuple[Instruction, float]]:
        """Each instruction with the number of times that it runs; `fused`: also what is part of another."""
        for name, body in self.computations.items():
            if self.runs.get(name) and (fused or name not in self.fused):
                yield from ((instruction, self.runs[name]) for instruction in body)


def read(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := LINE.match(line):
            current.append(Instruction(found[2], found[1], found[3]))
    runs, fused = defaultdict(float), set()
    _run(entry, 1.0, computations, runs, fused)
    return Program(computations, dict(runs), fused)


def _run(name: str, times: float, computations: dict, runs: dict, fused: set) -> None:
    """Count a computation that runs so many times more, and what it calls; of a conditional, every branch."""
    runs[name] += times
    for instruction in computations[name]:
        each = times * (_trips(instruction, computations) if instruction.name == "while" else 1)
        called = [(kind, other) for kind, other in CALLED.findall(instruction.rest) if other in computations]
        for listed in BRANCHES.findall(instruction.rest):
            called += [("branch", other) for other in re.findall(r"[\w.\-]+", listed) if other in computations]
        for kind, other in called:
            if kind == "calls" and instruction.name == "fusion":
                fused.add(other)
            _run(other, each, computations, runs, fused)


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How often a loop runs: as XLA notes it, or, for TPUs, what its condition compares the counter with; else 1."""
    if known := TRIPS.search(loop.rest):
        return int(known[1])
    condition = computations.get(dict(CALLED.findall(loop.rest)).get("condition", ""), [])
    bounds = [int(line.rest.partition(")")[0]) for line in condition if INTEGER.match(f"{line.name} {line.rest}")]
    return max(bounds) if bounds and any("direction=LT" in line.rest for line in condition) else 1


def collectives(program: Program, devices: int) -> Counter[str]:
    """The bytes that one device receives in one call, by the kind of collective, as a ring of its n devices moves them.

    With b the bytes of the whole array: all-gather, reduce-scatter and all-to-all (n - 1)/n b, all-reduce twice that,
    collective-permute b.
    """
    moved = Counter()
    for instruction, times in program.instructions(fused=True):
        kind = instruction.name.removesuffix("-start")
        if kind in COLLECTIVES:
            moved[kind] += int(times * _received(kind, instruction, instruction.group or devices))
    return moved


def _received(kind: str, instruction: Instruction, n: int) -> float:
    size, starts = instruction.bytes, instruction.name.endswith("-start")
    if kind == "collective-permute":
        return size / 2 if starts else size
    if kind == "all-reduce":
        return 2 * (n - 1) / n * size
    if kind == "reduce-scatter":
        return (n - 1) * size / (n + 1) if starts else (n - 1) * size
    if kind == "all-gather" and starts:
        return (n - 1) / (n + 1) * size
    return (n - 1) / n * size


def largest(program: Program, most: int = 3) -> list[tuple[str, int, str]]:
    """The largest results that have memory of their own: shape, bytes, and where in the source they arise."""
    found = {}
    for instruction, _ in program.instructions():
        if instruction.name not in FREE and not instruction.result.startswith("("):
            shape = re.sub(r"\{.*", "", instruction.result)
            place = NAME.search(instruction.rest)
            found.setdefault(shape, (instruction.bytes, place[1] if place else instruction.name))
    rows = [(shape, size, place) for shape, (size, place) in found.items()]
    return sorted(rows, key=lambda row: -row[1])[:most]


def _bytes(kind: str) -> float:
    bits = int(re.findall(r"\d+", kind)[0]) if kind != "pred" else 8
    return bits / 8
