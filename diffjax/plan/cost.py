"""The figures of a program, read off its trace: parameters, bytes, memory and operations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree

from diffjax.nets import Cost, program_cost


@dataclass(frozen=True)
class Part:
    """A program `call(held, *given)` of the job, its arguments as shapes: what stays in memory, and what each call
    is given.

    Where it `replaces`, as a training step does its state, the result takes the place of what was held.
    """

    name: str
    call: Callable[..., PyTree]
    held: PyTree
    given: tuple[Any, ...]
    parameters: int
    calls: float
    replaces: bool = False


@dataclass(frozen=True)
class Estimate:
    """One part's figures: parameters, the bytes it holds, the bytes of one call beside them, its calls and
    their cost.
    """

    name: str
    parameters: int
    held: int
    temporary: int
    calls: float
    cost: Cost


def estimate(part: Part, exact: bool = False) -> Estimate:
    """The figures of a part, from shapes alone, or, `exact`, with the memory that the compiler allocates."""
    program = jax.make_jaxpr(part.call)(part.held, *part.given).jaxpr
    cost = program_cost(program)
    temporary = compiled_bytes(part) if exact else live_bytes(program)
    return Estimate(part.name, part.parameters, tree_bytes(part.held), temporary, part.calls, cost)


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_size(tree: PyTree) -> int:
    """The number of values in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def live_bytes(program: Any) -> int:
    """The most bytes of intermediate values alive at once, if nothing were fused; inner programs count when
    they run.
    """
    size = lambda value: math.prod(value.aval.shape) * value.aval.dtype.itemsize if hasattr(value.aval, "shape") else 0
    last = {}
    for position, equation in enumerate(program.eqns):
        for value in equation.invars:
            if not hasattr(value, "val"):
                last[value] = position
    own = set(program.invars) | set(program.constvars)
    live, most = 0, 0
    for position, equation in enumerate(program.eqns):
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inside = max((live_bytes(value) for value in inner if hasattr(value, "eqns")), default=0)
        live += sum(size(value) for value in equation.outvars)
        most = max(most, live + inside)
        used = {value for value in equation.invars if not hasattr(value, "val")}
        dead = {value for value in used if last[value] == position} - own
        live -= sum(size(value) for value in dead) + sum(size(v) for v in equation.outvars if v not in last)
    return most


def compiled_bytes(part: Part) -> int:
    """The bytes that the compiler allocates for a call beside its arguments: exact, at the price of compiling."""
    program = jax.jit(part.call, donate_argnums=0 if part.replaces else ())
    memory: Any = program.lower(part.held, *part.given).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
