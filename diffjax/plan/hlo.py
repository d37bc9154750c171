"""What a compiled program does that its source does not say: read off XLA's text of it."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
"""Instructions whose results are no memory of their own."""

SLICING = {"parameter", "constant", "bitcast", "copy", "dynamic-slice", "compare", "add", "select"}
"""Instructions of which the fusions are made that only take a slice."""

SCATTERING = "all-reduce-scatter"
"""How the name begins of a TPU's fusion of an all-reduce with the slice that each device keeps of it."""

HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")
SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+(?:e\w+)?)\[([\d,]*)\]")
CALLED = re.compile(r"(body|condition|calls|to_apply|\w+_computation|async_execution_thread)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
INTEGER = re.compile(r"constant \d+\)")
GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\] *\{([^}]*)\})")
CHANNEL = re.compile(r"channel_id=(\d+)")
PRODUCTS = re.compile(r"__cublas|__cudnn|__triton|tpu_custom_call")
NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    """One line of a program: its operation, the shapes of its result, the rest of its text, and its own name."""

    name: str
    result: str
    rest: str
    label: str = ""

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
        if not found or found[1]:
            return int(found[1]) if found else 0
        if found[2] is not None:
            return len(found[2].split(","))
        sizes = dict(axis.replace("'", "").split("=") for axis in found[3].split(","))
        return math.prod(int(sizes[axis.strip(" '")]) for axis in found[4].split(","))


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
            current.append(Instruction(found[3], found[2], found[4], found[1]))
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
    for kind, size, _ in _collectives(program, devices):
        moved[kind] += int(size)
    return moved


def overlapped(program: Program, devices: int) -> int:
    """Those of the bytes of all `collectives` that come while the device works on a product: one stands between where
    the collective starts and where it is done, or in the fusion that moves it on.
    """
    return int(sum(size for _, size, beside in _collectives(program, devices) if beside))


def _collectives(program: Program, devices: int) -> Iterator[tuple[str, float, bool]]:
    """Each collective: its kind, the bytes received in all its runs, and whether a product is beside it."""
    channels = defaultdict(list)
    for name, body in program.computations.items():
        times = program.runs.get(name, 0)
        for i, instruction in enumerate(body):
            kind = instruction.name.removesuffix("-start")
            if kind not in COLLECTIVES or not times:
                continue
            if name.startswith(SCATTERING):  # the all-reduce in such a fusion is how a TPU scatters sums
                kind = "reduce-scatter"
            size = times * _received(kind, instruction, instruction.group or devices)
            channel = CHANNEL.search(instruction.rest)
            if name in program.fused and channel:  # a TPU's, which stands in each fusion that moves it on
                channels[channel[1]].append((kind, size, any(_is_product(program, other) for other in body)))
            else:
                yield kind, size, _is_beside(program, body, i)
    for found in channels.values():
        yield *found[0][:2], any(beside for *_, beside in found)


def _is_beside(program: Program, body: list[Instruction], start: int) -> bool:
    """Whether a product stands between the start of a collective and its end."""
    first = body[start]
    if not first.name.endswith("-start") or '"is_sync":true' in first.rest:
        return False
    ends = re.compile(rf"[^)]*%{re.escape(first.label)}\b(?![.\w\-])")
    rest = body[start + 1 :]
    done = next((i for i, other in enumerate(rest) if other.name.endswith("-done") and ends.match(other.rest)), 0)
    return any(_is_product(program, other) for other in rest[:done])


def _is_product(program: Program, instruction: Instruction) -> bool:
    """Whether an instruction multiplies matrices, or calls what does."""
    if instruction.name in ("dot", "convolution"):
        return True
    if instruction.name == "custom-call":
        return bool(PRODUCTS.search(instruction.rest))
    inside = [name for _, name in CALLED.findall(instruction.rest) if name in program.computations]
    return any(_is_product(program, other) for name in inside for other in program.computations[name])


def copied(program: Program) -> int:
    """The bytes that loops take out of stacked arrays, one slice a round, and put into memory of their own."""
    total = 0.0
    for instruction, times in program.instructions():
        called = [name for _, name in CALLED.findall(instruction.rest) if name in program.computations]
        inside = [other for name in called if name in program.fused for other in program.computations[name]]
        if instruction.name == "dynamic-slice":
            total += times * instruction.bytes
        elif inside and all(other.name in SLICING for other in inside):
            total += times * sum(other.bytes for other in inside if other.name == "dynamic-slice")
    return int(total)


def _received(kind: str, instruction: Instruction, n: int) -> float:
    size, starts = instruction.bytes, instruction.name.endswith("-start")
    if kind == "collective-permute":
        return size / 2 if starts else size
    if kind == "all-reduce":
        return 2 * (n - 1) / n * size
    if kind == "reduce-scatter" and instruction.name != "all-reduce":
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
