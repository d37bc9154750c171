"""Solvers: the order that each is known for, the identities between them, and steps at which a clock is infinite."""

import convergence
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import grid, guide, refine, sample
from diffjax.diffusion.analytic import Mixture, flow_map
from diffjax.diffusion.predict import Estimate, Velocity, with_x0
from diffjax.diffusion.process import Cosine, Exploding, Flow, Linear, Shift, discrete, linear_betas, zero_terminal_snr
from diffjax.utils import struct

SLOW = pytest.mark.slow
PROBLEMS = list(convergence.MEANS)
DDPM = discrete(linear_betas())


def mixture(process):
    return Mixture(
        process, jnp.asarray([0.3, 0.0]), jnp.asarray([[0.5, 0.3], [-0.4, 0.2]]), jnp.asarray([[0.1, 0.2], [0.3, 0.1]])
    )


X = np.array([[0.5, -1.0], [1.2, 0.3], [-0.7, 0.4]], np.float32)
KEYS = lambda: jax.random.split(jax.random.key(1), len(X))


def draw(chain, process, rows, eta=0.0, noise=None, denoise=None):
    x = jnp.asarray(X) * process.sigma(rows[0, 0])
    return sample.solve(denoise or mixture(process), x, rows, sample.Sampler(chain, eta), KEYS(), noise=noise)


@pytest.mark.parametrize(
    "process", [pytest.param(name, marks=SLOW) if name == "discrete" else name for name in convergence.PROCESSES]
)
@pytest.mark.parametrize("name", convergence.SOLVERS)
def test_order(float64, name, process):
    solver = convergence.SOLVERS[name]
    for problem in PROBLEMS:
        measured = convergence.measure(convergence.problem(problem, convergence.process_for(process, solver)), solver)
        assert abs(measured.order - solver.order) < 0.1
        assert measured.own > solver.own - 0.1
        if solver.history:
            assert abs(measured.startup - solver.own) < 0.1
        if solver.order > 1:
            assert max(measured.error, measured.own_error) < 1e-6


@pytest.mark.parametrize("problem", PROBLEMS)
def test_reference_is_far_finer_than_the_errors_measured(float64, problem):
    mixture = convergence.problem(problem, Flow())
    ts = np.array([0.99, 0.01])
    fine, coarse = (convergence.exact(mixture, convergence.NOISE, ts, tolerance)[-1] for tolerance in (1e-13, 1e-10))
    assert np.abs(fine - coarse).max() < 1e-10
    if problem == "gaussian":
        closed = flow_map(mixture, jnp.asarray(convergence.NOISE), 0.99, 0.01)
        np.testing.assert_allclose(fine, closed, atol=1e-11)


@struct.dataclass
class Published3M(refine.Extrapolate):
    """DPM-Solver++(3M) as published: half of the second difference."""

    def update(self, state, est, step):
        nodes, usable, h = state.nodes(self.clock, step)
        m = refine.moments((1 + step.eta) * h, 3)
        x0 = state.integral(est.x0, nodes, usable, [m[0], m[1], m[2] / 2], two=0.5)
        return state.push(est.x0, step.t), with_x0(est, x0, step.process, step.t), step.x


def step(process, t, s, x=None):
    """One that draws no noise and evaluates no network."""
    return refine.Step(x, t, s, process, denoise=None, keys=None)


def test_published_3m_step():
    """Its coefficients as its authors write them: phi_1 D0 - phi_2 D1 + phi_3 D2, of divided differences."""
    process, times = Flow(), [0.8, 0.6, 0.45, 0.3]
    lam = [float(process.logsnr(t)) / 2 for t in times]
    x0 = [np.float32(v) for v in (0.2, 0.5, 0.9)]
    h, r0, r1 = lam[3] - lam[2], (lam[2] - lam[1]) / (lam[3] - lam[2]), (lam[1] - lam[0]) / (lam[3] - lam[2])
    d10, d11 = (x0[2] - x0[1]) / r0, (x0[1] - x0[0]) / r1
    d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
    phi1, phi2 = np.expm1(-h), np.expm1(-h) / h + 1
    phi3 = phi2 / h - 0.5
    x = np.float32(1.1)
    expected = times[3] / times[2] * x - (1 - times[3]) * (phi1 * x0[2] - phi2 * d1 + phi3 * d2)

    history = refine.History(jnp.asarray([[[x0[1]]], [[x0[0]]]]), jnp.asarray([times[1], times[0]]))
    est = Estimate(jnp.full((1, 1), x0[2]), jnp.full((1, 1), (x - (1 - times[2]) * x0[2]) / times[2]))
    _, est, _ = Published3M(3).update(history, est, step(process, times[2], times[3]))
    np.testing.assert_allclose((1 - times[3]) * est.x0 + times[3] * est.eps, expected, rtol=1e-6)


