"""Networks as denoisers: network times, input scales, learned variance, and what stays compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffjax.diffusion import denoise
from diffjax.diffusion.denoise import Apply, Denoiser
from diffjax.diffusion.predict import EDM, X0, Eps, Velocity
from diffjax.diffusion.process import Exploding, Flow, Linear, Shift, discrete, linear_betas

X = np.random.RandomState(0).randn(2, 4, 4, 3).astype(np.float32)


def report(params, x, t, **cond):
    """The network time, in every pixel."""
    return jnp.zeros_like(x) + t[:, None, None, None] + params


@pytest.mark.parametrize(
    "network_time, process, t, expected",
    [
        (denoise.plain_t, Flow(), 0.25, 0.25),
        (denoise.thousand_t, Flow(), 0.25, 250.0),
        (denoise.standard_time, Flow(), 0.25, 250.0),
        (denoise.thousand_sigma, Shift(Flow(), 3.0), 0.25, 500.0),
        (denoise.table_step, discrete(linear_betas()), 0.75, 749.0),
        (denoise.standard_time, discrete(linear_betas()), 0.75, 749.0),
        (denoise.quarter_log_sigma, Linear(80.0), 0.5, np.log(40) / 4),
    ],
)
def test_network_times(network_time, process, t, expected):
    y = Denoiser(process, X0(), 0.0, report, network_time=network_time).network(X, t)
    np.testing.assert_allclose(y, np.full_like(X, expected), rtol=1e-5)


def test_one_time_an_image():
    denoiser = Denoiser(Flow(), X0(), 0.0, report)
    est = denoiser(X, jnp.asarray([0.2, 0.6]), {})
    np.testing.assert_allclose(est.x0[:, 0, 0, 0], [0.2, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(est.x0[1], denoiser(X, 0.6, {}).x0[1])


def test_edm_is_its_papers_preconditioning(float64):
    """D = c_skip x + c_out F(c_in x; c_noise), table 1 of Karras et al. 2022."""
    process, t, data = Exploding(0.02, 80.0), 0.6, 0.5
    network = lambda params, x, t, **cond: jnp.tanh(3 * x) + t[:, None, None, None]
    est = Denoiser(process, EDM(data), None, network, network_time=denoise.quarter_log_sigma, scale=denoise.edm_scale)(
        X.astype(float), t, {}
    )
    sigma = float(process.sigma(t))
    n = np.sqrt(sigma**2 + data**2)
    expected = data**2 / n**2 * X.astype(float) + sigma * data / n * (
        np.tanh(3 * X.astype(float) / n) + np.log(sigma) / 4
    )
    np.testing.assert_allclose(est.x0, expected, rtol=1e-9)


def test_twice_the_channels_hold_a_variance():
    network = lambda params, x, t, **cond: jnp.concatenate([0.5 * x, x + 7], axis=-1)
    est = Denoiser(Flow(), Eps(), None, network)(X, 0.5, {})
    np.testing.assert_allclose(est.eps, 0.5 * X, rtol=1e-6)
    np.testing.assert_allclose(est.variance, X + 7, rtol=1e-6)
    assert Denoiser(Flow(), X0(), 0.0, report)(X, 0.5, {}).variance is None


def test_half_precision_outputs_are_converted_before_the_algebra():
    network = lambda params, x, t, **cond: x.astype(jnp.bfloat16)
    est = Denoiser(Flow(), Velocity(), None, network)(X, 0.5, {})
    assert est.x0.dtype == est.eps.dtype == jnp.float32


def test_parameters_and_modules_made_again_compile_nothing():
    traces = []

    class Net(nn.Module):
        width: int = 3

        @nn.compact
        def __call__(self, x, t):
            traces.append(self.width)
            return nn.Dense(self.width)(x)

    params = Net().init(jax.random.key(0), X, 0.0)["params"]
    traces.clear()
    call = jax.jit(lambda denoiser, x: denoiser(x, 0.5, {}).x0)
    call(Denoiser(Flow(), X0(), params, Apply(Net())), X)
    call(Denoiser(Flow(), X0(), jax.tree.map(lambda p: p + 1, params), Apply(Net())), X)
    assert traces == [3]
