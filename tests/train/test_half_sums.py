"""In bfloat16, what many pixels or pictures share has a gradient that is summed in float32."""

import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from diffjax import config as configs
from diffjax.nets.mmdit import MMDiT
from diffjax.train.experiment import Experiment
from diffjax.train.state import create

FOLDER = Path(__file__).parents[2] / "experiments"
TRAINED = [
    path
    for path in sorted(FOLDER.rglob("*.py"))
    if path.name not in ("closed_form.py", "ddpm_cat256.py", "sd35_finetune.py")
]


def half_sums(program):
    """The shapes of what a program sums in bfloat16."""
    found = []
    for equation in program.eqns:
        if equation.primitive.name == "reduce_sum" and equation.invars[0].aval.dtype == jnp.bfloat16:
            shape, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            found += [shape] if math.prod(shape) > math.prod(result) else []
        for inner in jaxprs_in_params(equation.params):
            found += half_sums(inner)
    return found


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_a_step_sums_in_float32(path):
    config = configs.complete(runpy.run_path(str(path))["get_config"]())
    with config.unlocked():
        for table in (config.network, "text"):
            if config.get(table) and "dtype" in config[table]:
                config[table].dtype = "bfloat16"
    experiment, key = Experiment.before_data(config), jax.random.key(0)
    params = jax.eval_shape(experiment.init, key)
    state = jax.eval_shape(lambda params: create(params, experiment.optimizer, key), params)
    program = jax.make_jaxpr(experiment.step())(state, experiment.batch_shapes(config.train.accumulate * 4))
    assert "bf16" in str(program) and not half_sums(program.jaxpr)


def test_fine_tuning_of_mmdit_sums_in_float32():
    module = MMDiT(32, 2, 4, 4, 3, 64, 5, 128, 64, 32, dtype=jnp.bfloat16)
    inputs = jnp.ones((2, 8, 8, 4)), jnp.ones(2), jnp.ones((2, 5, 128)), jnp.ones((2, 64))
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    loss = lambda params: jnp.mean(jnp.square(module.apply({"params": params}, *inputs).astype(jnp.float32)))
    program = jax.make_jaxpr(jax.grad(loss))(params)
    assert "bf16" in str(program) and not half_sums(program.jaxpr)
