"""The figures of a program, read off its trace: parameters, bytes, memory and operations."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree

from diffjax.nets import Cost, program_cost


@dataclass(frozen=True)
class Part:
    """A program `call(held, *given)` of the job, its arguments as shapes: what stays in memory, and what each call
    is given.

    Where it `replaces`, as a training step does its state, the result takes the place of what was held. `over(devices)`
    is its program on several: a function under `jit`, and shapes of what is held and given that say where they lie;
    whether it `splits` what is held is said too.
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


def estimate(part: Part) -> Estimate:
    """The figures of a part on one device, from shapes alone."""
    program = jax.make_jaxpr(part.call)(part.held, *part.given).jaxpr
    held, temporary = tree_bytes(part.held), live_bytes(program)
    return Estimate(part.name, part.parameters, held, temporary, part.calls, program_cost(program))


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_size(tree: PyTree) -> int:
    """The number of values in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


VIEWS = {"broadcast_in_dim", "convert_element_type", "expand_dims", "iota", "reshape", "squeeze"}
"""What is never written to memory of its own."""

WRITTEN = ("dot_general", "conv", "scan", "while", "cond", "shard_map", "pallas", "gather", "sort", "custom", "dynamic")
WRITTEN += ("reduce", "arg", "cum", "scatter", "random", "threefry")
"""How the names of operations begin whose results always are."""


def live_bytes(program: Any) -> int:
    """The most bytes of intermediate values alive at once; inner programs count when they run.

    As the compiler fuses it, what is computed value by value has no memory where only one operation reads it: what it
    is made of is kept instead.
    """
    read = lambda values: [value for value in values if not hasattr(value, "val")]
    uses = Counter(value for equation in program.eqns for value in read(equation.invars))
    uses.update(read(program.outvars))
    made_of: dict[Any, frozenset] = dict.fromkeys((*program.invars, *program.constvars), frozenset())
    last, written = {}, []
    for position, equation in enumerate(program.eqns):
        sources = frozenset().union(*(made_of[value] for value in read(equation.invars)))
        written.append([value for value in equation.outvars if not _is_fused(equation, uses[value])])
        made_of |= dict.fromkeys(equation.outvars, sources) | {value: frozenset((value,)) for value in written[-1]}
        last |= dict.fromkeys((*sources, *written[-1]), position)
    for value in read(program.outvars):
        last |= dict.fromkeys(made_of[value], len(program.eqns))
    ending = Counter()
    for value, position in last.items():
        ending[position] += _size(value)
    live, most = 0, 0
    for position, equation in enumerate(program.eqns):
        live += sum(map(_size, written[position]))
        most = max(most, live + max((live_bytes(inner) for inner in _inside(equation)), default=0))
        live -= ending[position]
    return most


def _size(value: Any) -> int:
    return math.prod(value.aval.shape) * value.aval.dtype.itemsize if hasattr(value.aval, "shape") else 0


def _inside(equation: Any) -> list[Any]:
    """The programs in an equation; of one that is computed value by value, none."""
    inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
    return [] if _by_value(equation) else [program for program in inner if hasattr(program, "eqns")]


def _is_fused(equation: Any, uses: int) -> bool:
    return equation.primitive.name in VIEWS or (uses < 2 and _by_value(equation))


def _by_value(equation: Any) -> bool:
    """Whether each value of the result is computed from few values of the operands."""
    if equation.primitive.name.startswith(WRITTEN) and equation.primitive.name not in VIEWS:
        return False
    inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
    return all(_by_value(each) for program in inner if hasattr(program, "eqns") for each in program.eqns)


def compiled_bytes(part: Part) -> int:
    """The bytes that the compiler allocates for a call beside its arguments: exact, at the price of compiling."""
    program = jax.jit(part.call, donate_argnums=0 if part.replaces else ())
    memory: Any = program.lower(part.held, *part.given).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
