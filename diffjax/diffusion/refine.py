"""Refinements: what a solver does to a denoiser's estimate before the one move of `sample.move`.

A refinement is a frozen pytree with

    init(x) -> state                                    of a fixed shape, so that it scans
    before(x, t, process, key) -> (x, t)                 EDM's churn; most do nothing here
    update(state, est, x, t, s, *, process, denoise, key, eta) -> (state, est, x)

Multistep solvers replace x0 (or a slope) by the polynomial through its history, integrated over the step:
`sum_i w_i y_i` with `sum_i w_i u_i^k = m_k`, nodes u_i = (clock_i - clock_t) / h, h = clock_s - clock_t, u = 0 now and
u = 1 at the end of the step. m_k is the k-th moment of the step's weight. Where a clock is infinite the order falls
to 1.
"""

import functools
from collections.abc import Callable
from math import factorial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffjax.diffusion.guide import Denoise, Scale
from diffjax.diffusion.predict import Estimate, Velocity, target, with_x0
from diffjax.diffusion.process import Process, Time, expand, root
from diffjax.utils import struct

Clock = Callable[[Process, Time], Time]


def half_logsnr(process: Process, t: Time) -> Time:
    """lambda = log(alpha / sigma): the clock of DPM-Solver."""
    return process.logsnr(t) / 2


def minus_log_sigma(process: Process, t: Time) -> Time:
    """-log(sigma): the clock with which the DPM-Solver++ of SD3.5 was published."""
    return -jnp.log(process.sigma(t))


class Refine:
    """A refinement that changes nothing; the others override what they need."""

    def init(self, x: Float[Array, "b ..."]) -> Any:
        """The state before the first step."""
        return ()

    def before(self, x: Float[Array, "b ..."], t: Time, process: Process, key: Key[Array, " b"]) -> tuple[Array, Time]:
        """x and t at which the network is evaluated."""
        return x, t

    def update(
        self,
        state: Any,
        est: Estimate,
        x: Array,
        t: Time,
        s: Time,
        *,
        process: Process,
        denoise: Denoise,
        key: Array,
        eta: Scale,
    ) -> tuple[Any, Estimate, Array]:
        """The refined estimate, and x where the solver corrects it."""
        return state, est, x


@struct.dataclass
class Chain(Refine):
    """One refinement after the other. What a link evaluates itself, as `Heun` does, is refined by the links before
    it too.
    """

    links: tuple[Refine, ...]

    def init(self, x: Array) -> Any:
        return tuple(link.init(x) for link in self.links)

    def before(self, x: Array, t: Time, process: Process, key: Array) -> tuple[Array, Time]:
        for link in self.links:
            x, t = link.before(x, t, process, key)
        return x, t

    def update(
        self, state: Any, est: Estimate, x: Array, t: Time, s: Time, *, denoise: Denoise, **kwargs: Any
    ) -> tuple[Any, Estimate, Array]:
        states = []
        for link, old in zip(self.links, state):
            new, est, x = link.update(old, est, x, t, s, denoise=denoise, **kwargs)
            denoise = _refined(denoise, functools.partial(link.update, old, s=s, denoise=denoise, **kwargs))
            states.append(new)
        return tuple(states), est, x


def _refined(denoise: Denoise, update: Callable) -> Denoise:
    return lambda x, t: update(denoise(x, t), x, t)[1]


def chain(*links: Refine) -> Chain:
    """The refinements in order; `chain()` is none: DDIM, DDPM or Euler by eta."""
    return Chain(links)


@struct.dataclass
class Clip(Refine):
    """x0 clipped to [-radius, radius]; eps follows, or stays as in the published DDIM with `keep_eps`."""

    radius: Scale = 1.0
    keep_eps: bool = struct.field(pytree_node=False, default=False)

    def update(
        self, state: Any, est: Estimate, x: Array, t: Time, s: Time, *, process: Process, **_: Any
    ) -> tuple[Any, Estimate, Array]:
        x0 = jnp.clip(est.x0, -self.radius, self.radius)
        return state, _bounded(est, x0, self.keep_eps, process, t), x


