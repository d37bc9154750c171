"""Inversion and likelihood against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import grid, ode, refine, sample
from diffjax.diffusion.analytic import Mixture, flow_map, gaussian
from diffjax.diffusion.process import Cosine, Exploding, Flow, discrete, linear_betas
from diffjax.utils.errors import UserError

X = np.array([[0.3, -0.2], [1.0, 0.5], [-0.4, 0.1]])
VARIANCE = np.array([1.0, 0.09])
PROCESSES = {
    "flow": (Flow(), 1 - 1e-4, 1e-3),
    "cosine": (Cosine(), 1 - 1e-4, 1e-3),
    "exploding": (Exploding(1e-3, 1e4), 1.0, 0.0),
    "discrete": (discrete(linear_betas()), 1.0, 0.001),
}


def even(process, start, stop, steps):
    """Steps even in log-SNR."""
    rows = grid.logsnr(process, steps + 1, start, stop)[:-1]
    rows[0, 0], rows[-1, 1] = start, stop
    return rows


def mixture(process):
    """Two components whose mean is 0."""
    means, variances = jnp.asarray([[0.6, 0.3], [-0.6, -0.3]]), jnp.asarray([[0.3, 0.1], [0.3, 0.1]])
    return Mixture(process, jnp.zeros(2), means, variances), jnp.asarray([0.66, 0.19])


def at_last_time(of, t, x=X):
    """log density of x0 with the noise of the last time."""
    alpha = of.process.alpha(t)
    return of.log_prob(alpha * jnp.asarray(x), t) + X.shape[1] * jnp.log(alpha)


@pytest.mark.parametrize("name", PROCESSES)
def test_likelihood_of_a_gaussian_converges_at_order_four(float64, name):
    process, start, stop = PROCESSES[name]
    gauss = gaussian(process, jnp.zeros(2), jnp.asarray(VARIANCE))
    exact = at_last_time(gauss, stop)
    coarse, fine = (
        np.abs(ode.log_likelihood(gauss, jnp.asarray(X), even(process, start, stop, n), VARIANCE) - exact).max()
        for n in (100, 200)
    )
    assert fine < 1e-4 and np.log2(coarse / fine) > 3.75
    np.testing.assert_allclose(exact, gauss.log_prob(jnp.asarray(X), 0.0) if name != "exploding" else exact, atol=2e-3)


def test_likelihood_of_a_mixture(float64):
    """The prior's error is of third order in 1 / rho_max: 1e-4 here is the steps'."""
    process, start, stop = PROCESSES["exploding"]
    of, variance = mixture(process)
    ours = ode.log_likelihood(of, jnp.asarray(X), even(process, start, stop, 200), variance)
    np.testing.assert_allclose(ours, at_last_time(of, stop), atol=1e-4)


def test_truncation_at_the_last_time_is_what_the_docstring_says(float64):
    """rho^2 / 2 (laplacian p) / p."""
    of, _ = mixture(Flow())
    x = jnp.asarray(X)
    p = lambda x: jnp.exp(of.log_prob(x[None], 0.0))[0]
    laplacian = jax.jit(jax.vmap(lambda x: jnp.trace(jax.hessian(p)(x)) / p(x)))(x)
    for t in (0.01, 0.02):
        rho = t / (1 - t)
        np.testing.assert_allclose(at_last_time(of, t) - of.log_prob(x, 0.0), rho**2 / 2 * laplacian, rtol=0.05)


def test_conditions_reach_the_network(float64):
    process, start, stop = PROCESSES["flow"]
    of, variance = mixture(process)
    cond = {"logits": jnp.zeros((3, 2))}
    rows = even(process, start, stop, 20)
    plain = ode.log_likelihood(of, jnp.asarray(X), rows, variance)
    np.testing.assert_allclose(ode.log_likelihood(of, jnp.asarray(X), rows, variance, cond=cond), plain, rtol=1e-9)


class TestDivergence:
    matrix = np.random.RandomState(0).randn(6, 6)
    z = np.random.RandomState(1).randn(4, 3, 2, 1)

    def field(self, z):
        return jnp.sin(z.reshape(4, 6) @ self.matrix).reshape(z.shape)

    def exact(self):
        return np.einsum("bi,ii->b", np.cos(self.z.reshape(4, 6) @ self.matrix), self.matrix)

    def test_trace_is_exact(self, float64):
        value, div = ode.Trace()(self.field, jnp.asarray(self.z))
        np.testing.assert_allclose(div, self.exact(), rtol=1e-10)
        np.testing.assert_allclose(value, self.field(self.z), rtol=1e-12)

    def test_probes_are_unbiased_with_the_variance_stated(self, float64):
        probes = 4000
        keys = jax.random.split(jax.random.key(0), 4)
        div = ode.Hutchinson(keys, probes)(self.field, jnp.asarray(self.z))[1]
        jacobian = np.cos(self.z.reshape(4, 6) @ self.matrix)[:, None, :] * self.matrix[None]
        both = jacobian + np.swapaxes(jacobian, 1, 2)
        deviation = np.sqrt(np.sum(np.triu(both, 1) ** 2, axis=(1, 2)) / probes)
        assert np.all(np.abs(div - self.exact()) < 4 * deviation)
        single = lambda key: ode.Hutchinson(jax.random.split(key, 4))(self.field, jnp.asarray(self.z))[1]
        singles = jax.jit(jax.vmap(single))(jax.random.split(jax.random.key(1), 2000))
        np.testing.assert_allclose(np.std(singles, axis=0), deviation * np.sqrt(probes), rtol=0.1)

    def test_an_images_probes_are_its_own(self):
        keys = jax.random.split(jax.random.key(0), 4)
        whole = ode.Hutchinson(keys, 3)(self.field, jnp.asarray(self.z, jnp.float32))[1]
        turned = ode.Hutchinson(keys[::-1], 3)(self.field, jnp.asarray(self.z[::-1], jnp.float32))[1]
        np.testing.assert_allclose(whole, turned[::-1], rtol=1e-5)


def test_likelihood_by_probes_is_exact_for_independent_coordinates(float64):
    process, start, stop = PROCESSES["flow"]
    gauss = gaussian(process, jnp.zeros(2), jnp.asarray(VARIANCE))
    rows, keys = even(process, start, stop, 50), jax.random.split(jax.random.key(0), 3)
    exact = ode.log_likelihood(gauss, jnp.asarray(X), rows, VARIANCE)
    probed = ode.log_likelihood(gauss, jnp.asarray(X), rows, VARIANCE, ode.Hutchinson(keys))
    np.testing.assert_allclose(probed, exact, rtol=1e-9)


@pytest.mark.parametrize("name", ["flow", "exploding", "discrete"])
def test_inversion_is_the_exact_flow_backwards(float64, name):
    process, start, stop = PROCESSES[name]
    start = min(start, 0.999)
    gauss = gaussian(process, jnp.asarray([0.3, -0.1]), jnp.asarray(VARIANCE))
    rows = even(process, start, stop, 600)
    noise = ode.invert(gauss, jnp.asarray(X), rows, refine.extrapolate(2))
    exact = flow_map(gauss, process.alpha(stop) * jnp.asarray(X), stop, start)
    np.testing.assert_allclose(noise, exact, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("chain, order", [(refine.chain(), 1), (refine.heun("flow"), 2), (refine.unipc(2), 3)])
def test_round_trip_returns_the_image_at_the_solvers_order(float64, chain, order):
    process, errors = Flow(), []
    of, _ = mixture(process)
    for steps in (100, 200):
        rows = even(process, 0.999, 0.001, steps)
        noise = ode.invert(of, jnp.asarray(X), rows, chain)
        keys = jax.random.split(jax.random.key(0), 3)
        back = sample.solve(of, noise, rows, sample.Sampler(chain), keys) / process.alpha(0.001)
        errors.append(np.abs(back - X).max())
    assert np.log2(errors[0] / errors[1]) > order - 0.3
    assert errors[1] < 0.5 * 0.1**order


def test_inverted_noise_looks_like_noise():
    """The flow takes the data's distribution to the prior's."""
    process = Cosine()
    of, _ = mixture(process)
    rng = np.random.RandomState(0)
    x0 = np.where(rng.rand(2000, 1) < 0.5, 1, -1) * np.array([0.6, 0.3]) + rng.randn(2000, 2) * np.sqrt([0.3, 0.1])
    noise = ode.invert(of, jnp.asarray(x0, jnp.float32), even(process, 0.999, 0.001, 60), refine.extrapolate(2))
    np.testing.assert_allclose(np.cov(noise.T), np.eye(2), atol=0.1)
    np.testing.assert_allclose(np.mean(noise, axis=0), 0, atol=0.1)


def test_grids_that_touch_an_end_are_refused():
    of, _ = mixture(Flow())
    for rows in (grid.uniform(10), grid.uniform(10, 1.0, 0.01), grid.uniform(10, 0.99, 0.0)):
        with pytest.raises(UserError, match="neither alpha nor sigma is 0"):
            ode.invert(of, jnp.asarray(X), rows)
    ode.backwards(discrete(linear_betas()), grid.uniform(10, 1.0, 0.01))


def test_bits_per_dimension():
    """A density that is uniform on [-1, 1] costs 8 bits a value; one half as wide, 7."""
    np.testing.assert_allclose(ode.bits_per_dim(12 * np.log([0.5, 1.0]), 12), [8, 7], rtol=1e-6)


def test_likelihood_has_gradients():
    process, _, stop = PROCESSES["flow"]
    gauss = gaussian(process, jnp.zeros(2), jnp.asarray(VARIANCE, jnp.float32))
    rows = even(process, 0.999, stop, 20)
    slope = jax.grad(lambda x: jnp.sum(ode.log_likelihood(gauss, x, rows, VARIANCE.astype(np.float32))))
    np.testing.assert_allclose(slope(jnp.asarray(X, jnp.float32)), -X / VARIANCE, rtol=0.05, atol=0.02)
