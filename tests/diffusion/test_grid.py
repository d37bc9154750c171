"""Grids: the published integers, Karras's and log-SNR spacings, and rows that follow one another."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import grid
from diffjax.diffusion.process import Cosine, Exploding, Flow, Linear, Shift, discrete, linear_betas
from diffjax.utils.errors import UserError

DDPM = discrete(linear_betas())


def steps_of(rows, table=1000):
    return [round(t * table) - 1 for t in rows[:, 0]]


@pytest.mark.parametrize(
    "rows, expected",
    [
        (grid.leading(4), [750, 500, 250, 0]),
        (grid.leading(4, offset=1), [751, 501, 251, 1]),
        (grid.leading(3), [666, 333, 0]),
        (grid.linspace(4), [999, 666, 333, 0]),
        (grid.trailing(4), [999, 749, 499, 249]),
        (grid.trailing(3), [999, 666, 332]),
    ],
)
def test_integers_of_the_published_grids(rows, expected):
    assert steps_of(rows) == expected
    assert rows[-1, 1] == 0


@pytest.mark.parametrize("make", [grid.uniform, grid.leading, grid.linspace, grid.trailing])
def test_every_number_of_steps_gives_that_many_falling_rows(make):
    for steps in [*range(1, 120), 250, 333, 500, 999, 1000]:
        rows = make(steps)
        assert rows.shape == (steps, 2)
        assert np.all(rows[:, 0] > rows[:, 1]) and np.all(rows[1:, 0] == rows[:-1, 1])
        assert rows.max() <= 1 and rows[-1, 1] == 0


def test_table_grids_stand_on_entries():
    for rows in (grid.leading(50), grid.linspace(30), grid.trailing(37)):
        k = np.asarray(DDPM.step(jnp.asarray(rows[:, 0], jnp.float32)))
        np.testing.assert_array_equal(k, np.round(k))


def test_karras_is_even_in_the_root_of_sigma(float64):
    rows = grid.karras(Linear(80.0), 18, 0.002, 80.0)
    ramp = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18) ** 7
    np.testing.assert_allclose(80 * rows[:, 0], ramp, rtol=1e-9)
    assert rows.shape == (18, 2) and rows[-1, 1] == 0


@pytest.mark.parametrize(
    "process", [Flow(), Cosine(), Exploding(0.01, 50.0), DDPM, Shift(Flow(), 3.0)], ids=lambda p: type(p).__name__
)
def test_spacings_mean_the_same_on_every_process(float64, process):
    rows = grid.karras(process, 6, 0.1, 10.0, rho=1.0)
    np.testing.assert_allclose(np.diff(np.exp(-process.logsnr(jnp.asarray(rows[:, 0])) / 2)), -9.9 / 5, rtol=1e-6)
    rows = grid.logsnr(process, 6, 0.95, 0.05)
    np.testing.assert_allclose(rows[[0, -1], 0], [0.95, 0.05], rtol=1e-9)
    differences = np.diff(process.logsnr(jnp.asarray(rows[:, 0])))
    np.testing.assert_allclose(differences, differences.mean(), rtol=1e-6)


def test_the_last_part_of_a_grid():
    rows = grid.uniform(10)
    assert len(grid.after(rows, 0.3)) == 3 and grid.after(rows, 0.3)[0, 0] == pytest.approx(0.3)
    assert len(grid.after(rows, 0.001)) == 1 and len(grid.after(rows, 1.0)) == 10


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: grid.trailing(11, 10), "take at most 10"),
        (lambda: grid.linspace(11, 10), "take at most 10"),
        (lambda: grid.leading(11, 10), "take at most 10"),
        (lambda: grid.leading(10, 10, offset=1), "past the end .* take 9 steps"),
        (lambda: grid.leading(500, 1000, offset=3), "past the end .* take 499 steps"),
        (lambda: grid.check(grid.uniform(1002), DDPM), "before the first of its table"),
        (lambda: grid.check(grid.uniform(4)[::-1], Flow()), "fall from"),
        (lambda: grid.check(np.array([[1.0, 0.5], [0.4, 0.0]]), Flow()), "fall from"),
        (lambda: grid.check(np.array([[np.nan, 0.0]]), Flow()), "fall from"),
        (lambda: grid.check(np.linspace(1, 0, 5), Flow()), "pairs"),
    ],
)
def test_what_is_no_grid_is_refused_with_the_remedy(make, said):
    with pytest.raises(UserError, match=said):
        make()