@struct.dataclass
class Threshold(Refine):
    """Dynamic thresholding: x0 clipped to [-q, q] and divided by q, q = max(1, the quantile of |x0|) per image, at most
    `limit` (Saharia et al. 2022, Imagen, section 2.3); eps as in `Clip`.
    """

    quantile: Scale = 0.995
    limit: Scale = jnp.inf
    keep_eps: bool = struct.field(pytree_node=False, default=False)

    def update(
        self, state: Any, est: Estimate, x: Array, t: Time, s: Time, *, process: Process, **_: Any
    ) -> tuple[Any, Estimate, Array]:
        size = jnp.abs(est.x0).reshape(x.shape[0], -1)
        q = expand(jnp.clip(jnp.quantile(size, self.quantile, axis=1), 1.0, self.limit), x)
        return state, _bounded(est, jnp.clip(est.x0, -q, q) / q, self.keep_eps, process, t), x


def _bounded(est: Estimate, x0: Array, keep_eps: bool, process: Process, t: Time) -> Estimate:
    return est._replace(x0=x0) if keep_eps else with_x0(est, x0, process, t)


@struct.dataclass
class Inpaint(Refine):
    """Where mask is 0 the picture is known: x0 = image, eps = (x - alpha image) / sigma, its exact path (Lugmayr et al.
    2022, eq. 8, on the estimate); where mask is 1 it is drawn.
    """

    image: Float[Array, "b ..."]
    mask: Float[Array, "b ..."]

    def update(
        self, state: Any, est: Estimate, x: Array, t: Time, s: Time, *, process: Process, **_: Any
    ) -> tuple[Any, Estimate, Array]:
        eps = (x - process.alpha(t) * self.image) / process.sigma(t)
        drawn = lambda new, known: self.mask * new + (1 - self.mask) * known
        return state, est._replace(x0=drawn(est.x0, self.image), eps=drawn(est.eps, eps)), x


def inpainted(refine: Refine, image: Float[Array, "b ..."], mask: Float[Array, "b ..."]) -> Chain:
    """The refinement with the known part put back before it and after each of its links, since each may move it."""
    if not isinstance(refine, Chain):
        return Chain((refine, Inpaint(image, mask)))
    return Chain((Inpaint(image, mask), *(inpainted(link, image, mask) for link in refine.links)))


@struct.dataclass
class Churn(Refine):
    """EDM's churn: noise is added until sigma has grown by 1 + gamma (Karras et al. 2022, algorithm 2),
    alpha = 1 there.

    For other processes the ratio sigma / alpha grows and x is scaled to the alpha of its new time.
    """

    gamma: Scale
    noise: Scale = 1.0
    low: Scale = 0.0
    high: Scale = jnp.inf

    def before(self, x: Array, t: Time, process: Process, key: Array) -> tuple[Array, Time]:
        finite = process.alpha(t) > 0
        alpha = jnp.where(finite, process.alpha(t), 1.0)
        ratio = process.sigma(t) / alpha
        active = finite & (self.gamma > 0) & (ratio >= self.low) & (ratio <= self.high)
        later = jnp.where(active, process.inverse(-2 * jnp.log(ratio * (1 + self.gamma))), t)
        grown = process.sigma(later) / jnp.where(active, process.alpha(later), 1.0)
        added = self.noise * root(grown**2 - ratio**2)
        z = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), x.shape[1:], x.dtype))(key)
        return jnp.where(active, process.alpha(later) * (x / alpha + added * z), x), later


