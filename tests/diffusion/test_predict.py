"""Predictions: every conversion is one 2x2 solve, and its own inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import predict
from diffjax.diffusion.analytic import Mixture
from diffjax.diffusion.predict import EDM, X0, Eps, Score, V, Velocity, determinant, estimate, target
from diffjax.diffusion.process import (
    Cosine,
    Exploding,
    Flow,
    Linear,
    Shift,
    discrete,
    linear_betas,
    perturb,
    zero_terminal_snr,
)

PREDICTIONS = [X0(), Eps(), Score(), V(), Velocity(), EDM(0.5), EDM(1.3)]
PROCESSES = [Flow(), Cosine(), Exploding(0.02, 80.0), Linear(80.0), discrete(linear_betas()), Shift(Flow(), 3.0)]
T = np.array([0.01, 0.2, 0.5, 0.83, 0.99])


def pair(shape=(5, 4)):
    return np.random.RandomState(0).randn(2, *shape)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: type(p).__name__)
def test_prediction_to_estimate_and_back(float64, prediction, process):
    x0, eps = pair()
    xt, y = perturb(process, x0, eps, T), target(prediction, process, x0, eps, T)
    est = estimate(prediction, process, xt, y, T)
    again = target(prediction, process, est.x0, est.eps, T)
    scale = np.maximum(1, process.sigma(T) / process.alpha(T))[:, None]
    assert np.max(np.abs(est.x0 - x0) / scale) < 1e-12
    assert np.max(np.abs(est.eps - eps) * process.sigma(T)[:, None]) < 1e-12
    assert np.max(np.abs(again - y) / np.maximum(1, np.abs(y))) < 1e-12
    np.testing.assert_allclose(perturb(process, est.x0, est.eps, T), xt, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_around_all_predictions_and_back(float64, process):
    x0, eps = pair()
    xt, est = perturb(process, x0, eps, T), predict.Estimate(x0, eps)
    for prediction in PREDICTIONS + PREDICTIONS[::-1]:
        est = estimate(prediction, process, xt, target(prediction, process, est.x0, est.eps, T), T)
    scale = np.maximum(1, process.sigma(T) / process.alpha(T))[:, None]
    assert np.max(np.abs(est.x0 - x0) / scale) < 1e-12


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: type(p).__name__)
def test_an_error_of_one_is_an_error_of_the_other(float64, prediction):
    x0, eps = pair()
    for process in PROCESSES:
        xt, y = perturb(process, x0, eps, T), target(prediction, process, x0, eps, T)
        moved = estimate(prediction, process, xt, y + 0.1, T).x0
        det = determinant(prediction, process, T)
        np.testing.assert_allclose(0.1, np.abs(det / process.sigma(T))[:, None] * np.abs(moved - x0), rtol=1e-6)


def test_the_pair_keeps_digits_that_division_by_sigma_loses():
    """A flow at t = 1e-4 in float32, as the design states it."""
    t = 1e-4
    x0, eps = pair((4000, 1)).astype(np.float32)
    xt, v = perturb(Flow(), x0, eps, t), target(Velocity(), Flow(), x0, eps, t)
    est = estimate(Velocity(), Flow(), xt, v, t)
    assert np.abs(est.eps - eps).max() < 1e-6
    naive = (xt - Flow().alpha(t) * est.x0) / Flow().sigma(t)
    assert np.abs(naive - eps).max() > 1e-3


def test_where_alpha_is_zero_only_eps_and_score_are_blind():
    process = discrete(zero_terminal_snr(linear_betas()))
    blind = [determinant(prediction, process, 1.0) == 0 for prediction in PREDICTIONS]
    assert blind == [False, True, True, False, False, False, False]
    x0, eps = pair().astype(np.float32)
    for prediction in (X0(), V(), EDM()):
        xt, y = perturb(process, x0, eps, 1.0), target(prediction, process, x0, eps, 1.0)
        est = estimate(prediction, process, xt, y, 1.0)
        np.testing.assert_allclose(est.x0, x0, rtol=1e-5)
        np.testing.assert_allclose(est.eps, eps, rtol=1e-5)


def test_points_of_the_papers(float64):
    x0, eps = pair()
    np.testing.assert_allclose(target(Velocity(), Flow(), x0, eps, T), eps - x0, rtol=1e-12)
    v = target(V(), Cosine(), x0, eps, T)
    np.testing.assert_allclose(target(Velocity(), Cosine(), x0, eps, T), np.pi / 2 * v, rtol=1e-10)
    mixture = Mixture(Cosine(), jnp.zeros(2), jnp.asarray([[0.5], [-1.0]]), jnp.asarray([[0.2], [0.4]]))
    x = jnp.asarray([[0.3], [-0.7]])
    score = jax.grad(lambda x: jnp.sum(mixture.log_prob(x, 0.4)))(x)
    np.testing.assert_allclose(target(Score(), Cosine(), *mixture(x, 0.4)[:2], 0.4), score, rtol=1e-10)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_output_has_unit_variance_and_tells_nothing_that_x_does(float64, sigma_data):
    for process in PROCESSES:
        a, b = EDM(sigma_data).point(process, T)
        np.testing.assert_allclose(a**2 * sigma_data**2 + b**2, 1, rtol=1e-12)
        np.testing.assert_allclose(a * process.alpha(T) * sigma_data**2 + b * process.sigma(T), 0, atol=1e-12)


def test_moved_estimates_stay_on_the_line():
    x0, eps = pair().astype(np.float32)
    for process in (Flow(), Exploding()):
        xt, t = perturb(process, x0, eps, T), jnp.asarray(T, jnp.float32)
        for est in (
            predict.with_x0(predict.Estimate(x0, eps), 0.5 * x0, process, t),
            predict.with_eps(predict.Estimate(x0, eps), 0.5 * eps, process, t),
        ):
            np.testing.assert_allclose(perturb(process, est.x0, est.eps, t), xt, rtol=1e-4, atol=1e-4)
