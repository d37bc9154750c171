"""The distributions that the rest is held to, held to integrals and derivatives themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion.analytic import Mixture, flow_map, gaussian
from diffjax.diffusion.predict import Velocity, target
from diffjax.diffusion.process import Cosine, Exploding, Flow

PROCESSES = [Flow(), Cosine(), Exploding(0.1, 10.0)]
POINTS = np.linspace(-8, 8, 20001)


def of(process):
    return Mixture(process, jnp.asarray([0.5, 0.0]), jnp.asarray([[1.0], [-0.8]]), jnp.asarray([[0.2], [0.05]]))


def density(x, mixture):
    weights = np.exp([0.5, 0.0]) / np.sum(np.exp([0.5, 0.0]))
    deviation = np.sqrt(np.asarray(mixture.variances[:, 0]))
    bells = (
        np.exp(-(((x[:, None] - np.asarray(mixture.means[:, 0])) / deviation) ** 2) / 2)
        / deviation
        / np.sqrt(2 * np.pi)
    )
    return bells @ weights


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_denoiser_is_the_posterior_mean(float64, process):
    """E[x0 | x_t] and p_t by quadrature over x0."""
    mixture, t, x = of(process), 0.4, 0.3
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    joint = density(POINTS, mixture) * np.exp(-(((x - alpha * POINTS) / sigma) ** 2) / 2) / sigma / np.sqrt(2 * np.pi)
    marginal = np.trapezoid(joint, POINTS)
    mean = np.trapezoid(joint * POINTS, POINTS) / marginal
    est = mixture(jnp.asarray([[x]]), t)
    np.testing.assert_allclose([est.x0[0, 0], est.eps[0, 0]], [mean, (x - alpha * mean) / sigma], rtol=1e-8)
    np.testing.assert_allclose(mixture.log_prob(jnp.asarray([[x]]), t), np.log(marginal), rtol=1e-8)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_eps_is_the_score(float64, process):
    mixture, x = of(process), jnp.asarray([[0.3], [-1.4]])
    score = jax.grad(lambda x: jnp.sum(mixture.log_prob(x, 0.7)))(x)
    np.testing.assert_allclose(mixture(x, 0.7).eps, -process.sigma(0.7) * score, rtol=1e-9)


def test_classes_replace_the_weights(float64):
    mixture, x = of(Flow()), jnp.asarray([[0.3], [0.3]])
    est = mixture(x, 0.5, {"logits": jnp.asarray([[40.0, 0.0], [0.0, 40.0]])})
    for row, (mean, variance) in enumerate([(1.0, 0.2), (-0.8, 0.05)]):
        alone = gaussian(Flow(), jnp.asarray([mean]), jnp.asarray([variance]))(x[:1], 0.5)
        np.testing.assert_allclose(est.x0[row], alone.x0[0], rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_flow_map_moves_with_the_velocity(float64, process):
    gauss = gaussian(process, jnp.asarray([0.3, -0.5]), jnp.asarray([1.0, 0.04]))
    x = jnp.asarray([[0.4, -1.2]])
    at, speed = jax.jvp(lambda s: flow_map(gauss, x, 0.8, s), (0.35,), (1.0,))
    est = gauss(at, 0.35)
    np.testing.assert_allclose(speed, target(Velocity(), process, est.x0, est.eps, 0.35), rtol=1e-9)
    np.testing.assert_allclose(flow_map(gauss, at, 0.35, 0.8), x, rtol=1e-12)


def test_at_time_zero_the_image_is_known():
    est = of(Flow())(jnp.asarray([[0.3]]), 0.0)
    np.testing.assert_allclose(est.x0, [[0.3]], rtol=1e-6)
    assert est.eps == 0
