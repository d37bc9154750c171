"""Networks, and what each costs: parameters and floating-point operations."""

import math
from typing import Any

import jax
from flax import linen as nn


def parameter_count(module: nn.Module, *inputs: Any, **named: Any) -> int:
    """The number of parameters of `module` called on `inputs` (arrays or `jax.ShapeDtypeStruct`s); computes nothing."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def flops(module: nn.Module, *inputs: Any, **named: Any) -> float:
    """Floating-point operations of one forward call: 2 for every multiply-add of a matrix product or a convolution.

    Read off the traced program, so it holds for every network, scanned or not; a training step costs about three times
    it. Elementwise work is not counted.
    """
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)
    call = lambda variables, inputs, named: module.apply(variables, *inputs, **named)
    return _count(jax.make_jaxpr(call)(variables, inputs, named).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [_count(inner) for inner in _inner(equation.params)]
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name.startswith("dot_product_attention"):
            (b, t, n, h), s = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
            total += 4.0 * b * n * t * s * h
        elif name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


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
