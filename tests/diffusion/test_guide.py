"""Guidance: every rule by its formula, consistent pairs, and the closed form of a guided mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import guide, predict, process
from diffjax.diffusion.analytic import Mixture
from diffjax.diffusion.denoise import Denoiser

FLOW = process.Flow()
T = 0.6
MEANS = np.asarray([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3]])
MIXTURE = Mixture(FLOW, np.zeros(2), MEANS, np.asarray([[0.2, 0.3, 0.1], [0.1, 0.2, 0.4]]))
WEAK = Mixture(FLOW, np.zeros(2), 0.8 * MEANS, np.full((2, 3), 0.5))
X = jnp.asarray(np.random.RandomState(0).randn(4, 3), jnp.float32)
CLASS = {"logits": np.tile([2.0, -2.0], (4, 1))}
COND = {"cond": CLASS, "null": {"logits": np.zeros((4, 2))}, "weak": CLASS}

RULES = {
    "cfg": lambda w: guide.Guidance(MIXTURE, w),
    "one after the other": lambda w: guide.Guidance(MIXTURE, w, together=False),
    "zero": lambda w: guide.CFGZero(MIXTURE, w),
    "apg": lambda w: guide.APG(MIXTURE, w, radius=0.5),
    "interval": lambda w: guide.Interval(guide.Guidance(MIXTURE, w), 0.1, 0.9),
    "rescale": lambda w: guide.Rescale(guide.Guidance(MIXTURE, w), predict.V(), 0.7),
    "skip": lambda w: guide.Skip(guide.Guidance(MIXTURE, w), WEAK, 0.0),
    "apg with momentum": lambda w: guide.APG(MIXTURE, w, momentum=-0.5),
    "autoguidance": lambda w: guide.Autoguidance(MIXTURE, WEAK, w),
    "rescaled interval": lambda w: guide.Rescale(guide.Interval(guide.APG(MIXTURE, w), 0.1, 0.9), predict.V(), 0.7),
}


def branches():
    return MIXTURE(X, T, CLASS), MIXTURE(X, T, COND["null"])


@pytest.mark.parametrize("name", RULES)
def test_a_scale_of_one_is_the_conditional_estimate(name):
    guided, c = RULES[name](1.0)(X, T, COND), branches()[0]
    np.testing.assert_allclose(guided.x0, c.x0, atol=3e-6)
    np.testing.assert_allclose(guided.eps, c.eps, atol=3e-6)


@pytest.mark.parametrize("name", RULES)
def test_the_pair_is_consistent(name):
    guided = RULES[name](3.0)(X, T, COND)
    np.testing.assert_allclose(process.perturb(FLOW, guided.x0, guided.eps, T), X, atol=1e-5)
    assert not np.allclose(guided.x0, branches()[0].x0, atol=1e-2)


def test_classifier_free_guidance_is_the_score_of_the_sharpened_density(float64):
    """grad log p(x|c)^w p(x)^(1-w) = -eps / sigma."""
    w, sharp = 2.5, MIXTURE.replace(logits=np.asarray([2.0, -2.0]))
    log_density = lambda x: jnp.sum(w * sharp.log_prob(x, T) + (1 - w) * MIXTURE.log_prob(x, T))
    x = jnp.asarray(X, jnp.float64)
    guided = guide.Guidance(MIXTURE, w)(x, T, COND)
    np.testing.assert_allclose(-guided.eps / FLOW.sigma(T), jax.grad(log_density)(x), rtol=1e-9)


def test_one_batch_and_two_calls_agree():
    together, apart = RULES["cfg"](3.0)(X, T, COND), RULES["one after the other"](3.0)(X, T, COND)
    np.testing.assert_allclose(together.x0, apart.x0, atol=1e-6)


def test_autoguidance_leads_away_from_the_weak():
    guided = guide.Autoguidance(MIXTURE, WEAK, 2.0)(X, T, COND)
    strong, weak = MIXTURE(X, T, CLASS), WEAK(X, T, CLASS)
    np.testing.assert_allclose(guided.x0, 2 * strong.x0 - weak.x0, atol=1e-5)


def test_interval_is_conditional_outside():
    rule, c = guide.Interval(guide.Guidance(MIXTURE, 3.0), 0.7, 0.9), branches()[0]
    assert (rule(X, T, COND).x0 == rule(X, T, COND).branches[0].x0).all()
    np.testing.assert_allclose(rule(X, T, COND).x0, c.x0, atol=1e-6)
    assert not np.allclose(rule(X, 0.8, COND).x0, MIXTURE(X, 0.8, CLASS).x0, atol=1e-2)


def test_rescale_keeps_the_deviation_of_the_conditional():
    whole = guide.Rescale(guide.Guidance(MIXTURE, 4.0), predict.V(), 1.0)(X, T, COND)
    y, c = (predict.target(predict.V(), FLOW, est.x0, est.eps, T) for est in (whole, branches()[0]))
    np.testing.assert_allclose(jnp.std(y, axis=1), jnp.std(c, axis=1), rtol=1e-4)


def test_apg_is_orthogonal_and_bounded():
    c, u = branches()
    moved = guide.project(c.x0, c.x0 - u.x0, 3.0, jnp.inf, 0.0) - c.x0
    np.testing.assert_allclose(jnp.sum(moved * c.x0, axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(guide.project(c.x0, c.x0 - u.x0, 3.0, jnp.inf, 1.0), u.x0 + 3 * (c.x0 - u.x0), atol=1e-5)
    short = guide.project(c.x0, c.x0 - u.x0, 3.0, 0.01, 1.0) - c.x0
    assert (jnp.linalg.norm(short, axis=1) < 0.0201).all()


def test_cfg_zero_star_projects_the_null_velocity():
    c, u = (np.asarray(est.eps - est.x0) for est in branches())
    s = (c * u).sum(1, keepdims=True) / (u * u).sum(1, keepdims=True)
    guided = guide.CFGZero(MIXTURE, 3.0)(X, T, COND)
    np.testing.assert_allclose(guided.eps - guided.x0, s * u + 3 * (c - s * u), atol=1e-5)
    still = guide.CFGZero(MIXTURE, 3.0, still=0.5)(X, T, COND)
    np.testing.assert_allclose(still.eps - still.x0, 0, atol=1e-5)


def test_skip_acts_in_its_part_of_the_run():
    (conditioned, _), weak = branches(), WEAK(X, T, CLASS)
    plain, acting = (
        guide.Guidance(MIXTURE, 3.0)(X, T, COND),
        guide.Skip(guide.Guidance(MIXTURE, 3.0), WEAK, 2.0, 0.3, 0.5),
    )
    np.testing.assert_allclose(acting(X, T, COND).x0, plain.x0 + 2 * (conditioned.x0 - weak.x0), atol=1e-5)
    later = guide.Guidance(MIXTURE, 3.0)(X, 0.2, COND)
    np.testing.assert_allclose(acting(X, 0.2, COND).x0, later.x0, atol=1e-6)


class Counting:
    """A denoiser, and the rows that it was asked for."""

    process = FLOW

    def __init__(self, denoise=MIXTURE):
        self.denoise, self.rows = denoise, []

    def __call__(self, x, t, cond):
        jax.debug.callback(lambda: self.rows.append(len(x)))
        return self.denoise(x, t, cond)


@pytest.mark.parametrize(
    "wrap", [lambda g: g, lambda g: guide.Rescale(g, predict.V(), 0.5), lambda g: guide.Skip(g, WEAK, 1.0, 0.9)]
)
@pytest.mark.parametrize(
    "inner", [guide.Guidance, lambda d, w: guide.APG(d, w, -0.5), lambda d, w: guide.CFGZero(d, w)]
)
def test_outside_the_interval_only_the_conditional_branch_is_evaluated(wrap, inner):
    seen = Counting()
    rule = wrap(guide.Interval(inner(seen, 3.0), 0.3, 0.7))
    run = jax.jit(lambda t: rule(X, t, COND | {"past": rule.init(X)}))
    for t, rows in ((0.9, 4), (0.5, 8), (0.3, 4), (0.7, 8)):
        seen.rows.clear()
        est = jax.block_until_ready(run(t))
        jax.effects_barrier()
        assert seen.rows == [rows]
        same = np.allclose(est.x0, MIXTURE(X, t, CLASS).x0, atol=1e-5)
        assert same == (rows == 4)


def test_the_weak_network_is_not_evaluated_outside_the_interval():
    strong, weak = Counting(), Counting(WEAK)
    rule = guide.Interval(guide.Autoguidance(strong, weak, 2.0), 0.3, 0.7)
    jax.block_until_ready(rule(X, 0.9, COND))
    assert (strong.rows, weak.rows) == ([4], [])


@pytest.mark.parametrize("rule", [guide.APG(MIXTURE, 3.0, -0.5, 0.5), guide.CFGZero(MIXTURE, 3.0)])
def test_branches_that_agree_are_left_alone(rule):
    """No division by the length of a difference or of an estimate that is zero."""
    same = {"cond": CLASS, "null": CLASS}
    np.testing.assert_allclose(rule(X, T, same).x0, MIXTURE(X, T, CLASS).x0, atol=1e-5)
    silent = rule.replace(denoise=Denoiser(FLOW, predict.Velocity(), None, lambda params, x, t, **cond: 0 * x))
    assert jnp.isfinite(silent(jnp.zeros_like(X), 0.5, COND).x0).all()
    standing = guide.Rescale(guide.CFGZero(MIXTURE, 3.0, still=0.1), predict.Velocity(), 0.7)
    assert jnp.isfinite(standing(X, T, COND).x0).all()


def test_guides_are_pytrees_whose_scale_is_traced():
    seen = []

    @jax.jit
    def run(rule):
        seen.append(1)
        return rule(X, T, COND).x0

    assert not np.allclose(
        run(guide.Guidance(MIXTURE, jnp.float32(2.0))), run(guide.Guidance(MIXTURE, jnp.float32(3.0)))
    )
    assert len(seen) == 1


def test_null_takes_text_and_class_away():
    cond = {"mask": jnp.ones((2, 3), bool), "label": jnp.asarray([4, 5]), "context": jnp.ones((2, 3, 8))}
    nothing = guide.null(cond)
    assert not nothing["mask"].any() and (nothing["label"] == -1).all() and (nothing["context"] == 1).all()
