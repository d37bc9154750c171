"""The move and its scan: published steps, exact marginals, images that are their own, programs that are
compiled once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import grid, guide, refine, sample
from diffjax.diffusion.analytic import Mixture, gaussian
from diffjax.diffusion.denoise import Denoiser
from diffjax.diffusion.predict import Eps, Estimate, Score, V
from diffjax.diffusion.process import (
    Cosine,
    Exploding,
    Flow,
    Shift,
    discrete,
    fold,
    image_keys,
    linear_betas,
    perturb,
    unit_noise,
)
from diffjax.diffusion.sample import Sampler
from diffjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("optimized")

DDPM = discrete(linear_betas())
MEAN, VARIANCE = np.array([0.3, -0.5, 1.0]), np.array([1.0, 0.09, 0.3])
MIXTURE = Mixture(
    Cosine(), jnp.asarray([0.3, 0.0]), jnp.asarray([[0.5, 0.3], [-0.4, 0.2]]), jnp.asarray([[0.1, 0.2], [0.3, 0.1]])
)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def moments(proc, rows, sampler, variance=VARIANCE):
    """Mean and variance at the last time, without chance: the run is affine in x and in every step's noise, so each is
    probed alone.
    """
    n, x = len(rows), np.zeros((len(rows) + 2, 3))
    x[1], noise = 1, np.zeros((n, n + 2, 3))
    noise[np.arange(n), np.arange(n) + 2] = 1
    gauss = gaussian(proc, jnp.asarray(MEAN), jnp.asarray(variance))
    end = np.asarray(sample.solve(gauss, jnp.asarray(x), rows, sampler, keys(n + 2), noise=jnp.asarray(noise)))
    mean, scale, steps = end[0], end[1] - end[0], end[2:] - end[0]
    first, spread = marginal(proc, rows[0, 0], variance)
    return mean + scale * first, scale**2 * spread + np.sum(steps**2, axis=0)


def marginal(proc, t, variance=VARIANCE):
    alpha, sigma = float(proc.alpha(t)), float(proc.sigma(t))
    return alpha * MEAN, alpha**2 * variance + sigma**2


def even(proc, steps):
    return grid.logsnr(proc, steps + 1, 0.99, 0.01)[:-1]


STOCHASTIC = {
    "ddpm": (Sampler(eta=1.0), 1),
    "half": (Sampler(eta=0.5), 1),
    "ddim's law": (Sampler(eta=0.5, law=sample.ddim_law), 1),
    "2m sde": (Sampler(refine.extrapolate(2), eta=1.0), 2),
    "3m sde": (Sampler(refine.extrapolate(3), eta=1.0), 2),
    "2m, half": (Sampler(refine.extrapolate(2), eta=0.5), 2),
}


@pytest.mark.parametrize(
    "name, proc",
    [*((name, Cosine()) for name in STOCHASTIC), ("2m sde", Flow()), ("ddpm", Exploding(0.01, 50.0)), ("ddpm", DDPM)],
)
def test_mean_and_variance_converge_to_the_exact_ones(float64, name, proc):
    sampler, order = STOCHASTIC[name]
    errors = []
    for steps in (150, 300):
        rows = even(proc, steps)
        (mean, variance), (true_mean, true_variance) = moments(proc, rows, sampler), marginal(proc, rows[-1, 1])
        np.testing.assert_allclose(mean, true_mean, atol=1e-12)
        errors.append(np.abs(variance - true_variance).max())
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.1
    assert errors[1] < (0.04, 4e-4)[order - 1]


@pytest.mark.parametrize(
    "law, eta", [(sample.power_law, 0.3), (sample.power_law, 1.0), (sample.power_law, 2.0), (sample.ddim_law, 0.3)]
)
def test_of_a_known_image_every_step_is_exact(float64, law, eta):
    """With x0 certain the move keeps the marginal N(alpha x0, sigma^2), however few the steps."""
    for proc in (Cosine(), Flow(), DDPM):
        rows = grid.uniform(4, 0.9, 0.1)
        mean, variance = moments(proc, rows, Sampler(eta=eta, law=law), variance=np.zeros(3))
        true_mean, true_variance = marginal(proc, 0.1, np.zeros(3))
        np.testing.assert_allclose(mean, true_mean, rtol=1e-12)
        np.testing.assert_allclose(variance, true_variance, rtol=1e-12)


def test_drawn_noise_gives_the_exact_moments():
    """Monte Carlo, of the noise that keys draw."""
    proc, n = Cosine(), 20000
    gauss = gaussian(proc, jnp.asarray(MEAN, jnp.float32), jnp.asarray(VARIANCE, jnp.float32))
    x = jax.random.normal(jax.random.key(1), (n, 3))
    end = sample.solve(gauss, x, grid.uniform(50), Sampler(refine.extrapolate(2), eta=1.0), keys(n))
    np.testing.assert_allclose(end.mean(0), MEAN, atol=4 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(end.T), np.diag(VARIANCE), atol=0.03)


def test_ddpm_step_is_its_posterior(float64):
    """Ho et al. 2020, eq. 6-7, over one step of the table and over a leap of many."""
    x0, xt, z = np.random.RandomState(0).randn(3, 5, 3)
    for t, s in [(0.5, 0.499), (0.9, 0.35)]:
        a_t, a_s = (float(DDPM.alpha(time)) ** 2 for time in (t, s))
        alpha, beta = a_t / a_s, 1 - a_t / a_s
        mean = (np.sqrt(a_s) * beta * x0 + np.sqrt(alpha) * (1 - a_s) * xt) / (1 - a_t)
        deviation = np.sqrt((1 - a_s) / (1 - a_t) * beta)
        est = Estimate(jnp.asarray(x0), jnp.asarray((xt - np.sqrt(a_t) * x0) / np.sqrt(1 - a_t)))
        for sampler, noise in [
            (Sampler(eta=1.0), deviation),
            (Sampler(eta=1.0, deviation=sample.large), np.sqrt(beta)),
        ]:
            np.testing.assert_allclose(sample.move(DDPM, est, t, s, sampler, z), mean + noise * z, rtol=1e-9)


def test_ddim_noise_is_its_papers(float64):
    """Song et al. 2020, eq. 16: sigma = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)."""
    est, t, s = Estimate(jnp.zeros((1, 1)), jnp.zeros((1, 1))), 0.8, 0.6
    a_t, a_s = (float(DDPM.alpha(time)) ** 2 for time in (t, s))
    noise = sample.move(DDPM, est, t, s, Sampler(eta=0.4, law=sample.ddim_law), jnp.ones((1, 1)))
    np.testing.assert_allclose(noise, 0.4 * np.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)), rtol=1e-9)


def test_learned_deviations(float64):
    est, z = Estimate(jnp.zeros((1, 3)), jnp.zeros((1, 3)), variance=jnp.asarray([[-1.0, 0.2, 1.0]])), jnp.ones((1, 3))
    t, s = 0.5, 0.45
    small, large, between, direct = (
        sample.move(DDPM, est, t, s, Sampler(eta=1.0, deviation=deviation), z)[0]
        for deviation in (sample.small, sample.large, sample.learned_range, sample.learned)
    )
    share = (np.asarray(est.variance[0]) + 1) / 2
    np.testing.assert_allclose(between, large**share * small ** (1 - share), rtol=1e-9)
    np.testing.assert_allclose(direct, np.sqrt(np.maximum(est.variance[0], 0)), rtol=1e-9)
    for deviation in (sample.small, sample.large, sample.learned_range, sample.learned):
        last = sample.move(DDPM, est, 0.001, 0.0, Sampler(eta=1.0, deviation=deviation), z)
        np.testing.assert_array_equal(last, 0)


@pytest.mark.parametrize("deviation", [sample.small, sample.large, sample.learned, sample.learned_range])
@pytest.mark.parametrize("law", [sample.power_law, sample.ddim_law])
def test_no_deviation_adds_noise_without_eta_and_all_grow_with_it(deviation, law):
    est, z = Estimate(jnp.zeros((1, 3)), jnp.zeros((1, 3)), variance=jnp.asarray([[0.1, 0.5, 1.0]])), jnp.ones((1, 3))
    for proc in (Flow(), Exploding(), DDPM):
        of = lambda eta: Sampler(eta=eta, law=law, deviation=deviation)
        none, some, all_ = (sample.move(proc, est, 0.7, 0.4, of(eta), z) for eta in (0.0, 0.5, 1.0))
        np.testing.assert_array_equal(none, 0)
        assert np.all(some > 0) and np.all(some < all_)


def test_fixed_large_is_the_noise_that_the_process_adds(float64):
    est, z = Estimate(jnp.zeros((1, 1)), jnp.zeros((1, 1))), jnp.ones((1, 1))
    for proc in (Flow(), Cosine(), Exploding(), DDPM):
        noise = sample.move(proc, est, 0.7, 0.4, Sampler(eta=1.0, deviation=sample.large), z)
        of_s = proc.alpha(0.7) / proc.alpha(0.4) * proc.sigma(0.4)
        np.testing.assert_allclose(noise, np.sqrt(proc.sigma(0.7) ** 2 - of_s**2), rtol=1e-9)


def test_laws_at_the_ends():
    """0^0 = 1: without eta no noise where r = 0, and with it nothing else."""
    for law in (sample.power_law, sample.ddim_law):
        np.testing.assert_allclose([law(jnp.asarray(r), 0.0) for r in (0.0, 0.5, 1.0)], [[1, 0]] * 3, atol=1e-7)
        np.testing.assert_allclose(
            [law(jnp.asarray(r), 1.0) for r in (0.0, 0.5, 1.0)], [[0, 1], [0.5, 0.75], [1, 0]], atol=1e-6
        )
        slopes = jax.jacrev(law, (0, 1))(0.0, 0.0)
        assert np.isfinite(slopes).all()


@pytest.mark.parametrize("law", [sample.power_law, sample.ddim_law])
@pytest.mark.parametrize("r", [1e-6, 5e-5, 1e-3, 0.3, 0.999])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_shares_are_exact_in_single_precision(law, r, eta):
    """sqrt(1 - tau) would lose all digits of r^eta where r is small: the last noisy steps of steep tables."""
    r = np.float32(r)
    kept, tau = law(jnp.float32(r), jnp.float32(eta))
    exact = np.float64(r) ** np.float64(np.float32(eta))
    if law is sample.ddim_law:
        eta2 = np.float64(np.float32(eta)) ** 2
        exact = np.sqrt(1 - eta2 + eta2 * np.float64(r) ** 2)
    np.testing.assert_allclose(float(kept), exact, rtol=2e-6)
    np.testing.assert_allclose(float(tau), 1 - exact**2, rtol=1e-4, atol=1e-7)


X = np.random.RandomState(3).randn(6, 2).astype(np.float32)
SDE = Sampler(refine.extrapolate(2), eta=1.0)


def draw(x, which, rows=None, sampler=SDE, **kwargs):
    rows = grid.uniform(8) if rows is None else rows
    return np.asarray(sample.solve(MIXTURE, jnp.asarray(x), rows, sampler, keys(6)[jnp.asarray(which)], **kwargs))


def test_replayed_noise_is_drawn_noise():
    noise = jnp.stack([unit_noise(fold(keys(6), index), (2,)) for index in range(8)])
    replayed = draw(X, range(6), noise=noise)
    np.testing.assert_allclose(replayed, draw(X, range(6)), atol=1e-6)
    assert len(np.unique(noise)) == noise.size
    np.testing.assert_array_equal(draw(X, range(6), noise=noise.at[-1].set(99.0)), replayed)


def test_an_image_is_its_own_whoever_shares_the_batch():
    """Bit for bit, at one batch shape: other neighbours, another place, padding."""
    together = draw(X, range(6))
    order = [3, 0, 5, 1, 4, 2]
    np.testing.assert_array_equal(draw(X[order], order), together[order])
    padded = draw(np.concatenate([X[:2], np.zeros((4, 2), np.float32)]), [0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(padded[:2], together[:2])
    others = draw(np.concatenate([X[:2], 100 + X[2:]]), [0, 1, 5, 4, 3, 2])
    np.testing.assert_array_equal(others[:2], together[:2])


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(refine.chain(), marks=pytest.mark.slow),
        refine.unipc(3),
        refine.chain(refine.Churn(0.2), refine.heun("eps")),
    ],
)
def test_parts_are_the_whole_bit_for_bit(chain):
    """With their memory and place carried along, through one program of any number of steps."""
    sampler, rows = Sampler(chain, eta=0.5), grid.uniform(10)
    run = sample.Run(MIXTURE, Cosine(), sampler, keys(6))
    state = sample.start(run, jnp.asarray(X))
    for part in (rows[:4], rows[4:8], rows[8:]):
        padded = np.concatenate([part, np.zeros((4 - len(part), 2))])
        state = sample.advance_part(state, padded, run)
    whole = sample.advance_part(sample.start(run, jnp.asarray(X)), rows, run)
    assert state.index == 10
    np.testing.assert_array_equal(state.x, whole.x)
    np.testing.assert_array_equal(state.x0, whole.x0)
    np.testing.assert_allclose(state.x, draw(X, range(6), rows, sampler), atol=1e-5)


def test_nothing_but_a_shape_compiles_again():
    traces = []

    def network(params, x, t, label):
        traces.append(x.shape)
        return params * x + label[:, None]

    def run(seed, scale, eta, rows, gain, label, by, gamma):
        proc = Shift(Flow(), by)
        denoiser = Denoiser(proc, V(), jnp.asarray(gain), network)
        guided = guide.Rescale(guide.Guidance(denoiser, scale), V(), 0.3)
        chain = refine.chain(refine.Churn(gamma), refine.Clip(gamma + 1), refine.extrapolate(2))
        cond = {"cond": {"label": jnp.full(6, label)}, "null": {"label": jnp.full(6, -1)}}
        return sample.solve(guided, jnp.asarray(X), rows, Sampler(chain, eta), keys(6, seed), cond=cond)

    first = run(0, 2.0, 0.0, grid.uniform(5), 0.5, 3, 3.0, 0.1)
    once, programs = len(traces), sample.advance._cache_size()
    second = run(1, 7.5, 1.0, grid.karras(Flow(), 5, 0.01, 30.0), 0.7, 5, 1.5, 0.4)
    assert len(traces) == once and sample.advance._cache_size() == programs
    assert np.abs(first - second).max() > 1e-3
    run(1, 7.5, 1.0, grid.uniform(6), 0.7, 5, 1.5, 0.4)
    assert len(traces) > once


def test_vmap_over_eta_and_grids():
    etas = jnp.asarray([0.0, 0.5, 1.0])
    rows = jnp.stack([jnp.asarray(grid.uniform(4, 1.0, stop), jnp.float32) for stop in (0.0, 0.1, 0.2)])
    one = lambda eta, rows: sample.solve(MIXTURE, jnp.asarray(X), rows, Sampler(eta=eta), keys(6))
    many = jax.vmap(one)(etas, rows)
    for i in range(3):
        np.testing.assert_allclose(many[i], one(etas[i], rows[i]), atol=2e-6)


def test_pmap_over_devices():
    n = jax.device_count()
    assert n == 8
    x, each = jnp.asarray(np.random.RandomState(0).randn(n, 2, 2), jnp.float32), keys(2 * n).reshape(n, 2)
    one = lambda x, keys: sample.solve(MIXTURE, x, grid.uniform(4), SDE, keys)
    many = jax.pmap(one)(x, each)
    np.testing.assert_allclose(many.reshape(-1, 2), jnp.concatenate([one(x[i], each[i]) for i in range(n)]), atol=2e-6)


def test_derivatives_by_the_start_and_the_grid_are_those_of_differences(float64):
    proc = Flow()
    rows = jnp.asarray(grid.uniform(4))
    mixture = MIXTURE.replace(process=proc)
    energy = lambda x, rows: jnp.sum(sample.solve(mixture, x, rows, Sampler(refine.extrapolate(2)), keys(6)) ** 2)
    x = jnp.asarray(X, jnp.float64)
    by_x, by_rows = jax.grad(energy, (0, 1))(x, rows)
    h = 1e-6
    bump = jnp.zeros_like(x).at[2, 1].set(h)
    np.testing.assert_allclose(by_x[2, 1], (energy(x + bump, rows) - energy(x - bump, rows)) / (2 * h), rtol=1e-6)
    for entry in [(1, 0), (2, 1), (3, 0)]:
        bump = jnp.zeros_like(rows).at[entry].set(h)
        np.testing.assert_allclose(
            by_rows[entry], (energy(x, rows + bump) - energy(x, rows - bump)) / (2 * h), rtol=1e-5, atol=1e-7
        )


def test_step_keeps_the_estimate_for_previews():
    run = sample.Run(MIXTURE, Cosine(), Sampler(), keys(6))
    after = sample.step(sample.start(run, jnp.asarray(X)), jnp.asarray([0.8, 0.6], jnp.float32), run)
    est = MIXTURE(jnp.asarray(X), 0.8)
    np.testing.assert_allclose(after.x0, est.x0, rtol=1e-6)
    np.testing.assert_allclose(after.x, perturb(Cosine(), est.x0, est.eps, 0.6), rtol=1e-5)
    assert after.index == 1


def test_draw_is_solve_from_the_start_noise_of_each_key():
    rows, key = grid.uniform(4, 0.9), jax.random.key(5)
    keys = image_keys(key, jnp.arange(6))
    x = MIXTURE.process.sigma(0.9) * sample.start_noise(keys, (2,))
    drawn = sample.draw(MIXTURE, key, (6, 2), rows, SDE)
    np.testing.assert_array_equal(drawn, sample.solve(MIXTURE, x, rows, SDE, keys))
    assert keys[4] == jax.random.fold_in(key, 4)


@pytest.mark.parametrize("prediction", [Eps(), Score()])
def test_a_prediction_that_makes_no_picture_of_pure_noise_begins_below_it(prediction):
    denoiser = Denoiser(Cosine(), prediction, {}, lambda params, x, t: -x)
    draw = lambda rows: sample.draw(denoiser, jax.random.key(0), (2, 3), rows)
    with pytest.raises(UserError, match="begins at t = 1, pure noise, of which .* makes no picture"):
        draw(grid.uniform(3))
    whole = draw(grid.uniform(3, start=0.99))
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(jax.jit(draw)(grid.uniform(3, start=0.99)), whole, rtol=1e-5)