def test_published_3m_has_order_two(float64):
    solver = convergence.SOLVERS["extrapolate 3"]._replace(refine=Published3M(3))
    for problem in PROBLEMS:
        measured = convergence.measure(convergence.problem(problem, Flow()), solver)
        assert abs(measured.order - 2) < 0.1
        assert (
            measured.error
            > 10 * convergence.measure(convergence.problem(problem, Flow()), convergence.SOLVERS["extrapolate 3"]).error
        )


def test_2m_is_ddim_of_an_extrapolated_x0():
    process, rows = Flow(), grid.uniform(6, 0.95, 0.05)
    denoise, x, previous = mixture(process), jnp.asarray(X) * process.sigma(0.95), None
    for t, s in rows:
        est = denoise(x, t)
        x0, eps = est.x0, est.eps
        if previous is not None:
            h, h_previous = (float(process.logsnr(b) - process.logsnr(a)) for a, b in ((t, s), (previous[1], t)))
            x0 = est.x0 + h / h_previous / 2 * (est.x0 - previous[0])
            eps = (x - process.alpha(t) * x0) / process.sigma(t)
        previous = est.x0, t
        x = process.alpha(s) * x0 + process.sigma(s) * eps
    np.testing.assert_allclose(draw(refine.extrapolate(2), process, rows), x, atol=2e-6)


def test_chain_of_none_is_ddim_and_chains_compose():
    rows = grid.uniform(5, 1.0, 0.0)
    plain = draw(refine.chain(), DDPM, rows)
    np.testing.assert_array_equal(draw(refine.chain(refine.Clip(1e6)), DDPM, rows), plain)
    np.testing.assert_allclose(draw(refine.extrapolate(1), DDPM, rows), plain, atol=1e-6)
    np.testing.assert_array_equal(
        draw(refine.chain(refine.extrapolate(2)), DDPM, rows), draw(refine.extrapolate(2), DDPM, rows)
    )
    clip, extrapolate = refine.Clip(0.5), refine.extrapolate(2)
    assert jnp.abs(draw(refine.chain(extrapolate, clip), DDPM, rows)).max() <= 0.5
    rows = grid.uniform(5, 0.6, 0.1)
    first, last = (draw(refine.chain(*links), DDPM, rows) for links in ((clip, extrapolate), (extrapolate, clip)))
    assert jnp.abs(first - last).max() > 1e-3


def test_heun_step_is_the_mean_of_two_slopes():
    process, t, s = Exploding(0.01, 50.0), 0.7, 0.6
    denoise, x = mixture(process), jnp.asarray(X) * process.sigma(0.7)
    here = denoise(x, t).eps
    there = denoise(x + (process.sigma(s) - process.sigma(t)) * here, s).eps
    expected = x + (process.sigma(s) - process.sigma(t)) * (here + there) / 2
    np.testing.assert_allclose(draw(refine.heun("eps"), process, np.array([[t, s]])), expected, rtol=1e-5)


def test_heun_is_one_method_on_a_flow_whose_lines_agree():
    """With alpha = 1 and sigma linear in t, eps and the velocity are the same slope."""
    process, rows = Linear(10.0), grid.uniform(8, 0.9, 0.0)
    np.testing.assert_allclose(
        draw(refine.heun("eps"), process, rows), draw(refine.heun("flow"), process, rows), atol=1e-4
    )


def test_adams_of_one_is_the_plain_step_and_even_coefficients_are_the_textbook_ones():
    rows = grid.uniform(6, 0.95, 0.05)
    np.testing.assert_allclose(draw(refine.adams(1), Flow(), rows), draw(refine.chain(), Flow(), rows), atol=1e-6)
    w = refine.quadrature([jnp.asarray(-1.0 * i) for i in range(4)], [jnp.asarray(1 / (k + 1)) for k in range(4)])
    np.testing.assert_allclose(24 * np.asarray(w), [55, -59, 37, -9], rtol=1e-5)
    even = grid.uniform(6, 0.9, 0.1)
    process = Linear(10.0)
    np.testing.assert_allclose(
        draw(refine.adams(4, even=True), process, even), draw(refine.adams(4), process, even), rtol=1e-4, atol=1e-5
    )


