"""Processes: exact ends, rates, inverses, and tables that are exact at their entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import process
from diffjax.diffusion.process import Cosine, Discrete, Exploding, Flow, Linear, Shift, discrete, zero_terminal_snr

TABLES = {
    "linear": process.linear_betas(),
    "scaled": process.scaled_linear_betas(),
    "cosine": process.squared_cosine_betas(),
    "zero-terminal": zero_terminal_snr(process.scaled_linear_betas()),
}
PROCESSES = {
    "flow": Flow(),
    "cosine": Cosine(),
    "exploding": Exploding(0.02, 80.0),
    "linear": Linear(80.0),
    "shifted flow": Shift(Flow(), 3.0),
    "shifted cosine": Shift(Cosine(), 0.5),
    **{f"{name} table": discrete(betas) for name, betas in TABLES.items()},
}


@pytest.mark.parametrize("name", [name for name in PROCESSES if name not in ("exploding", "linear")])
def test_the_ends_are_exact(name):
    proc = PROCESSES[name]
    assert proc.alpha(0.0) == 1 and proc.sigma(0.0) == 0
    if name not in ("linear table", "scaled table", "cosine table"):
        assert proc.alpha(1.0) == 0 and proc.sigma(1.0) == 1
        assert proc.logsnr(1.0) == -np.inf
    assert proc.logsnr(0.0) == np.inf


def test_ends_of_the_variance_exploding_ones():
    assert PROCESSES["exploding"].alpha(1.0) == 1
    np.testing.assert_allclose(PROCESSES["exploding"].sigma(jnp.asarray([0.0, 1.0])), [0.02, 80.0], rtol=1e-6)
    assert PROCESSES["linear"].sigma(0.0) == 0 and PROCESSES["linear"].sigma(1.0) == 80


@pytest.mark.parametrize("name", PROCESSES)
def test_rates_are_the_derivatives(float64, name):
    proc, t, h = PROCESSES[name], jnp.asarray([0.0513, 0.3337, 0.72155, 0.98765]), 1e-6
    for f, rate in zip((proc.alpha, proc.sigma), proc.rates(t)):
        np.testing.assert_allclose(rate, (f(t + h) - f(t - h)) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PROCESSES)
def test_inverse_of_logsnr(float64, name):
    proc, t = PROCESSES[name], jnp.asarray([0.0004, 0.01, 0.2503, 0.5, 0.777, 0.9905, 0.99951])
    np.testing.assert_allclose(proc.inverse(proc.logsnr(t)), t, rtol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_time_has_any_shape_and_noise_grows(name):
    proc, t = PROCESSES[name], np.linspace(0.001, 0.999, 400, dtype=np.float32)
    np.testing.assert_array_equal(jax.vmap(proc.sigma)(t), proc.sigma(t.reshape(400, 1, 1))[:, 0, 0])
    assert np.all(np.diff(proc.logsnr(t)) < 0)
    assert proc.alpha(0.3).shape == ()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_exact_at_its_entries(name):
    proc = discrete(TABLES[name])
    t = (np.arange(1000, dtype=np.float32) + 1) / 1000
    assert proc.alpha2.dtype == np.float32
    np.testing.assert_array_equal(proc.step(t), np.arange(1000))
    np.testing.assert_array_equal(proc.alpha(t), np.sqrt(proc.alpha2))
    np.testing.assert_array_equal(proc.sigma(t), np.sqrt(1 - proc.alpha2))


def test_between_entries_the_logsnr_is_interpolated(float64):
    proc = discrete(TABLES["linear"])
    low, high = proc.logsnr(jnp.asarray([0.4, 0.401]))
    np.testing.assert_allclose(proc.logsnr(0.40025), 0.75 * low + 0.25 * high, rtol=1e-12)
    assert proc.step(0.40025) == pytest.approx(399.25)
    np.testing.assert_allclose(proc.alpha(0.40025) ** 2 + proc.sigma(0.40025) ** 2, 1, rtol=1e-14)
    assert np.all(np.isfinite(proc.rates(jnp.linspace(0, 1, 2001))))


def test_tables_are_those_of_their_papers():
    betas = TABLES["linear"].astype(float)
    np.testing.assert_allclose([betas[0], betas[1] - betas[0], betas[-1]], [1e-4, (0.02 - 1e-4) / 999, 0.02], rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(TABLES["scaled"].astype(float))[[0, -1]], [0.00085**0.5, 0.012**0.5], rtol=1e-6)
    f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(
        discrete(TABLES["cosine"]).alpha2[[0, 499, 900]], [f(k / 1000) / f(0) for k in (1, 500, 901)], rtol=1e-4
    )
    assert TABLES["cosine"][-1] == np.float32(0.999)
    np.testing.assert_allclose(discrete(betas).alpha2, np.exp(np.cumsum(np.log1p(-betas))), rtol=1e-6)


def test_zero_terminal_table_keeps_its_first_entry():
    plain, zero = discrete(TABLES["scaled"]), discrete(TABLES["zero-terminal"])
    assert zero.alpha2[-1] == 0
    np.testing.assert_allclose(zero.alpha2[0], plain.alpha2[0], rtol=1e-6)
    root = np.sqrt(plain.alpha2.astype(float))
    shifted = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(np.sqrt(zero.alpha2[:-1]), shifted[:-1], rtol=1e-4)


def test_shift_lowers_the_logsnr_of_a_flow_by_a_constant(float64):
    t = jnp.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(Shift(Flow(), 3.0).logsnr(t), Flow().logsnr(t) - 2 * np.log(3), rtol=1e-12)
    np.testing.assert_allclose(Shift(Shift(Flow(), 3.0), 2.0).sigma(t), Shift(Flow(), 6.0).sigma(t), rtol=1e-12)
    np.testing.assert_array_equal(Shift(Flow(), 1.0).sigma(t), Flow().sigma(t))


def test_perturb_takes_one_time_or_one_an_image():
    x0, eps = np.random.RandomState(0).randn(2, 2, 4, 4, 3).astype(np.float32)
    t = jnp.asarray([0.2, 0.9])
    each = process.perturb(Flow(), x0, eps, t)
    np.testing.assert_allclose(each[1], 0.1 * x0[1] + 0.9 * eps[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(each[0], process.perturb(Flow(), x0, eps, 0.2)[0])


def test_a_table_can_be_differentiated_at_its_entries():
    rates = discrete(TABLES["linear"]).rates(jnp.asarray([0.5, 0.50025]))
    for rate in rates:
        np.testing.assert_allclose(rate[0], rate[1], rtol=5e-3)


def test_what_a_process_lacks_is_named():
    with pytest.raises(TypeError, match="Process defines no sigma"):
        process.Process().sigma(0.5)
    assert Discrete(np.array([0.5, 0.1], np.float32)).steps == 2
