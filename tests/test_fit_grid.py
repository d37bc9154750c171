"""Fitted grids: in order, better than the named ones on seeds of their own, kept and found again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffjax import build, cli, fit_grid
from diffjax.diffusion import analytic, grid, process
from diffjax.models import fitted
from diffjax.models.model import Defaults, Model
from diffjax.models.options import Method
from diffjax.utils import files
from diffjax.utils.errors import UserError

STEPS = 6


@pytest.fixture(scope="module")
def mixture():
    """Two narrow clusters and a wide one in the plane."""
    parts = analytic.Mixture(
        process.Cosine(),
        jnp.zeros(3),
        jnp.asarray([[1.0, 1], [-1, 0.5], [0, -1]]),
        jnp.asarray([[0.05, 0.05], [0.02, 0.1], [0.3, 0.3]]),
    )
    return Model(parts, (2,), Defaults(sampler="dpmpp_2m", batch=256), name="mixture")


@pytest.fixture(scope="module")
def found(mixture):
    return fit_grid.fit(mixture, Method(steps=STEPS, sampler="dpmpp_2m"), seeds=256, iterations=60)


@pytest.mark.parametrize(
    "of", [process.Flow(), process.Cosine(), process.discrete(process.linear_betas())], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("name", ["logsnr", "karras"])
def test_parameters_of_a_named_grid_give_it_back(of, name):
    times = fit_grid.between(of)
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
    assert set(errors) == set(fit_grid.NAMED)
    assert np.all(np.diff(found.grid[:, 0]) < 0)


def test_the_error_is_that_of_other_seeds(mixture, found):
    key, numbers = jax.random.key(0), np.arange(256, 512)
    inputs = mixture.inputs(key, numbers)
    ends = []
    for times in (
        grid.pairs(np.append(found.grid[:, 0], 0.0)),
        build.grid("logsnr", mixture.denoiser.process, fit_grid.FINE),
    ):
        recipe = mixture.recipe(steps=len(times), sampler="dpmpp_2m", grid=times)
        ends.append(np.asarray(recipe.advance(inputs, recipe.begin(inputs)).x))
    assert np.sqrt(np.mean((ends[0] - ends[1]) ** 2)) == pytest.approx(found.errors["fitted"], rel=1e-3)


def test_kept_and_found_again(mixture, found, tmp_path):
    for name in (str(tmp_path), "some/model"):
        model = mixture.replace(name=name)
        place = fit_grid.keep(name, "dpmpp_2m", dataclasses.replace(found, to=fitted.fitted_to(model)))
        assert np.allclose(fitted.stored(model, Method(steps=STEPS, sampler="dpmpp_2m")), found.grid, atol=1e-7)
    assert place == files.home() / "grids" / "some__model" / f"dpmpp_2m-{STEPS}.json"
    assert (tmp_path / "grids" / place.name).exists()


def test_a_model_samples_on_its_fitted_grid(found, tmp_path):
    model = toys.model().replace(name=str(tmp_path))
    fit_grid.keep(model.name, "dpmpp_2m", dataclasses.replace(found, to=fitted.fitted_to(model)))
    key = jax.random.key(1)
    named = model.sample(key, num=1, steps=STEPS, sampler="dpmpp_2m", grid="fitted")
    assert np.array_equal(named, model.sample(key, num=1, steps=STEPS, sampler="dpmpp_2m", grid=found.grid))
    with pytest.raises(UserError, match="diffjax fit-grid --steps 7 --sampler dpmpp_2m"):
        model.sample(key, steps=7, sampler="dpmpp_2m", grid="fitted")


@pytest.mark.parametrize(
    ("change", "how", "said"),
    [
        ({"revision": "9"}, {}, 'another state of .*revision is "7" there and "9" here'),
        ({"denoiser": toys.model(text=True, seed=1).denoiser}, {}, "another state of .*checksum is "),
        ({"shape": (16, 16, 3)}, {}, r"another state of .*shape is \[8, 8, 3\] there and \[16, 16, 3\] here"),
        (
            {},
            {"guidance": 3.0},
            "for dpmpp_2m --guidance 3: diffjax fit-grid --steps 6 --sampler dpmpp_2m --guidance 3 makes one",
        ),
        ({}, {"guidance": 0}, "no grid of 6 steps was fitted to .* for dpmpp_2m: "),
        ({}, {"guide": "apg"}, "for dpmpp_2m --guidance 2 --guide apg: "),
        ({}, {"guidance": lambda denoise: denoise}, "guidance by a scale"),
    ],
)
def test_a_grid_is_not_used_for_another_model_or_guidance(found, tmp_path, change, how, said):
    model = toys.model(text=True).replace(name=str(tmp_path), revision="7")
    fit_grid.keep(model.name, "dpmpp_2m", dataclasses.replace(found, to=fitted.fitted_to(model)))
    given = {"steps": STEPS, "sampler": "dpmpp_2m", "grid": "fitted"}
    model.recipe(**given)
    in_bfloat16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.denoiser.params)
    model.replace(denoiser=model.denoiser.replace(params=in_bfloat16)).recipe(**given)
    with pytest.raises(UserError, match=said):
        model.replace(**change).recipe(**given, **how)


def test_a_grid_that_was_kept_without_what_it_belongs_to_is_made_anew(found, tmp_path):
    model = toys.model().replace(name=str(tmp_path))
    files.write_json(fitted.path(model.name, "dpmpp_2m", STEPS), {"times": [1.0, 0.5, 0.0], "errors": {}})
    with pytest.raises(UserError, match="was fitted to another state of .*makes one"):
        model.recipe(steps=STEPS, sampler="dpmpp_2m", grid="fitted")


def test_what_cannot_be_fitted(mixture):
    with pytest.raises(UserError, match="adds noise"):
        fit_grid.fit(mixture, Method(steps=4, sampler="ddpm"))
    with pytest.raises(UserError, match="one step"):
        fit_grid.fit(mixture, Method(steps=1, sampler="unipc"))


def test_the_command_fits_a_guided_network(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("diffjax.loading.load", lambda name, **_: toys.model(text=True).replace(name=name))
    asked = [
        "--steps",
        "3",
        "--sampler",
        "dpmpp_2m",
        "--seeds",
        "2",
        "--iterations",
        "2",
        "--guidance",
        "2",
        "--guide",
        "apg",
        "momentum=-0.5",
    ]
    assert cli.main(["fit-grid", "--run", str(tmp_path), *asked, "--prompt", "one", "--prompt", "two"]) == 0
    said = capsys.readouterr().out
    assert (
        all(name in said for name in ("fitted", *fit_grid.NAMED))
        and "--steps 3 --sampler dpmpp_2m --grid fitted" in said
    )
    assert "--grid fitted --guidance 2 --guide apg momentum=-0.5" in said
    model = toys.model(text=True).replace(name=str(tmp_path))
    method = Method(steps=3, sampler="dpmpp_2m", guidance=2.0, guide={"name": "apg", "momentum": -0.5})
    assert fitted.stored(model, method).shape == (3, 2)