def test_quadrature_solves_the_vandermonde_system(float64):
    nodes, m = [0.0, 1.0, -0.7, -1.9], [1.0, 0.4, 0.3, 0.2]
    w = refine.quadrature([jnp.asarray(u) for u in nodes], [jnp.asarray(v) for v in m])
    np.testing.assert_allclose(w, np.linalg.solve(np.vander(nodes, increasing=True).T, m), rtol=1e-12)


@pytest.mark.parametrize("h", [-3.0, -0.9, -1e-3, 1e-6, 0.3, 0.999, 1.001, 4.0, 30.0])
def test_moments_are_the_integrals(float64, h):
    u, w = np.polynomial.legendre.leggauss(60)
    u, w = (u + 1) / 2, w * np.exp(-(1 - (u + 1) / 2) * h)
    np.testing.assert_allclose(
        refine.moments(jnp.asarray(h), 4), [np.sum(w * u**k) / np.sum(w) for k in range(4)], rtol=1e-9
    )


def test_clock_minus_log_sigma_is_that_of_sd3_and_agrees_where_alpha_is_one():
    rows = grid.uniform(6, 0.95, 0.05)
    sd3, usual = refine.extrapolate(2, refine.minus_log_sigma), refine.extrapolate(2)
    np.testing.assert_allclose(draw(sd3, Exploding(), rows), draw(usual, Exploding(), rows), rtol=1e-4, atol=1e-5)
    assert jnp.abs(draw(sd3, Flow(), rows) - draw(usual, Flow(), rows)).max() > 1e-3


def consistent(est, process, x, t):
    np.testing.assert_allclose(process.alpha(t) * est.x0 + process.sigma(t) * est.eps, x, atol=1e-5)


def refined(link, est, x, process, t=0.6, state=()):
    return link.update(state, est, step(process, t, 0.5, x))[1]


def test_clip_moves_eps_or_keeps_it():
    est = mixture(DDPM)(jnp.asarray(3 * X), 0.6)
    clipped, kept = (refined(refine.Clip(0.2, keep_eps=keep), est, None, DDPM) for keep in (False, True))
    np.testing.assert_array_equal(clipped.x0, jnp.clip(est.x0, -0.2, 0.2))
    np.testing.assert_array_equal(kept.x0, clipped.x0)
    np.testing.assert_array_equal(kept.eps, est.eps)
    consistent(clipped, DDPM, 3 * X, 0.6)


def test_threshold_is_the_quantile_of_each_image():
    x0 = (
        np.random.RandomState(0).randn(3, 8, 8, 1).astype(np.float32)
        * np.array([0.1, 1.0, 4.0], np.float32)[:, None, None, None]
    )
    x = 0.4 * x0 + 0.6
    est = refined(
        refine.Threshold(0.9, limit=2.5), Estimate(jnp.asarray(x0), jnp.ones_like(x0)), jnp.asarray(x), Flow()
    )
    q = np.clip(np.quantile(np.abs(x0).reshape(3, -1), 0.9, axis=1), 1.0, 2.5)[:, None, None, None]
    assert q[0] == 1 and 1 < q[1] < 2.5 and q[2] == 2.5
    np.testing.assert_allclose(est.x0, np.clip(x0, -q, q) / q, rtol=1e-5)
    consistent(est, Flow(), x, 0.6)


PAIR = {"cond": {"logits": jnp.tile(jnp.asarray([2.0, 0.0]), (3, 1))}, "null": {"logits": jnp.zeros((3, 2))}}


