"""The memory that a program needs beside its arguments, read off its trace as the compiler would fuse it.

What is computed value by value has no memory of its own: each operation that reads it computes it again from what it is
made of, which is kept instead. Inner programs that the compiler dissolves (calls, unrolled loops, the branch of one
platform) are read as part of the outer one.
"""

import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffjax.nets import convolution

VIEWS = {"broadcast_in_dim", "convert_element_type", "expand_dims", "iota", "reshape", "squeeze"}
"""What is never written to memory of its own."""

MOVED = {"reshape", "squeeze", "expand_dims", "transpose"}
"""Of these, what reads memory as it lies."""

PRODUCTS = ("dot_general", "conv_general", "pallas")
"""What reads its operands from memory."""

WRITTEN = ("dot_general", "conv", "scan", "while", "cond", "shard_map", "pallas", "gather", "sort", "custom", "dynamic")
WRITTEN += ("reduce", "arg", "cum", "scatter", "random", "threefry")
"""How the names of operations begin whose results always are."""


@dataclass(eq=False)
class Buffer:
    """Memory of so many bytes."""

    size: int


@dataclass(eq=False)
class Value:
    """A value of a program: the buffers from which it can be computed value by value, and whether it is in memory."""

    sources: frozenset[Buffer] = frozenset()
    written: bool = True

    def write(self, size: int) -> None:
        """Put it into memory of its own."""
        self.sources, self.written = frozenset((Buffer(size),)), True


def live_bytes(program: Any, platform: str = "cpu") -> int:
    """The most bytes of intermediate values alive at once in a program for a platform."""
    return _read(program, [Value() for _ in program.invars], platform)[0]


def _read(program: Any, given: Sequence[Value], platform: str) -> tuple[int, list[Value]]:
    """The most bytes of a program's own buffers at once, and its results, for these arguments."""
    values = dict(zip(program.invars, given))
    of = lambda variable: Value() if hasattr(variable, "val") else values.setdefault(variable, Value())
    known = _sources(given)
    last, first, within = {}, {}, []
    for position, equation in enumerate(program.eqns):
        operands = [of(variable) for variable in equation.invars]
        most, results = _results(equation, operands, platform)
        values |= zip(equation.outvars, results)
        within.append(most)
        for buffer in _sources(operands) | _sources(results):
            first.setdefault(buffer, position)
            last[buffer] = position
    out = [of(variable) for variable in program.outvars]
    last |= dict.fromkeys(_sources(out), len(program.eqns))
    return _most(within, {b: (first.get(b, len(program.eqns)), end) for b, end in last.items() if b not in known}), out


def _sources(values: Sequence[Value]) -> frozenset[Buffer]:
    return frozenset().union(*(value.sources for value in values))


def _most(within: Sequence[int], lives: dict[Buffer, tuple[int, int]]) -> int:
    """The most bytes at once, of what each equation needs while it runs and of buffers from equation to equation."""
    change = Counter()
    for buffer, (begin, end) in lives.items():
        change[begin] += buffer.size
        change[end + 1] -= buffer.size
    live = itertools.accumulate(change[position] for position in range(len(within)))
    return max(map(operator.add, live, within), default=0)


def _results(equation: Any, operands: list[Value], platform: str) -> tuple[int, list[Value]]:
    """The bytes that an equation needs while it runs, and its results."""
    if _by_value(equation):
        kept = equation.primitive.name in MOVED and all(value.written for value in operands)
        return 0, [Value(_sources(operands), kept) for _ in equation.outvars]
    inner, times = _dissolved(equation, platform)
    if inner is not None:
        return _part(inner, operands[len(operands) - len(inner.invars) :], platform, times)
    if equation.primitive.name.startswith(PRODUCTS):
        for variable, value in zip(equation.invars, operands):
            if not value.written:
                value.write(_size(variable))
    inside = [_read(program, [Value() for _ in program.invars], platform)[0] for program in _inside(equation)]
    sliced = _sliced(equation) if platform == "cuda" else 0
    return max(inside, default=0) + sliced, [Value(frozenset((Buffer(_size(each)),))) for each in equation.outvars]


def _part(program: Any, operands: list[Value], platform: str, times: int) -> tuple[int, list[Value]]:
    """What a program needs and gives that is part of another one, so many times; what it leaves counts there."""
    before = _sources(operands)
    most, results = _read(program, operands, platform)
    left = (_sources(results) | _sources(operands)) - before
    if times == 1:
        return max(0, most - sum(buffer.size for buffer in left)), results
    outer = {buffer: Buffer(times * buffer.size) for buffer in left}
    scaled = lambda sources: frozenset(outer[buffer] if buffer in outer else buffer for buffer in sources)
    return most, [Value(scaled(value.sources), value.written) for value in results]


def _sliced(loop: Any) -> int:
    """The bytes of the largest slice that a loop copies out of what is stacked, as it does for a GPU's products."""
    if loop.primitive.name != "scan":
        return 0
    slices = [
        _size(inner) for outer, inner in zip(loop.invars, _inside(loop)[0].invars) if _size(outer) != _size(inner)
    ]
    return max(slices, default=0)


def _dissolved(equation: Any, platform: str) -> tuple[Any, int]:
    """The program that takes the place of an equation, and how often, where the compiler dissolves it."""
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"):
        inner = params.get("jaxpr") or params.get("call_jaxpr")
        return getattr(inner, "jaxpr", inner), 1
    if equation.primitive in convolution.ROLES:
        return convolution.program(equation, platform), 1
    if name == "scan" and params["unroll"] >= params["length"]:
        return params["jaxpr"].jaxpr, params["length"]
    if name == "cond" and params.get("branches_platforms"):
        named = params["branches_platforms"]
        index = next((i for i, names in enumerate(named) if names is None or platform in names), len(named) - 1)
        return params["branches"][index].jaxpr, 1
    return None, 1


def _size(value: Any) -> int:
    return math.prod(value.aval.shape) * value.aval.dtype.itemsize if hasattr(value.aval, "shape") else 0


def _inside(equation: Any) -> list[Any]:
    """The programs in an equation."""
    inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
    inner += [getattr(branch, "jaxpr", branch) for branch in equation.params.get("branches", ())]
    return [program for program in inner if hasattr(program, "eqns")]


def _by_value(equation: Any) -> bool:
    """Whether each value of the result is computed from few values of the operands."""
    if equation.primitive.name in VIEWS:
        return True
    if equation.primitive.name.startswith(WRITTEN):
        return False
    return all(_by_value(each) for program in _inside(equation) for each in program.eqns)
