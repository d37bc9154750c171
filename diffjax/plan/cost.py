"""The figures of a program, read off its trace: parameters, bytes, memory and operations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree

from diffjax.nets import Cost, program_cost
from diffjax.plan.memory import live_bytes


@dataclass(frozen=True)
class Part:
    """A program `call(held, *given)` of the job, its arguments as shapes: what stays in memory, and what each call
    is given.

    Where it `replaces`, as a training step does its state, the result takes the place of what was held. `over(devices)`
    is its program on several: a function under `jit`, and shapes of what is held and given that say where they lie;
    whether it `splits` what is held is said too, and how many bytes of that are `hosted`, in the memory of hosts.
    """

    name: str
    call: Callable[..., PyTree]
    held: PyTree
    given: tuple[Any, ...]
    parameters: int
    calls: float
    replaces: bool = False
    splits: bool = False
    over: Callable[[Sequence[Any]], tuple[Callable[..., Any], PyTree, tuple[Any, ...]]] | None = None
    hosted: int = 0


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


def estimate(part: Part, platform: str = "cpu") -> Estimate:
    """The figures of a part on one device of a platform, from shapes alone."""
    program = jax.make_jaxpr(part.call)(part.held, *part.given).jaxpr
    held, temporary = tree_bytes(part.held) - part.hosted, live_bytes(program, platform)
    return Estimate(part.name, part.parameters, held, temporary, part.calls, program_cost(program))


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_size(tree: PyTree) -> int:
    """The number of values in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def compiled_bytes(part: Part) -> int:
    """The bytes that the compiler allocates for a call beside its arguments: exact, at the price of compiling."""
    program = jax.jit(part.call, donate_argnums=0 if part.replaces else ())
    memory: Any = program.lower(part.held, *part.given).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