def test_momentum_is_a_running_difference():
    process, rows = Flow(), grid.uniform(3, 0.9, 0.3)
    denoise, begin = mixture(process), jnp.asarray(X) * 0.9
    delta, x = 0.0, begin
    for t, s in rows:
        c, u = (denoise(x, t, PAIR[name]) for name in ("cond", "null"))
        delta = c.x0 - u.x0 - 0.5 * delta
        est = with_x0(c, guide.project(c.x0, delta, 3.0, np.inf, 0.2), process, t)
        x = process.alpha(s) * est.x0 + process.sigma(s) * est.eps
    guided = guide.APG(denoise, 3.0, -0.5, parallel=0.2)
    wrapped = guide.Rescale(guide.Interval(guided, 0.0, 1.0), Velocity(), 0.0)
    for rule in (guided, wrapped):
        ours = sample.solve(rule, begin, rows, sample.Sampler(refine.chain()), KEYS(), cond=PAIR)
        np.testing.assert_allclose(ours, x, atol=1e-5)


def test_heun_evaluates_with_the_memory_and_the_refinements_of_its_step():
    """One step by hand: both slopes are of the guided, clipped estimate, and the guide remembers the first."""
    process, x, (t, s) = Flow(), jnp.asarray(X), (0.8, 0.5)
    rule, clip = guide.APG(mixture(process), 3.0, -0.5), refine.Clip(0.3)
    past = jnp.full_like(x, 0.2)
    slopes, memories, at = [], [], x
    for time in (t, s):
        est = rule(at, time, PAIR | {"past": past})
        est = with_x0(est, jnp.clip(est.x0, -0.3, 0.3), process, time)
        slopes.append(est.eps)
        memories.append(est.memory)
        at = process.alpha(s) * est.x0 + process.sigma(s) * est.eps
    ratio = process.sigma(t) / process.alpha(t) - process.sigma(s) / process.alpha(s)
    expected = process.alpha(s) * (x / process.alpha(t) - ratio * (slopes[0] + slopes[1]) / 2)
    run = sample.Run(rule, process, sample.Sampler(refine.chain(clip, refine.heun())), KEYS(), PAIR)
    state = sample.step(sample.start(run, x).replace(past=past), jnp.asarray([t, s]), run)
    np.testing.assert_allclose(state.x, expected, atol=1e-5)
    np.testing.assert_allclose(state.past, memories[0], atol=1e-6)


SOLVERS = [
    refine.chain(),
    refine.heun(),
    refine.heun("flow"),
    refine.extrapolate(3),
    refine.unipc(3),
    refine.adams(4, "flow"),
]
BOUNDS = [refine.chain(), refine.Clip(0.4, keep_eps=True), refine.Threshold(0.5)]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: type(bound).__name__)
def test_the_known_part_follows_its_exact_path(solver, bound):
    """x_t = alpha image + sigma eps of the first noise, at every step and at every time where the network is asked."""
    process, rows, image = Flow(), grid.uniform(4, 0.9, 0.1), jnp.asarray([[0.3, 0.0], [-0.2, 0.0], [0.4, 0.0]])
    noise, seen = jnp.asarray(X), []
    begin = process.alpha(0.9) * image + process.sigma(0.9) * noise
    chain = refine.inpainted(refine.chain(bound, solver), image, jnp.asarray([[0.0, 1.0]] * 3))

    def denoise(x, t, cond):
        jax.debug.callback(lambda x, t: seen.append((float(t), np.asarray(x))), x, t)
        return mixture(process)(x, t, cond)

    run = sample.Run(jax.tree_util.Partial(denoise), process, sample.Sampler(chain), KEYS())
    end = sample.advance(sample.start(run, begin), rows, run).x
    jax.effects_barrier()
    for t, x in (*seen, (0.1, end)):
        np.testing.assert_allclose(x[:, 0], ((1 - t) * image + t * noise)[:, 0], atol=2e-5)
    assert len(seen) >= 4 and np.abs(end[:, 1] - (0.9 * image + 0.1 * noise)[:, 1]).max() > 0.1


def before(churn, x, t, process, keys):
    """(x, t) at which the network is evaluated."""
    moved = churn.before(refine.Step(x, t, 0.0, process, denoise=None, keys=keys))
    return moved.x, moved.t


@pytest.mark.parametrize("process", [Flow(), Exploding(0.01, 50.0), Linear(80.0)])
def test_churn_adds_the_noise_of_its_new_time(process):
    x, keys = jnp.zeros((2000, 2)), jax.random.split(jax.random.key(0), 2000)
    churned, later = before(refine.Churn(0.4, noise=1.0), x, 0.5, process, keys)
    ratio = lambda t: process.sigma(t) / process.alpha(t)
    np.testing.assert_allclose(ratio(later), 1.4 * ratio(0.5), rtol=1e-5)
    expected = process.alpha(later) * np.sqrt(ratio(later) ** 2 - ratio(0.5) ** 2)
    np.testing.assert_allclose(jnp.std(churned), expected, rtol=0.05)


