"""Fitted grids: in order, better than the named ones on seeds of their own, kept and found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffjax import analytic, build, cli, files, fit, grid, process
from diffjax.errors import UserError
from diffjax.model import Defaults, Model

STEPS = 6


@pytest.fixture(scope="module")
def mixture():
    """Two narrow clusters and a wide one in the plane."""
    parts = analytic.Mixture(
        process.Cosine(), jnp.zeros(3), jnp.asarray([[1.0, 1], [-1, 0.5], [0, -1]]), jnp.asarray([[0.05, 0.05], [0.02, 0.1], [0.3, 0.3]])
    )
    return Model(parts, (2,), Defaults(sampler="dpmpp_2m", batch=256), name="mixture")


@pytest.fixture(scope="module")
def found(mixture):
    return fit.fit(mixture, STEPS, "dpmpp_2m", seeds=256, iterations=60)


@pytest.mark.parametrize("of", [process.Flow(), process.Cosine(), process.discrete(process.linear_betas())], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["logsnr", "karras"])
def test_parameters_of_a_named_grid_give_it_back(of, name):
    times = fit.between(of)
    named = build.grid(name, of, 8)
    again = np.asarray(times.grid(times.theta(named)))
    assert again.shape == (8, 2) and again[0, 0] == 1 and again[-1, 1] == 0
    assert np.all(np.diff(again[:, 0]) < 0) and np.array_equal(again[1:, 0], again[:-1, 1])
    logsnr = lambda rows: np.asarray(of.logsnr(jnp.asarray(rows[:-1, 1])))
    span = float(times.high - times.low)
    assert np.abs(logsnr(again) - logsnr(named)).max() < 0.01 * span


def test_a_fitted_grid_beats_the_named_ones(found):
    errors = dict(found.errors)
    assert errors.pop("fitted") < 0.8 * min(errors.values())
    assert set(errors) == set(fit.NAMED)
    assert np.all(np.diff(found.grid[:, 0]) < 0)


def test_the_error_is_that_of_other_seeds(mixture, found):
    key, numbers = jax.random.key(0), np.arange(256, 512)
    inputs = mixture.inputs(key, numbers)
    ends = []
    for times in (grid.pairs(np.append(found.grid[:, 0], 0.0)), build.grid("logsnr", mixture.denoiser.process, fit.FINE)):
        recipe = mixture.recipe(steps=len(times), sampler="dpmpp_2m", grid=times)
        ends.append(np.asarray(recipe.advance(inputs, recipe.begin(inputs)).x))
    assert np.sqrt(np.mean((ends[0] - ends[1]) ** 2)) == pytest.approx(found.errors["fitted"], rel=1e-3)


def test_kept_and_found_again(found, tmp_path):
    for name in (str(tmp_path), "some/model"):
        place = fit.keep(name, "dpmpp_2m", found)
        assert np.allclose(fit.stored(name, "dpmpp_2m", STEPS), found.grid, atol=1e-7)
    assert place == files.home() / "grids" / "some__model" / f"dpmpp_2m-{STEPS}.json"
    assert (tmp_path / "grids" / place.name).exists()


def test_a_model_samples_on_its_fitted_grid(found, tmp_path):
    model = toys.model().replace(name=str(tmp_path))
    fit.keep(model.name, "dpmpp_2m", found)
    key = jax.random.key(1)
    named = model.sample(key, num=1, steps=STEPS, sampler="dpmpp_2m", grid="fitted")
    assert np.array_equal(named, model.sample(key, num=1, steps=STEPS, sampler="dpmpp_2m", grid=found.grid))
    with pytest.raises(UserError, match="diffjax fit-grid --steps 7 --sampler dpmpp_2m"):
        model.sample(key, steps=7, sampler="dpmpp_2m", grid="fitted")


def test_what_cannot_be_fitted(mixture):
    with pytest.raises(UserError, match="adds noise"):
        fit.fit(mixture, 4, "ddpm")
    with pytest.raises(UserError, match="one step"):
        fit.fit(mixture, 1, "unipc")


def test_the_command_fits_a_guided_network(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("diffjax.loading.load", lambda name, **_: toys.model(text=True).replace(name=name))
    asked = ["--steps", "3", "--sampler", "dpmpp_2m", "--seeds", "2", "--iterations", "2", "--guidance", "2"]
    assert cli.main(["fit-grid", "--run", str(tmp_path), *asked, "--prompt", "one", "--prompt", "two"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("fitted", *fit.NAMED)) and "--steps 3 --sampler dpmpp_2m --grid fitted" in said
    assert fit.stored(str(tmp_path), "dpmpp_2m", 3).shape == (3, 2)