@struct.dataclass
class Line:
    """A straight line in some clock: z_s = z_t + (clock_s - clock_t) slope, as a pair that the move follows.

    `eps`: z = x / alpha, clock = sigma / alpha, slope = eps. `flow`: z = x, clock = t, slope = alpha' x0 + sigma' eps.
    """

    of: str = struct.field(pytree_node=False, default="eps")

    def clock(self, process: Process, t: Time) -> Time:
        """The clock at time t."""
        return process.sigma(t) / process.alpha(t) if self.of == "eps" else jnp.asarray(t)

    def slope(self, est: Estimate, process: Process, t: Time) -> Array:
        """dz / dclock."""
        return est.eps if self.of == "eps" else target(Velocity(), process, est.x0, est.eps, t)

    def along(self, est: Estimate, slope: Array, x: Array, t: Time, s: Time, process: Process) -> Estimate:
        """The estimate whose move from t to s is the line of that slope."""
        if self.of == "eps":
            finite = process.alpha(t) > 0
            ratio = process.sigma(t) / jnp.where(finite, process.alpha(t), 1.0)
            moved = est._replace(eps=slope, x0=est.x0 + ratio * (est.eps - slope))
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, est)
        a, b, c, d = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
        det, end = a * d - b * c, x + (s - t) * slope
        return est._replace(x0=(d * x - b * end) / det, eps=(a * end - c * x) / det)


@struct.dataclass
class Heun(Refine):
    """The mean of the slopes at both ends of the step, the second after a trial step (Karras et al. 2022, algorithm 1):
    order 2.

    Two evaluations a step. The last step, to sigma = 0, and a first step from an infinite clock are plain.
    """

    line: Line

    def update(
        self,
        state: Any,
        est: Estimate,
        x: Array,
        t: Time,
        s: Time,
        *,
        process: Process,
        denoise: Denoise,
        key: Array,
        eta: Scale,
    ) -> tuple[Any, Estimate, Array]:
        usable = (process.sigma(s) > 0) & jnp.isfinite(self.line.clock(process, t))
        at = jnp.where(usable, s, t)
        trial = process.alpha(at) * est.x0 + process.sigma(at) * est.eps
        mean = (self.line.slope(est, process, t) + self.line.slope(denoise(trial, at), process, at)) / 2
        refined = self.line.along(est, mean, x, t, s, process)
        return state, jax.tree.map(lambda new, old: jnp.where(usable, new, old), refined, est), x


def heun(of: str = "eps") -> Heun:
    """`Heun` along the line of "eps" (EDM) or "flow"."""
    return Heun(Line(of))


def moments(h: Float[Array, ""], order: int) -> list[Float[Array, ""]]:
    """m_k = int_0^1 u^k e^{-(1-u) h} du / int_0^1 e^{-(1-u) h} du, k < order: the exponential integrator's weight over
    the step.

    By m_k = (1 - (k / h) I_{k-1}) / I_0 with I_k = int h u^k e^{-(1-u) h}; for small h, where that cancels, by the
    series I_k = h sum_j (-h)^j k! / (j + k + 1)!.
    """
    small = jnp.abs(h) < 1
    near, far = jnp.where(small, h, 0.5), jnp.where(small, 1.0, h)
    series = [sum((-near) ** j * (factorial(k) / factorial(j + k + 1)) for j in range(18)) for k in range(order)]
    recursion = [-jnp.expm1(-far)]
    for k in range(1, order):
        recursion.append(1 - k / far * recursion[-1])
    return [jnp.where(small, series[k] / series[0], recursion[k] / recursion[0]) for k in range(order)]


