"""The walk: its last state is the picture that is sampled, and its numbers are those of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffjax.diffusion import sample
from diffjax.diffusion.refine import Clip
from diffjax.explain import walk
from diffjax.explain.subject import ROWS, advance

KEY = jax.random.key(3)
SAMPLERS = ("ddpm", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc", "ipndm")


def begun(guidance, **how):
    """A model whose weights are small, so that rounding does not grow."""
    model = toys.model(text=True, guidance=None, bound=Clip(2.0))
    params = jax.tree.map(lambda leaf: leaf / 3, model.denoiser.params)
    model = model.replace(denoiser=model.denoiser.replace(params=params))
    recipe = model.recipe(guidance=guidance, **how)
    return model, recipe, model.inputs(KEY, np.arange(1), reads=recipe.reads, prompt="a cat")


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_numbers_of_every_step_are_the_move(sampler, guidance):
    _, recipe, inputs = begun(guidance, sampler=sampler, steps=4)
    steps = walk.run(recipe, inputs)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    for step, after in zip(steps, [*steps[1:], None]):
        of = walk.move(recipe, inputs, step)
        whole = of.alpha_s * of.x0 + of.sigma_s * of.kept * of.eps + of.deviation * of.z
        assert np.isclose(whole, of.x_s, rtol=1e-5, atol=1e-5)
        if sampler not in ("ddim", "unipc"):  # the one clips x0 and keeps eps, the other corrects x_t
            assert np.isclose(of.alpha_t * of.x0 + of.sigma_t * of.eps, of.x_t, rtol=1e-4, atol=1e-4)
        assert np.isclose(of.r, of.alpha_t * of.sigma_s / (of.alpha_s * of.sigma_t), rtol=1e-5)
        if after is not None:
            np.testing.assert_array_equal(step.after, after.seen.x)
        assert len(step.seen.est.branches) == (2 if guidance else 0)


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "unipc"])
def test_the_walk_ends_in_the_picture_that_is_sampled(sampler):
    model, recipe, inputs = begun(3.0, sampler=sampler, steps=5)
    last = walk.run(recipe, inputs)[-1].after
    drawn = model.sample(KEY, prompt="a cat", guidance=3.0, sampler=sampler, steps=5)
    np.testing.assert_allclose(last, drawn, rtol=1e-4, atol=1e-5)


def test_fewer_frames_are_of_the_same_walk():
    _, recipe, inputs = begun(None, sampler="dpmpp_2m", steps=ROWS + 5)
    every, some = walk.run(recipe, inputs, ROWS + 5), walk.run(recipe, inputs, 4)
    assert [step.index for step in some] == [0, 12, 24, 36]
    for step in some:
        np.testing.assert_allclose(step.after, every[step.index].after, rtol=1e-5, atol=1e-6)
    plain = advance(recipe, inputs, recipe.begin(inputs), recipe.grid).x
    np.testing.assert_allclose(plain, some[-1].after, rtol=1e-5, atol=1e-6)


def test_a_guide_that_remembers_is_watched_too():
    model, recipe, inputs = begun(3.0, guide={"name": "apg", "momentum": -0.5}, steps=3)
    last = walk.run(recipe, inputs)[-1].after
    drawn = model.sample(KEY, prompt="a cat", guidance=3.0, guide={"name": "apg", "momentum": -0.5}, steps=3)
    np.testing.assert_allclose(last, drawn, rtol=1e-4, atol=1e-5)


def test_a_publishers_variance_is_in_the_numbers():
    _, recipe, inputs = begun(None, sampler="ddpm", steps=3)
    recipe = recipe.replace(sampler=recipe.sampler.replace(deviation=sample.large))
    step = walk.run(recipe, inputs)[1]
    of = walk.move(recipe, inputs, step)
    assert np.isclose(of.deviation, of.sigma_t * np.sqrt(1 - of.r**2), rtol=1e-5) and of.deviation > 0
    shown = walk.formulas(step, of, 1.0)
    assert "z = " in shown[2] and shown[3].endswith(f"= {walk.number(of.x_s)}")
    assert jnp.isfinite(step.after).all()