def test_churn_is_nothing_outside_its_range_without_gamma_and_where_alpha_is_zero():
    x, keys = jnp.asarray(X), KEYS()
    for churn, t in [
        (refine.Churn(0.0), 0.5),
        (refine.Churn(0.4, low=2.0), 0.5),
        (refine.Churn(0.4, high=0.5), 0.5),
        (refine.Churn(0.4), 1.0),
    ]:
        same, later = before(churn, x, t, Flow(), keys)
        np.testing.assert_array_equal(same, x)
        assert later == t
    same, later = before(refine.Churn(0.4), x, 1.0, DDPM, keys)
    np.testing.assert_allclose(same, x, rtol=1e-6)
    assert later == 1.0


CHAINS = {
    "ddim": refine.chain(),
    "heun eps": refine.heun("eps"),
    "heun flow": refine.heun("flow"),
    "2m": refine.extrapolate(2),
    "3m": refine.extrapolate(3),
    "2m of sd3": refine.extrapolate(2, refine.minus_log_sigma),
    "unipc 2": refine.chain(refine.Clip(2.0), refine.unipc(2)),
    "unipc 3": refine.unipc(3),
    "adams 4": refine.adams(4),
    "adams flow": refine.adams(3, "flow"),
    "churn": refine.chain(refine.Churn(0.3), refine.chain(refine.Threshold(), refine.heun("eps"))),
}
ENDS = {
    "flow": Flow(),
    "shift": Shift(Flow(), 3.0),
    "zero-terminal": discrete(zero_terminal_snr(linear_betas())),
}


@struct.dataclass
class Blind:
    """Knows nothing at sigma = 0: what a network evaluated there would return is not a number."""

    denoise: Mixture

    @property
    def process(self):
        return self.denoise.process

    def __call__(self, x, t, cond=None):
        broken = jnp.where(self.denoise.process.sigma(t) > 0, 0.0, jnp.nan)
        return jax.tree.map(lambda leaf: leaf + broken, self.denoise(x, t))


@pytest.mark.parametrize("name", CHAINS)
def test_from_pure_noise_to_the_image_everything_is_finite(name):
    """Both clocks are infinite at t = 1 and at t = 0, and the network is not asked at sigma = 0."""
    assert np.isfinite(draw(CHAINS[name], Flow(), grid.uniform(4), eta=0.5, denoise=Blind(mixture(Flow())))).all()


@pytest.mark.parametrize(
    "name, process",
    [
        *((name, "flow") for name in ("heun eps", "3m", "unipc 2")),
        *(pytest.param(name, "flow", marks=SLOW) for name in ("adams 4", "churn")),
        pytest.param("2m", "zero-terminal", marks=SLOW),
        ("2m of sd3", "shift"),
    ],
)
def test_derivatives_by_x_the_grid_and_eta_are_finite_there(name, process):
    process, rows = ENDS[process], jnp.asarray(grid.uniform(3), jnp.float32)

    def energy(x, rows, eta):
        return jnp.sum(sample.solve(mixture(process), x, rows, sample.Sampler(CHAINS[name], eta), KEYS()) ** 2)

    slopes = jax.grad(energy, (0, 1, 2))(jnp.asarray(X), rows, 0.5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_multistep_begins_with_order_one_at_an_infinite_clock():
    """The first step starts where the clock is infinite, and the second has no usable past: both are plain steps."""
    rows = grid.uniform(6)[:2]
    plain = draw(refine.chain(), Flow(), rows)
    for chain in (refine.extrapolate(2), refine.extrapolate(3), refine.adams(4)):
        np.testing.assert_allclose(draw(chain, Flow(), rows), plain, atol=1e-6)


def test_last_step_to_sigma_zero_is_the_estimate():
    rows = grid.uniform(6)
    before = draw(refine.chain(), Cosine(), rows[:-1])
    np.testing.assert_allclose(
        draw(refine.chain(), Cosine(), rows), mixture(Cosine())(before, rows[-1, 0]).x0, atol=1e-6
    )
