"""Networks, and what each costs: parameters and floating-point operations."""

import math
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from diffjax.nets.convolution import ROLES, operations


def parameter_count(module: nn.Module, *inputs: Any, **named: Any) -> int:
    """The number of parameters of `module` called on `inputs` (arrays or `jax.ShapeDtypeStruct`s); computes nothing."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


class Cost(NamedTuple):
    """What a program does: floating-point operations of its matrix products and convolutions (of 16-bit operands, and
    of wider ones), the bytes that these and sums move, how many such operations there are, and the further bytes of
    attention scores, which only a device without fused attention moves.
    """

    products16: float = 0.0
    products32: float = 0.0
    convolutions: float = 0.0
    traffic: float = 0.0
    launches: float = 0.0
    scores: float = 0.0
    convolutions16: float = 0.0

    @property
    def flops(self) -> float:
        """All floating-point operations counted."""
        return self.products16 + self.products32 + self.convolutions16 + self.convolutions

    def times(self, n: float) -> "Cost":
        """The cost of n such programs."""
        return Cost(*(n * value for value in self))

    def plus(self, other: "Cost") -> "Cost":
        """The cost of both."""
        return Cost(*(a + b for a, b in zip(self, other)))


def flops(module: nn.Module, *inputs: Any, **named: Any) -> float:
    """Floating-point operations of one forward call: 2 for every multiply-add of a matrix product or a convolution."""
    return cost(module, *inputs, **named).flops


def cost(module: nn.Module, *inputs: Any, **named: Any) -> Cost:
    """The cost of one forward call; a training step is about three of them.

    Read off the traced program, so it holds for every network, scanned or not. Elementwise work is not counted.
    """
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)
    call = lambda variables, inputs, named: module.apply(variables, *inputs, **named)
    return program_cost(jax.make_jaxpr(call)(variables, inputs, named).jaxpr)


def program_cost(jaxpr: Any) -> Cost:
    """The cost of a traced program; of a conditional, its dearest branch, and of equal ones that with convolutions."""
    total = Cost()
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [program_cost(inner) for inner in _inner(equation.params)]
        moved = Cost(traffic=float(sum(_bytes(x.aval) for x in (*equation.invars, *equation.outvars))), launches=1.0)
        if name == "dot_general":
            total = total.plus(_product(_dot(equation), equation.invars[0].aval).plus(moved))
        elif name == "conv_general_dilated" or equation.primitive in ROLES:
            narrow = equation.invars[0].aval.dtype.itemsize < 4
            kind = "convolutions16" if narrow else "convolutions"
            count = operations if equation.primitive in ROLES else _convolution
            total = total.plus(moved._replace(**{kind: count(equation)}))
        elif name.startswith("dot_product_attention"):
            (b, t, n, h), s = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
            total = total.plus(_product(4.0 * b * n * t * s * h, equation.invars[0].aval).plus(moved))
        elif equation.params.get("name") == "scaled_dot_product":
            beside = max(0.0, inner[0].traffic - moved.traffic)
            total = total.plus(inner[0]._replace(traffic=moved.traffic, launches=1.0, scores=beside))
        elif name.startswith("reduce_"):
            total = total.plus(moved)
        elif name == "cond":
            total = total.plus(
                max(inner, key=lambda cost: (cost.flops, cost.scores, cost.convolutions16 + cost.convolutions))
            )
        else:
            for part in inner:
                total = total.plus(part.times(equation.params.get("length", 1)))
    return total


def _product(operations: float, operand: Any) -> Cost:
    return Cost(products16=operations) if operand.dtype.itemsize < 4 else Cost(products32=operations)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def _inner(params: dict) -> list:
    """The programs inside an equation."""
    values = [x for value in params.values() for x in (value if isinstance(value, (tuple, list)) else [value])]
    programs = [getattr(value, "jaxpr", value) for value in values]
    return [program for program in programs if hasattr(program, "eqns")]


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
    taps = math.prod(kernel) / kernel[spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps
