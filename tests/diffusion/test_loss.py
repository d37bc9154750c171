"""Losses: one squared error, whatever is predicted; weights and times as published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffjax.diffusion import loss, predict, process
from diffjax.diffusion.denoise import Denoiser

T = np.asarray([0.1, 0.35, 0.6, 0.9])
PREDICTIONS = {
    "x0": predict.X0(),
    "eps": predict.Eps(),
    "v": predict.V(),
    "velocity": predict.Velocity(),
    "edm": predict.EDM(),
}


def wrong_by(delta):
    """A network whose x0 is wrong by `delta`, whatever it is asked to predict."""

    def apply(params, x, t, **cond):
        prediction, proc, x0, eps, times = params
        shift = process.expand(proc.alpha(times) / proc.sigma(times), x0)
        return predict.target(prediction, proc, x0 + delta, eps - shift * delta, times)

    return apply


def measured(prediction, weight, proc=process.Cosine()):
    x0, eps = np.random.RandomState(0).randn(2, 4, 2, 2, 1)
    denoiser = Denoiser(proc, prediction, (prediction, proc, x0, eps, T), wrong_by(0.1))
    return loss.weighted_error(denoiser, jnp.asarray(x0), jnp.asarray(eps), jnp.asarray(T), {}, weight)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_one_weight_is_one_loss_for_every_prediction(name, float64):
    np.testing.assert_allclose(measured(PREDICTIONS[name], loss.x0_weight()), 0.01, rtol=1e-9)


def snr(proc):
    return np.exp(np.asarray(proc.logsnr(T)))


def test_weights_as_published(float64):
    cosine, flow = process.Cosine(), process.Flow()
    eps_error = 0.01 * snr(cosine)  # |deps|^2 = SNR |dx0|^2
    sigma = 1 / np.sqrt(snr(cosine))
    published = {
        "plain eps": (measured(predict.Eps(), loss.plain()), eps_error),
        "plain v": (measured(predict.V(), loss.plain()), 0.01 / np.asarray(cosine.sigma(T)) ** 2),
        "min-SNR, Hang et al. eq. 7": (
            measured(predict.Eps(), loss.min_snr(5.0)),
            np.minimum(snr(cosine), 5) / snr(cosine) * eps_error,
        ),
        "SiD2": (measured(predict.V(), loss.sigmoid(-3.0)), eps_error / (1 + np.exp(np.log(snr(cosine)) + 3))),
        "EDM": (measured(predict.X0(), loss.edm(0.5)), 0.01 * (sigma**2 + 0.25) / (sigma * 0.5) ** 2),
        "P2": (measured(predict.Eps(), loss.p2(0.5, 1.0)), eps_error / (1 + snr(cosine)) ** 0.5),
        "JiT": (measured(predict.X0(), loss.velocity(0.2), flow), 0.01 / np.maximum(T, 0.2) ** 2),
    }
    for name, (ours, theirs) in published.items():
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    "times, distribution",
    [
        (loss.uniform(), stats.uniform()),
        (loss.logit_normal(0.6, 1.2), stats.norm(0.6, 1.2)),
        (loss.lognormal_sigma(-1.2, 1.2), stats.norm(-1.2, 1.2)),
    ],
)
def test_quantiles_of_the_times(times, distribution):
    u = jnp.asarray([0.02, 0.25, 0.5, 0.9, 0.99])
    proc = process.Linear(80.0)
    t = np.asarray(times(proc, u), np.float64)
    if isinstance(distribution.dist, stats.rv_continuous) and distribution.dist.name == "norm":
        t = np.log(80 * t) if distribution.args[0] < 0 else np.log(t / (1 - t))
    np.testing.assert_allclose(distribution.cdf(t), u, atol=1e-5)


def test_antithetic_times_cover_the_batch_evenly():
    u = np.sort(loss.antithetic(jax.random.key(3), jnp.arange(64), 64))
    np.testing.assert_allclose(np.diff(u), 1 / 64, atol=1e-6)


@pytest.mark.parametrize("draw", [loss.independent, loss.antithetic])
def test_a_row_draws_alike_wherever_it_is(draw):
    key, rows = jax.random.key(0), jnp.arange(16)
    assert (draw(key, rows, 16)[4:9] == draw(key, rows[4:9], 16)).all()
    assert len(np.unique(draw(key, rows, 16))) == 16


def test_drawn_errors_are_those_of_each_image_and_average_to_the_loss():
    """A network that answers 0 is wrong by the velocity eps - x0 itself: 1 + |x0|^2 in the mean."""
    silent = Denoiser(process.Flow(), predict.Velocity(), None, lambda params, x, t: jnp.zeros_like(x))
    x0 = jnp.asarray(np.random.RandomState(0).randn(4000, 2), jnp.float32)
    drawn = lambda x0: loss.drawn_error(silent, jax.random.key(0), x0, loss.plain(), loss.uniform())
    errors = drawn(x0)
    np.testing.assert_allclose(errors.mean(), 1 + jnp.mean(x0**2), atol=4 * float(jnp.std(errors)) / np.sqrt(4000))
    np.testing.assert_array_equal(drawn(x0.at[1:].set(5.0))[0], errors[0])


def test_finite_at_both_ends():
    ends = jnp.asarray([1e-6, 1 - 1e-6])
    for proc in (process.Flow(), process.Cosine()):
        for weight in (loss.x0_weight(), loss.velocity(0.1), loss.min_snr(), loss.sigmoid(), loss.edm(), loss.p2()):
            for prediction in (predict.V(), predict.Velocity()):
                assert np.isfinite(weight(Denoiser(proc, prediction, None, wrong_by(0)), ends)).all()