def quadrature(nodes: list[Array], m: list[Array]) -> list[Array]:
    """Weights w with sum_i w_i u_i^k = m_k: a Vandermonde system in O(n^2) (Bjorck and Pereyra 1970)."""
    n, w = len(nodes), list(m)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] = w[i] - nodes[k] * w[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            w[i] = w[i] / (nodes[i] - nodes[i - k - 1])
        for i in range(k, n - 1):
            w[i] = w[i] - w[i + 1]
    return w


@struct.dataclass
class History:
    """The last values of a quantity and the times they belong to, the newest first; -1 marks a time that is not
    there yet.
    """

    values: Float[Array, "n b ..."]
    times: Float[Array, " n"]

    @classmethod
    def empty(cls, x: Array, n: int) -> "History":
        """n places, nothing in them."""
        return cls(jnp.zeros((n, *x.shape), x.dtype), jnp.full((n,), -1, x.dtype))

    def push(self, value: Array, t: Time) -> "History":
        """The history with a new newest value."""
        times = jnp.concatenate([jnp.asarray(t, self.times.dtype)[None], self.times])
        return History(jnp.concatenate([value[None], self.values])[: len(self.values)], times[: len(self.times)])

    def nodes(self, clock: Callable[[Time], Time], t: Time, s: Time) -> tuple[list[Array], Array, Array]:
        """u_i = (clock_i - clock_t) / h, how many of them can be used, and h = clock_s - clock_t.

        One that cannot be used stands one step before the next newer: apart from all others, so that no derivative is
        infinite. h is 0 where the clock is infinite at t or s.
        """
        (now, at_t), (end, at_s), there = _finite(clock, t), _finite(clock, s), self.times >= 0
        h = jnp.where(at_t & at_s, end - now, 0.0)
        step = jnp.where(h == 0, 1.0, h)
        past = [_finite(clock, time) for time in jnp.where(there, self.times, t)]
        usable = jnp.cumprod(jnp.stack([ok & (h != 0) for _, ok in past] or [jnp.array(False)]) & there)
        u, last = [], jnp.zeros_like(h)
        for (value, _), ok in zip(past, usable):
            last = jnp.where(ok, (value - now) / step, last - 1)
            u.append(last)
        return u, jnp.sum(usable, dtype=jnp.int32), h


def _finite(clock: Callable[[Time], Time], time: Time) -> tuple[Array, Array]:
    """The clock at a time, and whether it is finite there; where not, a number, so that no derivative is infinite."""
    ok = jnp.isfinite(clock(time))
    return clock(jnp.where(ok, time, 0.5)), ok


def extrapolated(
    now: Array, history: History, nodes: list[Array], usable: Array, m: list[Array], two: Array | None = None
) -> Array:
    """The polynomial through now (u = 0) and the history, integrated: of the highest order that the usable nodes allow.

    `two` replaces m_1 at order 2.
    """
    out, steps = now, [n - now for n in history.values]
    for order in range(2, len(nodes) + 2):
        first = m[1] if two is None or order > 2 else two
        w = quadrature([jnp.zeros_like(nodes[0]), *nodes[: order - 1]], [m[0], first, *m[2:order]])
        out = jnp.where(usable >= order - 1, now + sum(a * step for a, step in zip(w[1:], steps)), out)
    return out


@struct.dataclass
class Extrapolate(Refine):
    """DPM-Solver++ multistep (Lu et al. 2022b, algorithm 2; order 2 and 3, SDE forms by eta = 1): x0 extrapolated in
    the clock.

    Order 2 is x0 + (h / h_previous) (x0 - x0_previous) / 2, as published. Order 3 integrates the quadratic exactly; the
    published 3M takes half of its second-difference term and so has order 2 only. eta enters through h (1 + eta).
    """

    order: int = struct.field(pytree_node=False, default=2)
    clock: Clock = struct.field(pytree_node=False, default=half_logsnr)

    def init(self, x: Array) -> History:
        return History.empty(x, self.order - 1)

    def update(
        self,
        state: History,
        est: Estimate,
        x: Array,
        t: Time,
        s: Time,
        *,
        process: Process,
        denoise: Denoise,
        key: Array,
        eta: Scale,
    ) -> tuple[History, Estimate, Array]:
        nodes, usable, h = state.nodes(lambda time: self.clock(process, time), t, s)
        x0 = extrapolated(est.x0, state, nodes, usable, moments((1 + eta) * h, self.order), two=0.5)
        return state.push(est.x0, t), with_x0(est, x0, process, t), x


def extrapolate(order: int = 2, clock: Clock = half_logsnr) -> Extrapolate:
    """`Extrapolate` of order 2 or 3."""
    return Extrapolate(order, clock)


@struct.dataclass
class Trail:
    """What UniPC remembers: the history of x0, where the last step started from, and its order."""

    history: History
    x: Array
    older: Array


@struct.dataclass
class UniPC(Refine):
    """UniPC with B_2 (Zhao et al. 2023, algorithms 5-7): each new estimate first corrects the step that led to it.

    The corrector adds the new x0 as a node at u = 1, the predictor is `Extrapolate` of the same order: together order
    p + 1 from one evaluation a step. Deterministic.
    """

    order: int = struct.field(pytree_node=False, default=2)
    clock: Clock = struct.field(pytree_node=False, default=half_logsnr)

    def init(self, x: Array) -> Trail:
        return Trail(History.empty(x, self.order), x, jnp.zeros((), jnp.int32))

    def update(
        self,
        state: Trail,
        est: Estimate,
        x: Array,
        t: Time,
        s: Time,
        *,
        process: Process,
        denoise: Denoise,
        key: Array,
        eta: Scale,
    ) -> tuple[Trail, Estimate, Array]:
        corrected = self._correct(state, est, x, t, process)
        est = est._replace(eps=est.eps + (corrected - x) / process.sigma(t))
        history = History(state.history.values[: self.order - 1], state.history.times[: self.order - 1])
        nodes, usable, h = history.nodes(lambda time: self.clock(process, time), t, s)
        x0 = extrapolated(est.x0, history, nodes, usable, moments(h, self.order), two=0.5)
        return Trail(state.history.push(est.x0, t), corrected, usable), with_x0(est, x0, process, t), corrected

    def _correct(self, state: Trail, est: Estimate, x: Array, t: Time, process: Process) -> Array:
        """x_t again, from the last step's start, with the estimate made at x_t as one more node."""
        there = state.history.times[0] >= 0
        last = jnp.where(there, state.history.times[0], 1.0)
        now, older = state.history.values[0], History(state.history.values[1:], state.history.times[1:])
        nodes, _, h = older.nodes(lambda time: self.clock(process, time), last, t)
        ahead = History(jnp.concatenate([est.x0[None], older.values]), jnp.zeros(self.order))
        m = moments(h, self.order + 1)
        x0 = extrapolated(now, ahead, [jnp.ones_like(h), *nodes], 1 + state.older, m, two=0.5)
        ratio = process.sigma(t) / process.sigma(last)
        moved = ratio * state.x + (process.alpha(t) - ratio * process.alpha(last)) * x0
        return jnp.where(there & (h != 0), moved, x)


def unipc(order: int = 2) -> UniPC:
    """`UniPC` of order 2 or 3."""
    return UniPC(order)


@struct.dataclass
class Adams(Refine):
    """Adams-Bashforth of the slopes along a line: DEIS in sigma / alpha (Zhang and Chen 2022, rho-AB), order up to 4.

    `even` takes the coefficients of even steps whatever the grid, (55, -59, 37, -9) / 24 at order 4: iPNDM (Zhang and
    Chen 2022, table 1); its order is that of `Adams` only where the grid is even in the line's clock. Deterministic.
    """

    line: Line
    order: int = struct.field(pytree_node=False, default=4)
    even: bool = struct.field(pytree_node=False, default=False)

    def init(self, x: Array) -> History:
        return History.empty(x, self.order - 1)

    def update(
        self,
        state: History,
        est: Estimate,
        x: Array,
        t: Time,
        s: Time,
        *,
        process: Process,
        denoise: Denoise,
        key: Array,
        eta: Scale,
    ) -> tuple[History, Estimate, Array]:
        nodes, usable, _ = state.nodes(lambda time: self.line.clock(process, time), t, s)
        if self.even:
            nodes = [jnp.full_like(u, -1.0 - i) for i, u in enumerate(nodes)]
        m = [jnp.asarray(1 / (k + 1), x.dtype) for k in range(self.order)]
        slope = self.line.slope(est, process, t)
        mean = extrapolated(slope, state, nodes, usable, m)
        return state.push(slope, t), self.line.along(est, mean, x, t, s, process), x


def adams(order: int = 4, of: str = "eps", even: bool = False) -> Adams:
    """`Adams` along the line of "eps" or "flow"."""
    return Adams(Line(of), order, even)
